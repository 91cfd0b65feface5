"""Sources: the same documents from every format, in a fixed order, and every way in which they can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from fathom.train import sources
from fathom.train.sources import DataError, clip, find_files, open_documents

TEXTS = [f"{i}: " + "déjà 深い 🐟 " * (i % 4 + 1) for i in range(11)]
FORMATS = ("text", "jsonl", "parquet", "array_record", "array_record of JSON")


def write_array_record(path: Path, records) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write(folder: Path, format: str, texts=TEXTS, field: str = "text") -> str:
    """Documents in two files (text: one each), in order of name; returns the source."""
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"id": i, field: text}).encode() for i, text in enumerate(texts)]
    halves = (slice(None, len(texts) // 2), slice(len(texts) // 2, None))
    for number, half in enumerate(halves):
        stem = folder / f"part{number}"
        if format == "text":
            for i, text in list(enumerate(texts))[half]:
                (folder / f"{i:03}.txt").write_bytes(text.encode())
        elif format == "jsonl":
            stem.with_suffix(".jsonl").write_bytes(b"\n\n".join(rows[half]) + b"\n" * number)
        elif format == "parquet":
            table = pa.table({"id": list(range(len(texts[half]))), field: texts[half]})
            pq.write_table(table, stem.with_suffix(".parquet"), row_group_size=3)
        else:
            records = rows if format.endswith("JSON") else [text.encode() for text in texts]
            write_array_record(stem.with_suffix(".array_record"), records[half])
    return format.split()[0]


def open_format(folder: Path, format: str, **options):
    source = format.split()[0]
    pattern = "**/*" if source == "text" else f"**/*.{source}"
    return open_documents(source, str(folder), pattern=pattern, **options)


def read_all(documents) -> list[str]:
    return [documents.read(i).decode() for i in range(len(documents))]


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, format):
    write(tmp_path / "data", format)
    documents = open_format(tmp_path / "data", format)
    assert read_all(documents) == TEXTS
    if not format.startswith("array"):
        assert len(set(documents.keys.tolist())) == len(TEXTS) and documents.keys.dtype == np.uint64
    size = sum(len(text.encode()) for text in TEXTS)
    assert documents.num_bytes == (None if format.startswith("array") else size)
    names = [documents.name(i) for i in range(len(TEXTS))]
    assert len(set(names)) == len(names) and all(str(tmp_path) in name for name in names)


@pytest.mark.parametrize("format", FORMATS[1:3] + FORMATS[4:])
def test_another_field(tmp_path, format):
    write(tmp_path / "data", format, field="body")
    assert read_all(open_format(tmp_path / "data", format, field="body")) == TEXTS


@pytest.mark.parametrize("format", FORMATS[:3])
def test_empty_texts_are_no_documents(tmp_path, format):
    texts = ["", "a", "", "", "b", ""]
    write(tmp_path / "data", format, texts)
    documents = open_format(tmp_path / "data", format)
    assert read_all(documents) == ["a", "b"]
    assert documents.name(1).endswith({"text": "004.txt", "jsonl": "part1.jsonl:3"}.get(format, ": row 1"))


@pytest.mark.parametrize("format", FORMATS)
def test_max_bytes_at_every_limit(tmp_path, format):
    """The text is a prefix of the whole, as long as the limit allows without cutting a character."""
    texts = ["ab", "é🐟", "c"]
    write(tmp_path / "data", format, texts)
    whole = b"".join(text.encode() for text in texts)
    for limit in (1, 2, 4, 5, 7, 8, 9, 100):
        documents = open_format(tmp_path / "data", format, max_bytes=limit)
        found = [documents.read(i) for i in range(len(documents))]
        assert b"".join(found) == clip(whole, limit), limit
        assert found[0] == b"ab"[:limit] and len(found) == 1 + (limit > 2) + (limit > 8)
        assert documents.num_bytes == min(limit, 9)
    if format == "text":
        assert [file.name for file in open_format(tmp_path / "data", format, max_bytes=1).files] == ["000.txt"]


def test_clip_keeps_characters_whole():
    text = "aé🐟b".encode()  # 1, 2, 4 and 1 bytes
    assert [len(clip(text, n)) for n in range(1, 10)] == [1, 1, 3, 3, 3, 3, 7, 8, 8]
    assert clip("🐟".encode(), 2) == "🐟".encode()[:2]  # no whole character fits
    assert clip(b"\xff\x80\x80\x80\x80\x80", 5) == b"\xff\x80"  # not text: any cut will do


# --- Which files ----------------------------------------------------------------------------------


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


PATTERNS = ("**/*.py", "*.py", "a/*.py", "**/b/*.py", "**/?.py", "**/[!xy].py", "a/**/y.py", "**/*[", "**/*")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_pathlib_means(tmp_path, pattern):
    names = ("x.py", "xx.py", "a/x.py", "a/y.py", "a/b/x.py", "a/b/c/y.py", "b/z.py", "b/z.pyc", "b/.h.py", "[")
    make_tree(tmp_path, *names)
    expected = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob(pattern) if p.is_file())
    assert expected and [name for _, name in find_files(str(tmp_path), pattern)] == expected


def test_excluded_folders_at_any_depth(tmp_path):
    make_tree(tmp_path, "test/a.py", "lib/test/b.py", "lib/test.py", "lib/tests2/c.py", "lib/deep/d.py")
    names = [name for _, name in find_files(str(tmp_path), "**/*.py", ("test",))]
    assert names == ["lib/deep/d.py", "lib/test.py", "lib/tests2/c.py"]


def test_a_single_file_needs_no_pattern(tmp_path):
    make_tree(tmp_path, "notes.md")
    assert find_files(str(tmp_path / "notes.md"), "**/*.txt") == [(tmp_path / "notes.md", "notes.md")]


# --- What is broken -------------------------------------------------------------------------------


def refused(message: str, path: Path, source: str = "text", pattern: str = "**/*", **options) -> None:
    with pytest.raises(DataError, match=message):
        open_documents(source, str(path), pattern=pattern, **options)


def test_paths(tmp_path):
    make_tree(tmp_path, "data/a.txt")
    refused("/nothing does not exist; give a file or a folder", tmp_path / "nothing")
    refused(r"no file matches data.pattern '\*\*/\*.md'", tmp_path, pattern="**/*.md")
    refused("data.source is 'csv', expected one of text, jsonl", tmp_path, "csv")
    with pytest.raises(DataError, match="gs://bucket/x is remote; mount it or copy it"):
        find_files("gs://bucket/x", "*")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    refused("link.txt cannot be read: No such file", tmp_path)


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_permissions(tmp_path, monkeypatch, source):
    """As for anybody but root: root reads everything, so the refusal is made here."""
    make_tree(tmp_path, "a.txt")

    def denied(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    refused("a.txt cannot be read: Permission denied; correct the file", tmp_path, source)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root / "secret")))
        return iter(())

    monkeypatch.setattr(sources.os, "walk", walk)
    refused("secret cannot be read: Permission denied", tmp_path)


@pytest.mark.parametrize("format", FORMATS[:3])
def test_no_text_at_all(tmp_path, format):
    write(tmp_path / "data", format, ["", ""])
    refused("its 2 files hold no text; add documents", tmp_path / "data", format)


def test_an_array_record_file_without_records(tmp_path):
    write_array_record(tmp_path / "a", [])
    refused("its 1 files hold no text", tmp_path, "array_record")


@pytest.mark.parametrize("before", [0, sources.MIB - 1, sources.MIB, 2 * sources.MIB - 2])
def test_text_that_is_not_utf8(tmp_path, before):
    """Found in any block, also in a character that lies across two."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * before + "é".encode() * 3)
    open_documents("text", str(file), pattern="*", needs_text=True)
    file.write_bytes(b"x" * before + b"\xc3\xa9\xc3(")
    refused(f"a.txt is not UTF-8: .* at byte {before + 2}; .*tokenizer=bytes", file, needs_text=True)
    assert len(open_documents("text", str(file), pattern="*").read(0)) == before + 4
    file.write_bytes(b"x" * before + b"\xc3")
    refused(f"unexpected end of data at byte {before};", file, needs_text=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON: Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "is not JSON: maximum recursion"),
        (b'["a"]', "is a JSON list, expected an object with field 'text'"),
        (b'{"body": "a", "id": 1}', "has no field 'text'; its fields are 'body', 'id'; set data.field"),
        (b"{}", "has no field 'text'; its fields are none"),
        (b'{"text": null}', "field 'text' is a null, expected text"),
        (b'{"text": 3}', "field 'text' is a number"),
        (b'{"text": "\\ud800"}', "field 'text' is not Unicode text"),
    ],
)
def test_lines_that_are_broken(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    refused(rf"a\.jsonl:3:? {message}", file, "jsonl")


def test_parquet_that_is_broken(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 or not")
    refused("a.parquet is not a readable Parquet file", file, "parquet")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), file)
    refused("has no column 'text'; its columns are 'body', 'n'", file, "parquet")
    refused("column 'n' is int64, expected string", file, "parquet", field="n")
    pq.write_table(pa.table({"text": ["a", "b", "c", None]}), file, row_group_size=2)
    refused("row 3 of column 'text' is null", file, "parquet")


