"""Sources of documents: text files, JSON lines, Parquet; ArrayRecord is in `fathom.train.array_records`. Random access.

A source is opened once, in a fixed order (files by their path inside the folder, then lines, rows or
records), and everything that can be wrong with it is looked for then, but in records: these may be too many.
"""

from __future__ import annotations

import abc
import bisect
import codecs
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fathom.train.json_records import DataError, RecordReader, json_text
from fathom.train.selection import Split, split_by_keys

SOURCES = ("text", "jsonl", "chat", "parquet", "array_record")

MIB = 1 << 20
WHOLE_HASH_LIMIT = 64 * MIB
"""Files up to this size are hashed whole, larger ones by their size and their first and last MiB."""

ENDS = 64 << 10
"""ArrayRecord files are hashed by their size and this much at each end: they may be very many."""


class FileEntry(NamedTuple):
    """A file that was read. `name` is its path inside the data folder; `hashed` says what the digest covers."""

    path: Path
    name: str
    size: int
    digest: str
    hashed: str


class Documents(abc.ABC):
    """Documents by index.

    Attributes:
      files: the files read, in order.
      num_bytes: bytes of text, or None when only reading everything would tell.
    """

    files: list[FileEntry]
    num_bytes: int | None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def split(self, share: float) -> Split:
        """The documents to train on and those held out, a `share` of them; each stays when others are added."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """The text of a document, at least one byte where the source was read in full before.

        Raises:
          DataError: when the file has changed since it was opened, or is no longer readable.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Where a document is, for error messages."""


class KeyedDocuments(Documents):
    """Documents that are read in full when they are opened.

    Attributes:
      keys: [num_documents] uint64, evenly spread and equal for equal documents; the holdout is chosen by them.
    """

    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, share: float) -> Split:
        return split_by_keys(self.keys, share)


def open_documents(
    source: str,
    path: str,
    *,
    pattern: str,
    exclude: Sequence[str] = (),
    field: str = "text",
    max_bytes: int | None = None,
    needs_text: bool = False,
    read_chat: RecordReader | None = None,
) -> Documents:
    """Opens a source.

    Args:
      source: one of SOURCES. path: a file, or a folder in which files that match `pattern` are read,
        except below folders named in `exclude`.
      field: the JSON key or Parquet column. max_bytes: stop after this much text; the document that
        crosses the limit is cut there, between two characters.
      needs_text: check text files for UTF-8 (those over WHOLE_HASH_LIMIT when they are read).
      read_chat: what the document of a line is, for the source "chat", whose documents are never cut.

    Raises:
      DataError: path missing, nothing matches, a file unreadable, broken or without the field, no text.
    """
    # Imported here: it is made of what is in this file.
    from fathom.train.array_records import ArrayRecords

    readers = {
        "text": lambda files, budget: TextFiles(files, budget, needs_text),
        "jsonl": lambda files, budget: JsonLines(files, budget, field, json_text),
        "chat": lambda files, budget: JsonLines(files, budget, field, read_chat, whole=True),
        "parquet": lambda files, budget: ParquetColumn(files, budget, field),
        "array_record": lambda files, budget: ArrayRecords(files, budget, field),
    }
    if source not in readers:
        raise DataError(f"data.source is {source!r}, expected one of {', '.join(SOURCES)}")
    documents = readers[source](find_files(path, pattern, exclude), Budget(max_bytes))
    if not len(documents):
        raise DataError(f"data.path {path}: its {len(documents.files)} files hold no text; add documents")
    return documents


class Budget:
    """How much text may still be read. `limit` None: all."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.spent = 0

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.spent >= self.limit

    def take(self, size: int, whole: bool = False) -> int:
        """The part of `size` bytes that may be read; all of them if `whole`, although that exceeds the limit."""
        granted = size if self.limit is None or whole else min(size, self.limit - self.spent)
        self.spent += granted
        return granted


def clip(text: bytes, size: int) -> bytes:
    """At most `size` bytes of a text, not ending inside a UTF-8 character.

    A text whose first character is longer than `size` is cut to `size` bytes all the same.
    """
    if len(text) <= size:
        return text
    end = size
    while end > max(size - 3, 0) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[: end or size]


# --- Files ----------------------------------------------------------------------------------------


