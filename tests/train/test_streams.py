"""Rows of a batch from streams that know of no process: any number of processes reads the same, and resumes it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fathom.recipe_blocks import DataBlock
from fathom.train.data import DataError, batch_hash, make_loader
from fathom.train.streams import RowStreams
from tests.train.test_data import VOCAB, random_documents, write_documents

ROWS = 16


@pytest.fixture
def folder(tmp_path):
    return write_documents(tmp_path / "text", random_documents(40))


def even_parts(processes, rows=ROWS):
    """Process -> its rows, where each holds as many, in order."""
    share = rows // processes
    return {p: ((p * share, (p + 1) * share),) for p in range(processes)}


TORUS = {p: tuple((4 * block + 2 * p, 4 * block + 2 * p + 2) for block in range(4)) for p in range(2)}
"""Two processes whose devices are no neighbours in the mesh: rows 0, 1, 4, 5, ... and rows 2, 3, 6, 7, ..."""


def open_all(folder, parts, *, count=None, split="train", **changes):
    """The streams of every process of a run."""
    block = DataBlock(**{"path": str(folder), "sequence_length": 16, "batch_size": ROWS, **changes})
    count = len(set(parts.values())) if count is None else count
    return [RowStreams(block, vocab_size=VOCAB, rows=parts, process=p, count=count, split=split) for p in parts]


def whole(processes, parts):
    """The next batch of all rows, from what each process reads; rows that several hold are equal."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for p, streams in enumerate(processes):
        batch, k = next(streams), 0
        for start, stop in parts[p]:
            for row in range(start, stop):
                values = {name: array[k] for name, array in batch.items()}
                for name, value in found.setdefault(row, values).items():
                    np.testing.assert_array_equal(value, values[name])
                k += 1
        assert all(len(array) == k for array in batch.values())
    assert sorted(found) == list(range(ROWS))
    return batch_hash({name: np.stack([found[row][name] for row in range(ROWS)]) for name in found[0]})


def checkpoint(processes):
    return json.loads(json.dumps([state for streams in processes for state in streams.states_to_save()]))


