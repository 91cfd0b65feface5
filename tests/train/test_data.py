"""The loader: exact rows, exact resumption, exact shares, and refusal of whatever does not fit."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fathom.recipe_blocks import DataBlock
from fathom.train import row_pipeline
from fathom.train.data import DataError, batch_hash, make_loader
from tests.train.test_tokenizers import train_bpe

PACKINGS = ("concat_split", "first_fit", "best_fit", "none")
EOS = 257
VOCAB = 264


def write_documents(folder: Path, documents) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(documents):
        (folder / f"{i:04}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def random_documents(count: int = 23, longest: int = 60, seed: int = 0) -> list[bytes]:
    """Distinct, and told apart by their first byte."""
    rng = random.Random(seed)
    return [bytes([i]) + rng.randbytes(rng.randrange(longest)) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    return write_documents(tmp_path / "text", random_documents())


def open_loader(folder: Path, *, shard=(0, 1), split="train", vocab_size=VOCAB, **changes):
    values = {"path": str(folder), "sequence_length": 16, "batch_size": 4, **changes}
    index, count = shard
    return make_loader(
        DataBlock(**values),
        vocab_size=vocab_size,
        shard_index=index,
        shard_count=count,
        split=split,
    )


def take(loader, count: int) -> list[dict[str, np.ndarray]]:
    return [next(loader) for _ in range(count)]


def pieces(batches) -> list[list[int]]:
    """The token lists of all segments, in order."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            found += [tokens[segments == s].tolist() for s in range(1, segments.max() + 1)]
    return found


def stream_of(batches) -> list[int]:
    return [token for piece in pieces(batches) for token in piece]


def documents_of(stream) -> list[bytes]:
    """The whole documents of a stream of tokens, without what comes after the last EOS."""
    found, current = [], []
    for token in stream:
        if token == EOS:
            found.append(bytes(current))
            current = []
        else:
            current.append(token)
    return found


# --- Rows -----------------------------------------------------------------------------------------


def rows_of(tmp_path, packing, documents, **changes):
    folder = write_documents(tmp_path / "text", documents)
    options = {"sequence_length": 6, "batch_size": 3, "shuffle": False, **changes}
    return next(open_loader(folder, packing=packing, **options))


def show(batch) -> list[str]:
    """Rows as text: "ab.cd_" with . for EOS and _ for padding, then segments, then positions."""

    def letter(token, segment):
        return "_" if segment == 0 else "." if token == EOS else chr(token)

    return [
        " ".join(
            (
                "".join(map(letter, tokens, segments)),
                "".join(map(str, segments)),
                "".join(map(str, positions)),
            )
        )
        for tokens, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"], strict=True)
    ]


DOCUMENTS = ("ab", "c", "defghijk", "lmn")


def test_concat_split_rows(tmp_path):
    assert show(rows_of(tmp_path, "concat_split", DOCUMENTS)) == [
        "ab.c.d 111223 012010",
        "efghij 111111 012345",
        "k.lmn. 112222 010123",
    ]


def test_rows_of_one_document(tmp_path):
    batch = rows_of(tmp_path, "none", DOCUMENTS)
    assert show(batch) == [
        "ab.___ 111000 012000",
        "c.____ 110000 010000",
        "defghi 111111 012345",
    ]
    assert (batch["tokens"][batch["segment_ids"] == 0] == 0).all()


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        # Pieces: "abc." "de." "f." "g." "hij." The two bins take them in turn, until "hij." fits
        # neither.
        ("first_fit", ["abc.f. 111122 012301", "de.g._ 111220 012010"]),
        ("best_fit", ["abc.f. 111122 012301", "de.g._ 111220 012010"]),
    ],
)
def test_fitted_rows(tmp_path, monkeypatch, packing, expected):
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 2)
    documents = ("abc", "de", "f", "g", "hij")
    assert show(rows_of(tmp_path, packing, documents, batch_size=2)) == expected


def test_best_fit_fits_better_than_first_fit(tmp_path, monkeypatch):
    """After "ab." and "cde." the piece "f." fits both bins; only one of them is then full."""
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 2)
    documents = ("ab", "cde", "f", "gh", "ijklm")
    rows = {p: show(rows_of(tmp_path, p, documents, batch_size=2)) for p in ("first_fit", "best_fit")}
    assert rows["first_fit"] == ["ab.f._ 111220 012010", "cde.__ 111100 012300"]
    assert rows["best_fit"] == ["ab.gh. 111222 012012", "cde.f. 111122 012301"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [2, 16, 61])