def find_files(path: str, pattern: str, exclude: Sequence[str] = ()) -> list[tuple[Path, str]]:
    """(path, name inside the folder) of all matching files, sorted by name.

    Raises:
      DataError: when there is no such path, a folder cannot be listed, or no file matches.
    """
    if "://" in path:
        raise DataError(f"data.path {path} is remote; mount it or copy it, and give the local path")
    root = Path(path).expanduser()
    if root.is_file():
        return [(root, root.name)]
    if not root.is_dir():
        raise DataError(f"data.path {path} does not exist; give a file or a folder")
    matches, excluded, found = glob_regex(pattern), set(exclude), []

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from None

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in excluded]
        inside = Path(folder).relative_to(root)
        for name in names:
            relative = (inside / name).as_posix()
            if matches.fullmatch(relative):
                found.append((Path(folder) / name, relative))
    if not found:
        raise DataError(f"data.path {path}: no file matches data.pattern {pattern!r}; correct one of them")
    return sorted(found, key=lambda entry: entry[1])


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob over whole relative paths: `*` and `?` stay inside a name, `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*$|\*|\?|\[!?[^\]/]+\])", pattern)
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(part: str) -> str:
        if part in special:
            return special[part]
        if len(part) > 2 and part[0] == "[" and part[-1] == "]":
            return "[" + re.sub(r"^!", "^", part[1:-1]).replace("\\", r"\\") + "]"
        return re.escape(part)

    try:
        return re.compile("".join(map(translate, parts)), re.DOTALL)
    except re.error as error:
        raise DataError(f"data.pattern {pattern!r} is not a glob: {error}") from None


def describe_file(path: Path, name: str, *, utf8: bool = False) -> FileEntry:
    """Size and hash of a file; with `utf8`, also proves that it is UTF-8.

    Raises:
      DataError: when it cannot be read, or is not UTF-8.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > WHOLE_HASH_LIMIT:
                digest.update(b"%d," % size + file.read(MIB))
                file.seek(size - MIB)
                digest.update(file.read(MIB))
                return FileEntry(path, name, size, digest.hexdigest(), "size, first and last MiB")
            decoder = codecs.getincrementaldecoder("utf-8")() if utf8 else None
            done = 0
            for block in iter(lambda: file.read(MIB), b""):
                digest.update(block)
                if decoder:
                    _check_utf8(decoder, block, done, path)
                done += len(block)
            if decoder:
                _check_utf8(decoder, b"", done, path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if done != size:
        raise DataError(f"{path} changed from {size} to {done} bytes while it was read; wait until it is whole")
    return FileEntry(path, name, size, digest.hexdigest(), "whole file")


def describe_ends(path: Path, name: str) -> FileEntry:
    """Size of a file, and a hash of that and its first and last ENDS bytes, in two reads.

    Raises:
      DataError: when it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(b"%d," % size + file.read(ENDS))
            if size > ENDS:
                file.seek(max(size - ENDS, ENDS))
                digest.update(file.read(ENDS))
    except OSError as error:
        raise _unreadable(path, error) from None
    return FileEntry(path, name, size, digest.hexdigest(), f"size, first and last {ENDS >> 10} KiB")


def _check_utf8(decoder: codecs.IncrementalDecoder, block: bytes, done: int, path: Path) -> None:
    held = len(decoder.getstate()[0])  # the start of a character, from the block before
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error, done - held) from None


def not_utf8(where: str, error: UnicodeDecodeError, offset: int = 0) -> DataError:
    """The error for text that is not UTF-8; `offset` is where the decoded part began."""
    return DataError(
        f"{where} is not UTF-8: {error.reason} at byte {offset + error.start}; convert it, or use "
        "data.tokenizer=bytes, which takes any bytes"
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}; correct the file or data.pattern")


def _same_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise DataError(f"{path} had {expected} bytes when it was opened, now {size}; data must not change")


def key_of(text: bytes) -> int:
    """64 bits, evenly spread and equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- Sources --------------------------------------------------------------------------------------


class TextFiles(KeyedDocuments):
    """Each file is a document; empty files are none."""

    def __init__(self, files: Sequence[tuple[Path, str]], budget: Budget, needs_text: bool):
        self.files, self._entries, self._granted, keys = [], [], [], []
        for path, name in files:
            if budget.exhausted:
                break
            entry = describe_file(path, name, utf8=needs_text)
            self.files.append(entry)
            if entry.size:
                self._entries.append(entry)
                self._granted.append(budget.take(entry.size))
                keys.append(int(entry.digest[:16], 16))
        self.keys = np.array(keys, np.uint64)
        self.num_bytes = budget.spent

    def read(self, index: int) -> bytes:
        entry, granted = self._entries[index], self._granted[index]
        try:
            with entry.path.open("rb") as file:
                _same_size(entry.path, os.fstat(file.fileno()).st_size, entry.size)
                return clip(file.read(granted + 1), granted)
        except OSError as error:
            raise _unreadable(entry.path, error) from None

    def name(self, index: int) -> str:
        return str(self._entries[index].path)


class JsonLines(KeyedDocuments):
    """Each line is a JSON object with a document, as `read_record` reads it, under `field`.

    Blank lines and empty documents are none. All lines are parsed once, when the source is opened; afterwards only
    their offsets are kept. `whole` documents are not cut at the budget's end.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, str]],
        budget: Budget,
        field: str,
        read_record: RecordReader,
        whole: bool = False,
    ):
        self._field, self._read_record, self.files = field, read_record, []
        self._file, self._line, self._offset, self._length, self._granted = (array("q") for _ in range(5))
        keys = array("Q")
        for number, (path, name) in enumerate(files):
            if budget.exhausted:
                break
            self.files.append(describe_file(path, name))
            for line_number, offset, line in _lines(path):
                if budget.exhausted:
                    break
                text = read_record(line, field, f"{path}:{line_number}")
                if not text:
                    continue
                row = (number, line_number, offset, len(line), budget.take(len(text), whole))
                columns = (self._file, self._line, self._offset, self._length, self._granted)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
                keys.append(key_of(text))
        self.keys = np.array(keys, np.uint64)
        self.num_bytes = budget.spent

    def read(self, index: int) -> bytes:
        entry = self.files[self._file[index]]
        try:
            with entry.path.open("rb") as file:
                _same_size(entry.path, os.fstat(file.fileno()).st_size, entry.size)
                file.seek(self._offset[index])
                line = file.read(self._length[index])
        except OSError as error:
            raise _unreadable(entry.path, error) from None
        return clip(self._read_record(line, self._field, self.name(index)), self._granted[index])

    def name(self, index: int) -> str:
        return f"{self.files[self._file[index]].path}:{self._line[index]}"


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, line) of the lines that are not blank."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error) from None


class ParquetColumn(KeyedDocuments):
    """Each row's value in the column `field`; empty texts are none. The column is held in memory."""

    def __init__(self, files: Sequence[tuple[Path, str]], budget: Budget, field: str):
        self.files, self._chunks, self._rows = ([], [], [])  # _rows: per chunk, the file rows of its documents
        self._starts, self._last = [0], 0
        keys = array("Q")
        for path, name in files:
            if budget.exhausted:
                break
            entry = describe_file(path, name)
            self.files.append(entry)
            for first_row, texts in _column(path, field):
                kept = array("q")
                for i, text in enumerate(texts):
                    if budget.exhausted:
                        break
                    if text.is_valid and len(text.as_buffer()):
                        data = text.as_buffer().to_pybytes()
                        kept.append(i)
                        keys.append(key_of(data))
                        self._last = budget.take(len(data))
                    elif not text.is_valid:
                        raise DataError(f"{path}: row {first_row + i} of column {field!r} is null; drop it")
                self._chunks.append((len(self.files) - 1, first_row, texts))
                self._rows.append(kept)
                self._starts.append(self._starts[-1] + len(kept))
                if budget.exhausted:
                    break
        self.keys = np.array(keys, np.uint64)
        self.num_bytes = budget.spent

    def _find(self, index: int) -> tuple[int, int, Any]:
        """(file, row in it, value) of a document."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = bisect.bisect_right(self._starts, index) - 1
        file, first_row, texts = self._chunks[chunk]
        row = self._rows[chunk][index - self._starts[chunk]]
        return file, first_row + row, texts[row]

    def read(self, index: int) -> bytes:
        data = self._find(index)[2].as_buffer().to_pybytes()
        return clip(data, self._last) if index == len(self) - 1 else data

    def name(self, index: int) -> str:
        file, row, _ = self._find(index)
        return f"{self.files[file].path}: row {row}"


def _column(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """(row in the file, arrow array of strings) for the pieces of a text column."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("data.source=parquet needs pyarrow: pip install 'fathom-jax[sources]'") from None

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                names = ", ".join(map(repr, schema.names)) or "none"
                raise DataError(f"{path} has no column {field!r}; its columns are {names}; set data.field")
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {field!r} is {kind}, expected string; set data.field")
            row = 0
            for group in range(file.num_row_groups):
                for chunk in file.read_row_group(group, columns=[field]).column(0).chunks:
                    yield row, chunk
                    row += len(chunk)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