SPLITS = {
    "1": even_parts(1),
    "2": even_parts(2),
    "4": even_parts(4),
    "16": even_parts(16),
    "torus": TORUS,
    "same rows": {p: even_parts(2)[p // 2] for p in range(4)},
}


@pytest.mark.parametrize("packing", ["concat_split", "best_fit"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_every_number_of_processes_reads_the_same_batches(folder, count, packing):
    curves = {}
    for name, parts in SPLITS.items():
        processes = open_all(folder, parts, shards=count, packing=packing)
        curves[name] = [whole(processes, parts) for _ in range(6)]
        states = checkpoint(processes)
        assert sorted(state["shard_index"] for state in states) == list(range(count)), name  # each once
    assert len({json.dumps(curve) for curve in curves.values()}) == 1
    assert len(set(curves["1"])) == 6


@pytest.mark.parametrize("name", SPLITS)
def test_a_run_of_two_processes_goes_on_with_others(folder, name):
    """Also where `data.shards` says nothing, which then stands for what the checkpoint has."""
    straight = open_all(folder, even_parts(2), shuffle_rows=5)
    expected = [whole(straight, even_parts(2)) for _ in range(9)]
    broken = open_all(folder, even_parts(2), shuffle_rows=5)
    assert [whole(broken, even_parts(2)) for _ in range(4)] == expected[:4]
    parts = SPLITS[name]
    resumed = open_all(folder, parts, shuffle_rows=5)
    states = checkpoint(broken)
    states = [*reversed(states), *states]  # order does not matter, nor that runs once saved one for each process
    for streams in resumed:
        streams.check(states)
        streams.restore(states)
        assert (streams.count, streams.step) == (2, 4)
    assert [whole(resumed, parts) for _ in range(5)] == expected[4:]
    assert sorted(checkpoint(resumed), key=lambda s: s["shard_index"]) == checkpoint(straight)


def test_documents_are_enough_where_the_checkpoint_has_fewer_streams(tmp_path):
    """Three documents for four processes: too few to begin, not to go on with what one process began."""
    folder = write_documents(tmp_path / "text", random_documents(3))
    begun = open_all(folder, even_parts(1))
    expected = whole(begun, even_parts(1))
    four = open_all(folder, even_parts(4))
    with pytest.raises(DataError, match="3 of them in the train split .* one for each of 4 shards"):
        four[0].use()
    for streams in four:
        streams.restore(checkpoint(open_all(folder, even_parts(1))))
    assert whole(four, even_parts(4)) == expected


def test_one_stream_is_what_a_loader_reads(folder):
    """And two processes with two streams read what loaders of two shards read: runs begun before there were streams."""
    block = DataBlock(path=str(folder), sequence_length=16, batch_size=ROWS)
    for parts in (even_parts(1), even_parts(2)):
        for p, streams in enumerate(open_all(folder, parts)):
            loader = make_loader(block, vocab_size=VOCAB, shard_index=p, shard_count=len(parts))
            for _ in range(3):
                expected = batch_hash(next(loader))
                assert batch_hash(next(streams)) == streams.batch_hash == expected
            assert streams.get_state() == [loader.get_state()]


def test_the_hash_does_not_depend_on_the_number_of_processes(folder):
    found = set()
    for parts in (even_parts(1), even_parts(2), even_parts(4), even_parts(16)):
        first = open_all(folder, parts, shards=2)[0]
        next(first)
        found.add(first.batch_hash)
    assert len(found) == 1


def test_states_of_a_process_are_its_own(folder):
    """What evaluation rewinds to."""
    one = open_all(folder, even_parts(4), shards=8)[2]
    begin = one.get_state()
    assert [state["shard_index"] for state in begin] == [4, 5]
    first = batch_hash(next(one))
    one.set_state(begin)
    assert batch_hash(next(one)) == first


def test_reading_more_than_is_used_is_told(folder, caplog):
    caplog.set_level("INFO", logger="fathom")
    next(open_all(folder, even_parts(4), shards=4)[0])
    assert not caplog.records
    next(open_all(folder, even_parts(4), shards=2)[0])
    assert "reads 8 rows a step (1 of 2 streams) and uses 4; a new run with more streams" in caplog.text


def test_holdouts_are_cut_as_the_run_is(folder):
    parts = even_parts(4)
    cut = open_all(folder, parts, split="holdout", holdout=0.4)
    for streams in cut:
        streams.use(2)
    two = open_all(folder, even_parts(2), split="holdout", holdout=0.4)
    assert [whole(cut, parts) for _ in range(3)] == [whole(two, even_parts(2)) for _ in range(3)]


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda states: states[:1], {}, r"states of streams \[0\] of \[2\], expected one for each stream; resume"),
        (lambda states: [*states, {**states[0], "shard_count": 3}], {}, r"streams \[0, 1\] of \[2, 3\]"),
        (lambda states: states, {"shards": 4}, "data.shards: 2 streams in the checkpoint, 4 in the recipe; set"),
        (lambda states: [], {}, "not those of streams"),
        (lambda states: [None], {}, "not those of streams"),
        (lambda states: [{}], {}, "not those of streams"),
    ],
)
def test_states_that_do_not_fit(folder, spoil, changes, message):
    states = spoil(checkpoint(open_all(folder, even_parts(2))))
    (streams,) = open_all(folder, even_parts(1), **changes)
    for action in (streams.check, streams.restore):
        with pytest.raises(DataError, match=message):
            action(states)


def test_a_batch_that_the_streams_of_the_checkpoint_do_not_divide(folder):
    states = checkpoint(open_all(folder, even_parts(2)))
    block = DataBlock(path=str(folder), sequence_length=16, batch_size=5)
    streams = RowStreams(block, vocab_size=VOCAB, rows={0: ((0, 5),)})
    with pytest.raises(DataError, match="data.batch_size: 5 in the recipe, expected a multiple of the 2 streams"):
        streams.check(states)
