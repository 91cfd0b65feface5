"""A stage reads on behind the documents that the one before has read, whatever rows and streams it makes of them."""

from __future__ import annotations

import random
import re

import pytest

from fathom.recipe_blocks import DataBlock
from fathom.train import row_pipeline
from fathom.train.data import DataError
from fathom.train.streams import RowStreams
from tests.train.test_data import VOCAB, write_documents
from tests.train.test_streams import ROWS, SPLITS, checkpoint, even_parts, open_all, whole

LONG = {"sequence_length": 24}
"""Other rows than those of 16 tokens."""


def numbered(folder, count, length=None):
    """Documents "<000>...", "<001>...", of so many tokens with their end, or of 8 to 40."""
    rng = random.Random(5)
    return write_documents(
        folder, [f"<{i:03}>".ljust((length or rng.randrange(8, 41)) - 1, ".") for i in range(count)]
    )


def numbers(processes, batches=1):
    """The numbers of the documents that begin in the next batches, those that are cut in their number left out."""
    found = []
    for _ in range(batches):
        for streams in processes:
            rows = next(streams)
            for tokens, ids in zip(rows["tokens"], rows["segment_ids"], strict=True):
                for segment in range(1, ids.max() + 1):
                    text = bytes(int(t) for t in tokens[ids == segment] if t < 256)
                    found += [int(number) for number in re.findall(rb"^<(\d{3})>", text)]
    return found


def begun_behind(folder, before, *, parts=None, **changes):
    """The streams of the next stage."""
    processes = open_all(folder, parts or even_parts(1), **changes)
    for streams in processes:
        streams.follow(checkpoint(before))
    return processes


@pytest.mark.parametrize("name", ["1", "2", "16"])
def test_every_document_is_read_once(tmp_path, name):
    """Rows of eight tokens, then of 16; of each stream one was read ahead, which no row has."""
    folder = numbered(tmp_path / "text", 4 * ROWS + 2, 8)
    block = DataBlock(path=str(folder), sequence_length=8, batch_size=ROWS, shuffle_rows=0)
    first = [RowStreams(block, vocab_size=VOCAB, rows=even_parts(2), process=p, count=2) for p in range(2)]
    read = numbers(first, 2)
    second = begun_behind(folder, first, parts=SPLITS[name], shuffle_rows=0)
    assert {streams.count for streams in second} == {2}
    assert len({*read, *numbers(second)}) == len(read) * 2 == 4 * ROWS


@pytest.mark.parametrize("name", ["1", "2", "16"])
@pytest.mark.parametrize("packing", ["concat_split", "best_fit"])
def test_rows_go_on_where_only_the_batch_grows(tmp_path, name, packing):
    """As in a ramp: the rows are those of a run without stages, none is passed over, and it resumes."""
    folder = numbered(tmp_path / "text", 300)
    settings = {"packing": packing, "shuffle_rows": 12, "shards": 2}
    straight = open_all(folder, even_parts(1), **settings)
    expected = [whole(straight, even_parts(1)) for _ in range(5)]
    first = open_all(folder, even_parts(2, ROWS // 2), **settings, batch_size=ROWS // 2)
    numbers(first, 2)  # which is one batch of all rows
    second = begun_behind(folder, first, parts=SPLITS[name], **settings)
    assert all(streams.step == 0 for streams in second)
    assert [whole(second, SPLITS[name]) for _ in range(2)] == expected[1:3]
    resumed = open_all(folder, even_parts(1), **settings)
    resumed[0].restore(checkpoint(second))
    assert [whole(resumed, even_parts(1)) for _ in range(2)] == expected[3:]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 8), (8, 2), (4, 1), (3, 4)])
def test_no_document_is_read_twice_by_another_number_of_streams(tmp_path, before, after):
    """Of documents of any length one stream has read more than another."""
    folder = numbered(tmp_path / "text", 400)
    first = open_all(folder, even_parts(1, 48), shards=before, shuffle_rows=0, batch_size=48)
    found = numbers(first, 2)
    read = [state["documents"] for state in checkpoint(first)]
    assert before == 1 or len(set(read)) > 1
    second = begun_behind(folder, first, parts=even_parts(1, 48), shards=after, shuffle_rows=0, batch_size=48)
    assert all(state["start"] * after >= max(read) * before for state in checkpoint(second))
    found += numbers(second)
    third = begun_behind(folder, second, parts=even_parts(1, 48), shards=before, batch_size=48, **LONG, shuffle_rows=0)
    found += numbers(third)
    assert len(set(found)) == len(found) > 60