def test_every_row_is_sound(folder, packing, length):
    for batch in take(open_loader(folder, packing=packing, sequence_length=length), 30):
        tokens, segments, positions = (batch[k] for k in ("tokens", "segment_ids", "positions"))
        assert set(batch) == {"tokens", "segment_ids", "positions"}
        for array in batch.values():
            assert array.shape == (4, length) and array.dtype == np.int32
        assert (segments[:, 0] == 1).all()
        padding = segments == 0
        assert (tokens[padding] == 0).all() and (positions[padding] == 0).all()
        assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # padding only at the end
        step = np.diff(segments, axis=1)
        assert np.isin(step[~padding[:, 1:]], (0, 1)).all()
        start = np.concatenate([np.ones((4, 1), bool), step == 1], axis=1)
        ends_before = np.where(start[:, 1:])
        assert (tokens[:, :-1][ends_before] == EOS).all()  # a segment inside a row ends with its document
        expected = np.zeros_like(positions)
        for s in range(1, length):
            expected[:, s] = np.where(start[:, s] | padding[:, s], 0, expected[:, s - 1] + 1)
        np.testing.assert_array_equal(positions, expected)
        if packing == "concat_split":
            assert not padding.any()


# --- The stream -----------------------------------------------------------------------------------


def test_concat_split_loses_nothing_and_reshuffles_each_epoch(folder):
    documents = random_documents()
    found = documents_of(stream_of(take(open_loader(folder), 60)))
    count = len(documents)
    epochs = [found[i : i + count] for i in range(0, len(found) - count, count)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == sorted(documents)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_without_shuffling_the_order_is_that_of_the_files(folder):
    found = documents_of(stream_of(take(open_loader(folder, shuffle=False), 40)))
    documents = random_documents()
    assert found == (documents * 9)[: len(found)] and len(found) > 2 * len(documents)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_fitting_loses_nothing(folder, monkeypatch, packing):
    """Every piece of at most 16 tokens comes once an epoch, whichever row it is in."""
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 8)
    whole = [[*document, EOS] for document in random_documents()]
    expected = Counter(tuple(d[i : i + 16]) for d in whole for i in range(0, len(d), 16))
    epoch = sum(expected.values())
    seen = Counter(map(tuple, pieces(take(open_loader(folder, packing=packing, shuffle=False), 100))))
    assert set(seen) == set(expected) and sum(seen.values()) > 4 * epoch
    times = {piece: seen[piece] / expected[piece] for piece in expected}
    assert max(times.values()) - min(times.values()) <= 1.5  # bins hold back at most part of an epoch


def test_rows_of_one_document_come_once_an_epoch(folder):
    rows = pieces(take(open_loader(folder, packing="none", batch_size=23), 3))
    first_bytes = [row[0] for row in rows]
    for epoch in (first_bytes[:23], first_bytes[23:46], first_bytes[46:]):
        assert sorted(epoch) == list(range(23))
    assert first_bytes[:23] != first_bytes[23:46]