def test_array_record_that_is_broken(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"not records")
    refused("a is not a readable ArrayRecord file: .*64KB", file, "array_record")
    write_array_record(file, [b"a", b"b"])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused("a is not a readable ArrayRecord file: cut off", file, "array_record")
    flipped = bytearray(whole)
    flipped[70] ^= 0xFF
    file.write_bytes(flipped)
    refused("a: record 0 cannot be read: Corrupted", file, "array_record")
    write_array_record(file, [b"\xff"])
    refused("a: record 0 is not UTF-8: invalid start byte at byte 0", file, "array_record")
    write_array_record(file, [b'{"body": "a"}'])
    refused("a: record 0 has no field 'text'; its fields are 'body'", file, "array_record")


def test_records_of_mixed_kinds_are_told_when_they_are_read(tmp_path):
    write_array_record(tmp_path / "a", [b'{"text": "a"}', b"plain"])
    documents = open_documents("array_record", str(tmp_path), pattern="*")
    with pytest.raises(DataError, match="a: record 1 is not JSON"):
        documents.read(1)
    refused("a: record 1 is not JSON", tmp_path, "array_record", max_bytes=100)
    write_array_record(tmp_path / "a", [b"plain", b'{"text": "a"}'])
    assert read_all(open_documents("array_record", str(tmp_path), pattern="*"))[1] == '{"text": "a"}'


@pytest.mark.parametrize("format", FORMATS[:2])
def test_files_that_change_during_the_run(tmp_path, format):
    write(tmp_path / "data", format)
    documents = open_format(tmp_path / "data", format)
    file = documents.files[0].path
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="bytes when it was opened, now"):
        documents.read(0)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        documents.read(0)


# --- Hashes ---------------------------------------------------------------------------------------


def test_large_files_are_hashed_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_HASH_LIMIT", 3 * sources.MIB)
    file = tmp_path / "a"
    content = bytearray(b"x" * (3 * sources.MIB))

    def entry():
        file.write_bytes(content)
        return sources.describe_file(file, "a")

    whole = entry()
    assert whole.hashed == "whole file"
    content += b"x"
    large = entry()
    assert large.hashed == "size, first and last MiB" and large.size == len(content)
    content[len(content) // 2] ^= 1
    assert entry() == large  # what is said of it is true
    for at in (0, -1):
        content[at] ^= 1
        assert entry().digest != large.digest
        content[at] ^= 1
    content.insert(len(content) // 2, 0)
    assert entry().digest != large.digest
