"""ArrayRecord files, more records than any machine could list: nothing is done or kept for each of them."""

from __future__ import annotations

import logging
import tracemalloc
from collections import Counter

import grain
import pytest

from fathom.train import array_records, sources
from fathom.train.json_records import DataError
from fathom.train.row_pipeline import shuffled
from fathom.train.sources import open_documents
from tests.train.test_data import documents_of, open_loader, stream_of, take
from tests.train.test_sources import write_array_record

FILES, RECORDS = 320, 32 * 10**9


class FakeReader:
    """A file with a hundred million records, "<file> <position>" each."""

    def __init__(self, path, log):
        self.path, self.log = path, log
        self.count = RECORDS // FILES + int(path.stem) * 2 - FILES + 1  # no two files alike

    def num_records(self):
        return self.count

    def writer_options_string(self):
        return "group_size:1,transpose:false"

    def read(self, start, stop):
        assert 0 <= start < stop <= self.count
        self.log.append((self.path.stem, start))
        return [f"{self.path.stem} {position}".encode() for position in range(start, stop)]

    def close(self):
        pass


@pytest.fixture
def huge(tmp_path, monkeypatch):
    """(folder, the records read so far)."""
    folder, log = tmp_path / "huge", []
    folder.mkdir()
    for i in range(FILES):
        (folder / f"{i:03}").write_bytes(b"%d" % i)
    monkeypatch.setattr(array_records, "open_array_record", lambda path: FakeReader(path, log))
    return folder, log


def open_huge(folder, **changes):
    options = {"source": "array_record", "pattern": "*", "sequence_length": 64, "packing": "none", **changes}
    return open_loader(folder, **options)


def texts(batches) -> list[str]:
    return [document.decode() for document in documents_of(stream_of(batches))]


def test_thirty_billion_records_are_opened_without_looking_at_them(huge, caplog):
    folder, log = huge
    tracemalloc.start()
    try:
        with caplog.at_level(logging.WARNING):
            loader = open_huge(folder, holdout=0.003)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert log == [("000", 0)] * 2 and peak < 8 * 2**20
    held = open_huge(folder, holdout=0.003, split="holdout").num_documents
    assert loader.num_documents + held == RECORDS and abs(held - 0.003 * RECORDS) < FILES
    assert loader.fingerprint["num_documents"] == RECORDS
    assert "index takes 238 GiB in each process; write the files with a larger group_size (16" in caplog.text


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_of_thirty_billion_records(huge, shuffle):
    """Train and holdout have none in common, shards neither; a state goes on exactly."""
    folder, _ = huge
    options = {"holdout": 0.4, "shuffle": shuffle, "batch_size": 20}
    loader = open_huge(folder, **options)
    train = texts(take(loader, 3))
    state = loader.get_state()
    following = texts(take(loader, 3))
    again = open_huge(folder, **options)
    again.set_state(state)
    assert texts(take(again, 3)) == following
    held = texts(take(open_huge(folder, split="holdout", **options), 3))
    halves = [texts(take(open_huge(folder, shard=(k, 2), **options), 3)) for k in range(2)]
    assert len(set(train + held)) == 120 and set(halves[0] + halves[1]) == set(train)
    if shuffle:
        assert len({text.split()[0] for text in train}) > 40, "not from all files"
    else:
        positions = sorted(int(text.split()[1]) for text in train + held)
        assert positions[:90] == list(range(90)), "neighbours are on both sides"


@pytest.mark.parametrize("length", [4**8 + 1, 1000, 5, 1])
def test_a_shuffle_is_a_permutation_anew_each_epoch(length):
    """4**8 + 1: where grain's own gives the first element twice and the last one never."""
    dataset = shuffled(grain.MapDataset.source(range(length)), 7)
    start = min(length, 300)
    first, second = [dataset[i] for i in range(start)], [dataset[i + length] for i in range(length)]
    assert sorted(second) == list(range(length)) and (first != second[:start]) == (length > 1)
    own = grain.MapDataset.source(range(length)).shuffle(seed=7)
    assert [own[i] for i in range(start)] == first