@pytest.mark.parametrize("packing", ["concat_split", "first_fit", "none"])
def test_a_window_is_passed_over_and_the_stage_resumes(tmp_path, packing, monkeypatch):
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 3)
    folder = numbered(tmp_path / "text", 400, 16)
    settings = {"packing": packing, "shuffle_rows": 12}
    first = open_all(folder, even_parts(2), **settings)
    found = numbers(first, 2)
    states = checkpoint(first)
    # Two windows of twelve rows were begun in each stream, and up to three bins and a document.
    assert all(24 <= state["documents"] <= 28 for state in states)
    second = begun_behind(folder, first, parts=even_parts(2), **settings, **LONG)
    assert [state["start"] for state in checkpoint(second)] == [state["documents"] for state in states]
    found += numbers(second, 3)
    resumed = open_all(folder, even_parts(1), **settings, **LONG)
    resumed[0].restore(checkpoint(second))
    expected = whole(second, even_parts(2))
    assert whole(resumed, even_parts(1)) == expected
    assert checkpoint(resumed) == checkpoint(second)
    assert len(set(found)) == len(found) >= 2 * ROWS


@pytest.mark.parametrize("changes", [{"seed": 3}, {"holdout": 0.2}, {"shuffle": False}, {"path": "other"}], ids=str)
def test_another_order_begins_at_the_first_document_and_is_gone_back_from(tmp_path, changes, caplog):
    """Stages with one source, another, and the first again, which is read on; then with the second again."""
    caplog.set_level("INFO", logger="fathom")
    folder = numbered(tmp_path / "text", 100)
    if "path" in changes:
        changes = {"path": str(numbered(tmp_path / "other", 90))}
    first = open_all(folder, even_parts(2))
    numbers(first)
    read = {state["shard_index"]: state["documents"] for state in checkpoint(first)}
    second = begun_behind(folder, first, parts=even_parts(2), **changes)
    numbers(second)
    assert [state["start"] for state in checkpoint(second)] == [0, 0]
    assert "no stage before had these documents in this order: from the first on" in caplog.text
    resumed = open_all(folder, even_parts(2), **changes)
    for streams in resumed:
        streams.restore(checkpoint(second))
    third = begun_behind(folder, resumed, parts=even_parts(2))
    assert {state["shard_index"]: state["start"] for state in checkpoint(third)} == read
    numbers(third)
    fourth = begun_behind(folder, third, parts=even_parts(2), **changes)
    assert [state["start"] for state in checkpoint(fourth)] == [state["documents"] for state in checkpoint(second)]
    assert all(len(state["earlier"]) == 1 for state in checkpoint(fourth))


def test_epochs_are_counted_over_the_border(tmp_path):
    """Of ten documents a stage reads 23: the next begins with the fourth of the third time."""
    folder = numbered(tmp_path / "text", 10)
    states = checkpoint(open_all(folder, even_parts(1)))
    states[0]["documents"] = 23
    (one,) = open_all(folder, even_parts(1), **LONG)
    one.follow(states)
    assert one.get_state()[0]["start"] == 23
    (two,) = open_all(folder, even_parts(1), shards=2)
    two.follow(states)
    assert [state["start"] for state in two.get_state()] == [12, 12]  # two epochs of five, and two of the four


def test_a_shard_ends_where_the_epoch_does(tmp_path):
    """Of ten documents three streams have read three each: the fourth of four streams has but two."""
    folder = numbered(tmp_path / "text", 10)
    states = checkpoint(open_all(folder, even_parts(1, 12), shards=3, batch_size=12))
    for state in states:
        state["documents"] = 3
    (four,) = open_all(folder, even_parts(1, 12), shards=4, batch_size=12)
    four.follow(states)
    assert [state["start"] for state in four.get_state()] == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.update(version=2), "version: 2 in the state of the data, 3 here; go on with the version"),
        (lambda state: state.pop("documents"), "data states of the stage before are damaged: KeyError"),
        (lambda state: state.pop("settings"), "are damaged: KeyError"),
        (lambda state: state.update(documents="x"), "are damaged: TypeError"),
        (lambda state: state.update(earlier=None), "are damaged: TypeError"),
    ],
)
def test_states_that_lead_over_no_border(tmp_path, spoil, message):
    folder = numbered(tmp_path / "text", 20)
    states = checkpoint(open_all(folder, even_parts(1)))
    spoil(states[0])
    (streams,) = open_all(folder, even_parts(1))
    with pytest.raises(DataError, match=message):
        streams.follow(states)