def hashes(loader, count: int) -> list[str]:
    return [batch_hash(batch) for batch in take(loader, count)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_stream_is_a_function_of_the_settings(folder, packing):
    one = hashes(open_loader(folder, packing=packing), 10)
    assert hashes(open_loader(folder, packing=packing), 10) == one
    assert len(set(one)) == 10
    # Neighbouring and very large seeds give other streams, not the same one an epoch later.
    for seed in (1, 2**32, 10**30):
        assert not set(hashes(open_loader(folder, packing=packing, seed=seed), 40)) & set(one)


# --- Resuming -------------------------------------------------------------------------------------


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize(("shuffle", "shuffle_rows"), [(True, 0), (False, 0), (True, 11)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_at_every_step_gives_the_uninterrupted_stream(folder, monkeypatch, packing, shuffle, shuffle_rows):
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 6)
    steps, after = 40, 6
    loader = open_loader(folder, packing=packing, shuffle=shuffle, shuffle_rows=shuffle_rows)
    states, expected = [through_json(loader.get_state())], []
    for _ in range(steps + after):
        expected.append(batch_hash(next(loader)))
        states.append(through_json(loader.get_state()))
    assert [state["step"] for state in states] == list(range(steps + after + 1))
    resumed = open_loader(folder, packing=packing, shuffle=shuffle, shuffle_rows=shuffle_rows)
    for k in reversed(range(steps + 1)):  # also: an iterator that was elsewhere before
        resumed.set_state(states[k])
        assert resumed.step == k
        for i in range(after):
            assert resumed.get_state() == states[k + i], (k, i)
            assert batch_hash(next(resumed)) == expected[k + i], (k, i)
    if packing == "concat_split" and not shuffle_rows:  # both kinds of state occurred: nothing left over, a piece
        slices = [state["iterator"]["remainder_slices"]["tokens"] for state in states[:steps]]
        assert [-1, -1] in slices and any(pair != [-1, -1] for pair in slices)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_new_loader_resumes_too(folder, packing):
    loader = open_loader(folder, packing=packing)
    for _ in range(3):  # resumed, and the resumed one resumed
        take(loader, 5)
        state = through_json(loader.get_state())
        expected = hashes(loader, 5)
        loader = open_loader(folder, packing=packing)
        loader.set_state(state)
        assert hashes(loader, 5) == expected
    assert loader.step == 3 * (5 + 5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_reading_ahead_keeps_the_state_exact(folder, tmp_path, packing):
    """Tokenizers other than bytes read ahead in threads."""
    train_bpe(tmp_path / "bpe")
    texts = [f"{i} the model learns " * (i % 5 + 1) for i in range(23)]
    write_documents(folder, texts)
    options = {"tokenizer": str(tmp_path / "bpe" / "tokenizer.json"), "packing": packing}
    loader = open_loader(folder, vocab_size=300, **options)
    states, expected = [], []
    for _ in range(25):
        states.append(through_json(loader.get_state()))
        expected.append(batch_hash(next(loader)))
    for k in range(0, 20, 3):
        resumed = open_loader(folder, vocab_size=300, **options)
        resumed.set_state(states[k])
        assert hashes(resumed, 5) == expected[k : k + 5], k
    again = open_loader(folder, vocab_size=300, **options)
    again.set_state(states[0])
    texts_seen = again.tokenizer.decode(stream_of(take(again, 20)))
    assert "the model learns" in texts_seen


def test_states_share_nothing_with_the_loader(folder):
    loader = open_loader(folder)
    take(loader, 3)
    state = loader.get_state()
    copy = through_json(state)
    take(loader, 3)
    assert state == copy == through_json(copy)
    state["iterator"].clear()
    loader.set_state(copy)
    loader.get_state()["settings"].clear()
    assert loader.get_state() == copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": (0, 2)}, r"shard_count: 1 in the state, 2 here"),
        ({"split": "holdout"}, r"split: 'train' in the state, 'holdout' here"),
        ({"sequence_length": 8}, r"data.sequence_length: 16 in the state, 8 here"),
        ({"packing": "none"}, r"data.packing: 'concat_split' in the state, 'none' here"),
        ({"shuffle": False, "seed": 5}, r"(?s)data.seed: 0 in the state, 5.*data.shuffle: True in the"),
        ({"holdout": 0.4}, r"data.holdout: 0.3 in the state, 0.4 here"),
        ({"max_bytes": 500}, r"data.max_bytes: None in the state, 500 here"),
    ],
)
def test_states_of_other_streams_are_refused(folder, changes, message):
    loader = open_loader(folder, holdout=0.3)
    take(loader, 2)
    other = open_loader(folder, **{"holdout": 0.3, **changes})
    expected = hashes(open_loader(folder, **{"holdout": 0.3, **changes}), 2)
    with pytest.raises(DataError, match=message):
        other.set_state(through_json(loader.get_state()))
    assert hashes(other, 2) == expected  # untouched


def test_the_state_of_another_shard_is_refused(folder):
    state = open_loader(folder, shard=(1, 2)).get_state()
    with pytest.raises(DataError, match="shard_index: 1 in the state, 0 here"):
        open_loader(folder, shard=(0, 2)).set_state(state)


def test_another_shard_of_an_open_loader(folder):
    one = open_loader(folder, holdout=0.3, split="holdout")
    take(one, 2)
    other = one.shard(1, 2)
    assert hashes(other, 3) == hashes(open_loader(folder, holdout=0.3, split="holdout", shard=(1, 2)), 3)
    assert (one.step, other.step) == (2, 3)
    with pytest.raises(DataError, match="data.batch_size is 4, expected a multiple of the 3 shards"):
        one.shard(0, 3)


def test_a_state_of_other_content_is_refused(folder):
    """Same names and sizes, one byte changed; and the same data somewhere else."""
    state = open_loader(folder).get_state()
    moved = folder.rename(folder.parent / "moved")
    open_loader(moved).set_state(state)
    content = bytearray((moved / "0003.txt").read_bytes())
    content[0] ^= 1
    (moved / "0003.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"data: '[0-9a-f]{32}' in the state, '[0-9a-f]{32}' here"):
        open_loader(moved).set_state(state)


def test_what_is_no_state_is_refused(folder):
    loader = open_loader(folder)
    state = loader.get_state()
    for value in (None, [], {}, {k: v for k, v in state.items() if k != "iterator"}):
        with pytest.raises(DataError, match="not the state of a loader: it lacks"):
            loader.set_state(value)
    iterators = ({}, None, {"parent_state": {}}, {**state["iterator"], "parent_state": {"next_index": -4}})
    for iterator in iterators:
        with pytest.raises(DataError, match="the state of the loader is damaged"):
            loader.set_state({**state, "iterator": iterator})
    for changes in ({"settings": None}, {"step": "3"}):
        with pytest.raises(DataError, match="the state of the loader is damaged"):
            loader.set_state({**state, **changes})
    assert loader.step == 0


# --- Processes and splits -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_shards_divide_each_epoch(folder, count):
    """All documents once per epoch, over all shards; rows divided among them."""
    shares = []
    for index in range(count):
        loader = open_loader(folder, shard=(index, count))
        batches = take(loader, 80)
        assert batches[0]["tokens"].shape == (4 // count, 16)
        share = documents_of(stream_of(batches))
        own = (23 - index + count - 1) // count
        assert len(share) >= 2 * own
        shares.append((set(share[:own]), set(share[own : 2 * own])))
    for epoch in zip(*shares, strict=True):
        assert sorted(document for share in epoch for document in share) == sorted(random_documents())
    assert shares[0][0] != shares[0][1]  # shuffled before it is shared


def test_all_shards_have_one_fingerprint(folder):
    one, other = (open_loader(folder, shard=(i, 2)).fingerprint for i in range(2))
    assert one == other == open_loader(folder, holdout=0.0).fingerprint


def split_documents(folder, split, **changes) -> set[bytes]:
    loader = open_loader(folder, split=split, sequence_length=64, packing="none", **changes)
    batches = take(loader, loader.num_documents)
    return {bytes(t for t in piece if t != EOS) for piece in pieces(batches)}


def test_the_holdout(tmp_path):
    documents = random_documents(100, longest=40)
    folder = write_documents(tmp_path / "text", documents)
    train = split_documents(folder, "train", holdout=0.2)
    held_out = split_documents(folder, "holdout", holdout=0.2)
    assert train | held_out == set(documents) and not train & held_out
    assert 8 <= len(held_out) <= 32
    # Neither seed nor new documents move a document; a larger fraction only adds to the held-out
    # ones.
    assert split_documents(folder, "holdout", holdout=0.2, seed=7) == held_out
    assert split_documents(folder, "holdout", holdout=0.4) > held_out
    for name, text in (("added.txt", b"added"), ("copy.txt", sorted(held_out)[0])):
        (folder / name).write_bytes(text)
    assert split_documents(folder, "holdout", holdout=0.2) - {b"added"} == held_out
    assert open_loader(folder, split="train").num_documents == 102


def test_splits_that_are_empty(tmp_path):
    folder = write_documents(tmp_path / "text", ["only one"])
    with pytest.raises(DataError, match=r"has 1 documents, \d of them in the (train|holdout) split"):
        open_loader(folder, holdout=0.5)
    with pytest.raises(DataError, match="data.holdout is 0: no documents are held out"):
        open_loader(folder, split="holdout")
    with pytest.raises(DataError, match="at least one for each of 2 shards; add documents"):
        open_loader(folder, shard=(0, 2))


# --- Bad settings and ids -------------------------------------------------------------------------


def test_settings_are_checked_together(folder):
    """By the loader itself too: a recipe's block has been checked, somebody else's has not."""
    block = DataBlock.model_construct(
        source="text", path=str(folder), pattern="**/*.txt", exclude=(), field="text", tokenizer="bytes",
        sequence_length=1, batch_size=3, packing="tight", shuffle=True, seed=-1, holdout=1.0, max_bytes=0,
        shuffle_rows=4**9 + 1,
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        make_loader(block, vocab_size=VOCAB, shard_index=2, shard_count=2, split="test")
    for text in (
        "data.packing is 'tight', expected one of concat_split",
        "data.sequence_length is 1, expected 2 or more",
        "data.batch_size is 3, expected a multiple of the 2 shards",
        "data.seed is -1",
        "data.holdout is 1.0, expected at least 0 and below 1",
        "data.max_bytes is 0",
        "data.shuffle_rows is 262145, expected one more or fewer",
        "shard_index is 2, expected below 2",
        "split is 'test', expected one of train, holdout",
    ):
        assert text in str(caught.value)


def test_a_tokenizer_larger_than_the_model(folder, tmp_path):
    with pytest.raises(DataError, match="tokenizer bytes has ids up to 257, .* is 257; set it to 258"):
        open_loader(folder, vocab_size=257)
    open_loader(folder, vocab_size=258)
    train_bpe(tmp_path / "bpe")
    name = str(tmp_path / "bpe" / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer.json has ids up to"):
        open_loader(write_documents(tmp_path / "ascii", ["a"]), tokenizer=name)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1])
def test_ids_outside_the_vocabulary_never_leave_the_loader(folder, monkeypatch, bad):
    loader = open_loader(folder, shuffle=False)
    encode = loader.tokenizer.encode

    def spoiled(document):
        ids = encode(document)
        return np.where(ids == 5, bad, ids) if document[0] == 5 else ids

    monkeypatch.setattr(loader.tokenizer, "encode", spoiled, raising=False)
    with pytest.raises(DataError, match=rf"batch \d has token id {bad} at row \d, column \d+, expected 0..263"):
        take(loader, 10)


def test_text_that_is_not_utf8_needs_the_byte_tokenizer(tmp_path, monkeypatch):
    train_bpe(tmp_path / "bpe")
    folder = write_documents(tmp_path / "text", [b"fine", b"\xff\xfe"])
    options = {"tokenizer": str(tmp_path / "bpe" / "tokenizer.json"), "vocab_size": 300}
    with pytest.raises(DataError, match="0001.txt is not UTF-8: invalid start byte at byte 0"):
        open_loader(folder, **options)
    # A file too large to be read whole at the start is told when it is read.
    monkeypatch.setattr("fathom.train.sources.WHOLE_HASH_LIMIT", 1)
    monkeypatch.setattr("fathom.train.sources.MIB", 1)
    loader = open_loader(folder, **options)
    with pytest.raises(DataError, match="0001.txt is not UTF-8"):
        take(loader, 10)


# --- Fingerprint and hash -------------------------------------------------------------------------


def test_the_fingerprint(folder, monkeypatch):
    loader = open_loader(folder)
    fingerprint = loader.fingerprint
    assert through_json(fingerprint) == fingerprint
    assert fingerprint["source"] == "text" and fingerprint["num_documents"] == 23
    first = fingerprint["files"]["0000.txt"]
    assert first["bytes"] == len(random_documents()[0]) and first["hashed"] == "whole file"
    assert fingerprint["num_bytes"] == sum(map(len, random_documents()))
    assert fingerprint["tokenizer"]["hash"] == loader.tokenizer.hash
    assert str(folder) not in json.dumps(fingerprint)  # the same data elsewhere is the same data
    monkeypatch.setattr("fathom.train.data.LISTED_FILES", 10)
    short = open_loader(folder).fingerprint
    assert short["files"] == "more than 10, see files_hash"
    assert {**short, "files": fingerprint["files"]} == fingerprint


def test_the_fingerprint_follows_whatever_decides_the_stream(folder, tmp_path):
    train_bpe(tmp_path / "bpe")
    fields = {
        "max_bytes": 100, "sequence_length": 8, "batch_size": 2, "packing": "none", "shuffle": False,
        "shuffle_rows": 8,
        "seed": 1, "holdout": 0.3, "exclude": ("x",), "pattern": "*.txt",
    }  # fmt: skip
    prints = [open_loader(folder).fingerprint]
    prints += [open_loader(folder, **{key: value}).fingerprint for key, value in fields.items()]
    (folder / "0000.txt").rename(folder / "9999.txt")
    prints.append(open_loader(folder).fingerprint)
    assert len({json.dumps(p) for p in prints}) == len(prints)


def test_batch_hash():
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "positions": np.zeros((2, 3), np.int32)}
    # A fixed value: hashes are compared between runs, machines and versions.
    assert batch_hash(batch) == "802c7e8fc07ed4e606f52b56aac64ec1"
    assert batch_hash(dict(reversed(batch.items()))) == batch_hash(batch)
    assert batch_hash({k: np.asfortranarray(v) for k, v in batch.items()}) == batch_hash(batch)
    assert batch_hash({k: v.astype(">i4") for k, v in batch.items()}) == batch_hash(batch)
    others = [
        {**batch, "tokens": batch["tokens"].reshape(3, 2)},
        {**batch, "tokens": batch["tokens"].astype(np.int64)},
        {**batch, "tokens": batch["tokens"] + np.eye(2, 3, dtype=np.int32)},
        {"tokens": batch["positions"], "positions": batch["tokens"]},
        {"tokens": batch["tokens"]},
    ]
    assert len({batch_hash(b) for b in [batch, *others]}) == 6
