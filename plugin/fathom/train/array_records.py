"""ArrayRecord files of any size: what is known of them at the start is how many records each has.

A record's number is a file and a position in it, found by counting; the held-out ones too. Files are opened at the
start to count their records, several at a time because a mounted bucket answers late, and again when one of their
records is first read. Opening one reads the index at its end: on one core 0.4 ms, and 50 ns for each group of records
(`group_size` of the file's writer).
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fathom.train.json_records import DataError, json_text
from fathom.train.selection import Split, split_by_grid
from fathom.train.sources import Budget, Documents, FileEntry, clip, describe_ends, key_of, not_utf8

logger = logging.getLogger(__name__)

OPEN_THREADS = 32
"""Files looked at side by side at the start."""

INDEX_BYTES = 8
"""The reader's memory for each group of records of a file that it holds open."""

INDEX_WARNING = 8 << 30


class ArrayRecords(Documents):
    """Each record is a document: UTF-8 text, or, when the first one is a JSON object, JSON with `field`.

    At the start the size of each file, a hash of its ends and its number of records are read, and the first record of
    all (with `max_bytes`, as many as that takes); the others when they are needed. Nothing is kept for a record but
    what the reader's own index of an open file holds, see INDEX_BYTES.
    """

    def __init__(self, files: Sequence[tuple[Path, str]], budget: Budget, field: str):
        self._field, self.files, self._counts, self._starts = field, [], [], [0]
        self._json, self._last, groups = False, None, 0
        self._readers = _OpenFiles(self._open, _most_open())
        described = map(_describe, files) if budget.limit is not None else _in_threads(_describe, files)
        for entry, count, group_size in described:
            first = self._starts[-1]
            self.files.append(entry)
            self._counts.append(count)
            self._starts.append(first + count)
            groups += -(-count // group_size)
            if first == 0 and count:
                self._json = self._looks_like_json(self._record(0))
                self._text(0)
            if budget.limit is not None:
                self._starts[-1] = first + self._within(budget, first)
            if budget.exhausted:
                break
        self.num_bytes = None if budget.limit is None else budget.spent
        if groups * INDEX_BYTES > INDEX_WARNING:
            logger.warning(
                "data: %d records in %d groups: once all files have been read from, their index takes %.0f GiB in each "
                "process; write the files with a larger group_size (16 or more), or longer records",
                len(self), groups, groups * INDEX_BYTES / 2**30,
            )  # fmt: skip

    def __len__(self) -> int:
        return self._starts[-1]

    def split(self, share: float) -> Split:
        """By counting, see `split_by_grid`; a file's offset comes from its name."""
        counts = [stop - start for start, stop in itertools.pairwise(self._starts)]
        return split_by_grid(counts, [key_of(file.name.encode()) for file in self.files], share)

    def _within(self, budget: Budget, first: int) -> int:
        """How many records of the newest file the budget pays for."""
        for index in range(first, self._starts[-1]):
            self._last = budget.take(len(self._text(index)))
            if budget.exhausted:
                return index - first + 1
        return self._starts[-1] - first

    @staticmethod
    def _looks_like_json(record: bytes) -> bool:
        try:
            return isinstance(json.loads(record.decode("utf-8")), dict)
        except (ValueError, RecursionError):
            return False

    def _open(self, file: int) -> Any:
        path, count = self.files[file].path, self._counts[file]
        reader = open_array_record(path)
        if reader.num_records() != count:
            raise DataError(
                f"{path} had {count} records when it was opened, now {reader.num_records()}; data must not change"
            )
        return reader

    def _place(self, index: int) -> tuple[int, int]:
        """(file, position in it) of a record."""
        file = bisect.bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]

    def _record(self, index: int) -> bytes:
        file, position = self._place(index)
        reader = self._readers[file]
        try:
            # A range: for a list of positions the reader looks through its whole index, 15 ms of a million records.
            return reader.read(position, position + 1)[0]
        except Exception as error:  # the reader raises RuntimeError and ValueError from C++
            raise DataError(f"{self.name(index)} cannot be read: {str(error) or 'damaged'}") from None

    def _text(self, index: int) -> bytes:
        record = self._record(index)
        if self._json:
            return json_text(record, self._field, self.name(index))
        try:
            record.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self.name(index), error) from None
        return record

    def read(self, index: int) -> bytes:
        text = self._text(index)
        return clip(text, self._last) if self._last is not None and index == len(self) - 1 else text

    def name(self, index: int) -> str:
        file, position = self._place(index)
        return f"{self.files[file].path}: record {position}"


class _OpenFiles:
    """Readers by file, opened when they are asked for; of more than `limit` the one longest unused is let go."""

    def __init__(self, open_file: Callable[[int], Any], limit: int):
        self._open_file, self._limit = open_file, limit
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, file: int) -> Any:
        with self._lock:
            if file in self._readers:
                self._readers.move_to_end(file)
                return self._readers[file]
        reader = self._open_file(file)  # not under the lock: it takes as long as many reads
        with self._lock:
            reader = self._readers.setdefault(file, reader)
            while len(self._readers) > self._limit:
                self._readers.popitem(last=False)  # closed when the last thread that reads from it lets go too
        return reader


def _most_open() -> int:
    """Half the files that the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft // 2, 1)


def _describe(file: tuple[Path, str]) -> tuple[FileEntry, int, int]:
    """(entry, number of records, records in a group) of a file."""
    path, name = file
    entry = describe_ends(path, name)
    reader = open_array_record(path)
    group_size = re.search(r"group_size:(\d+)", reader.writer_options_string() or "")
    count = reader.num_records()
    reader.close()
    return entry, count, int(group_size[1]) if group_size else 1


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The results in order; after an error, raised at its place, no more items are begun."""
    pool = ThreadPoolExecutor(min(OPEN_THREADS, max(len(items), 1)), thread_name_prefix="array-record")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def open_array_record(path: Path) -> Any:
    """The reader of a file, for one record at a time; it may be used by several threads.

    Raises:
      DataError: when the file is not a whole ArrayRecord file.
    """
    # Imported here: other sources do without it.
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0,max_parallelism:0"
    try:
        reader = ArrayRecordReader(str(path), options=options, file_reader_buffer_size=1 << 15)
        if not reader.ok():
            reader.close()  # raises what was wrong, which opening does not
            raise ValueError("damaged")
        return reader
    except Exception as error:  # the reader raises RuntimeError and ValueError from C++
        raise DataError(f"{path} is not a readable ArrayRecord file: {str(error) or 'cut off'}") from None