@pytest.mark.parametrize("length", [2**32 - 1, 2**32, 2**32 + 1, RECORDS, 10**12])
def test_a_shuffle_of_more_than_32_bits(length):
    """Indices that are equal in their lowest 32 bits, the ends and neighbours go to different elements, everywhere."""
    dataset = shuffled(grain.MapDataset.source(range(length)), 7)
    near = [0, 1, 2, 12_345, length // 3]
    indices = {i + k * 2**32 for i in near for k in range(8)} | {length - 1 - i for i in near} | set(range(300))
    indices = [i for i in indices if i < length]
    found = [dataset[i] for i in indices]
    assert len(set(found)) == len(indices) and 0 <= min(found) and max(found) < length
    # Of 2816 neighbours, from every one of 32 equal parts come about 88, 5 deviations are allowed.
    parts = Counter(place * 32 // length for place in (dataset[length // 2 + i] for i in range(2816)))
    assert len(parts) == 32 and 41 < min(parts.values()) <= max(parts.values()) < 135
    assert dataset[length + 5] != dataset[5] or dataset[length + 6] != dataset[6]


def test_files_are_closed_when_there_are_too_many(tmp_path, monkeypatch):
    opened = []
    for i in range(4):
        write_array_record(tmp_path / f"{i}", [f"{i} {k}".encode() for k in range(3)])
    documents = open_documents("array_record", str(tmp_path), pattern="*")
    original = array_records.open_array_record
    monkeypatch.setattr(array_records, "open_array_record", lambda path: opened.append(path.name) or original(path))
    documents._readers = array_records._OpenFiles(documents._open, 2)
    assert [documents.read(i) for i in (0, 3, 1, 6, 2, 4)] == [b"0 0", b"1 0", b"0 1", b"2 0", b"0 2", b"1 1"]
    assert opened == ["0", "1", "2", "1"]
    write_array_record(tmp_path / "3", [b"less"])
    with pytest.raises(DataError, match="3 had 3 records when it was opened, now 1; data must not change"):
        documents.read(9)


def test_groups_of_records(tmp_path):
    """Files written with a larger group_size read the same."""
    for size in (1, 4):
        writer = array_records_writer(tmp_path / str(size), size)
        for i in range(10):
            writer.write(b"%d" % i)
        writer.close()
    documents = open_documents("array_record", str(tmp_path), pattern="*")
    assert [documents.read(i) for i in range(20)] == [b"%d" % i for i in range(10)] * 2
    assert [array_records._describe((tmp_path / name, name))[1:] for name in ("1", "4")] == [(10, 1), (10, 4)]


def array_records_writer(path, group_size):
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), f"group_size:{group_size}")


def test_the_first_broken_file_is_named(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}").write_bytes(b"not records")
    with pytest.raises(DataError, match="00 is not a readable ArrayRecord file"):
        open_documents("array_record", str(tmp_path), pattern="*")


def test_hashes_are_of_both_ends(tmp_path):
    file = tmp_path / "a"
    for size in (0, 10, sources.ENDS, sources.ENDS + 1, 2 * sources.ENDS, 3 * sources.ENDS):
        content = bytearray(b"x" * size)

        def digest(content=content):
            file.write_bytes(content)
            entry = sources.describe_ends(file, "a")
            assert (entry.size, entry.hashed) == (len(content), "size, first and last 64 KiB")
            return entry.digest

        whole = digest()
        for at in {0, size - 1, min(size, sources.ENDS) - 1, max(size - sources.ENDS, 0)} if size else ():
            content[at] ^= 1
            assert digest() != whole, (size, at)
            content[at] ^= 1
        assert digest() == whole
        content.insert(size // 2, 120)
        assert digest() != whole
