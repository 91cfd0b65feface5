"""Prints how tokenizing and reading ArrayRecord files go with more threads, on this machine's cores.

    python scripts/bench/tokenizing.py [--tokenizer tokenizer.json] [--threads 1 2 4]

Text: the Python files of the standard library, in pieces of 4,000 characters; a byte-level BPE of 32,000 tokens is
trained on them unless a tokenizer is given. The time for a file at the start is that of hashing and opening it.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tokenizers

from fathom.train import array_records
from fathom.train.sources import open_documents
from fathom.train.tokenizers import FileTokenizer

SPECIAL = "</s>"


def pieces(length: int = 4000, limit: int = 3000) -> list[str]:
    """Text to tokenize."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text("utf-8", errors="ignore") for file in files]
    return [text[i : i + length] for text in texts for i in range(0, len(text), length)][:limit]


def train(folder: Path, texts: list[str]) -> str:
    """Path of a tokenizer.json for the texts."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def rate(function, items: list, threads: int) -> tuple[float, float, list]:
    """(items a second, cores used, results)."""
    with ThreadPoolExecutor(threads) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        results = list(pool.map(function, items))
        wall = time.perf_counter() - start
    return len(items) / wall, (time.process_time() - cpu) / wall, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--records", type=int, default=300_000, help="of the ArrayRecord file")
    args = parser.parse_args()
    texts = pieces()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = FileTokenizer(args.tokenizer or train(Path(folder), texts))
        alone = tokenizer._tokenizer  # what a call without a batch does
        ways = {
            "one by one": lambda text: np.array(alone.encode(text, add_special_tokens=False).ids, np.int32),
            "FileTokenizer": tokenizer.encode,
        }
        total, base = sum(len(ids) for ids in map(tokenizer.encode, texts)), None
        for threads in args.threads:
            for name, way in ways.items():
                speed, cores, _ = rate(way, texts, threads)
                base = base or speed
                print(
                    f"{name}, {threads} threads: {speed / len(texts) * total / 1e6:.2f}M tokens/s, "
                    f"{speed / base:.2f} times, {cores:.2f} cores"
                )
        records(Path(folder) / "a.array_record", args)


def records(path: Path, args: argparse.Namespace) -> None:
    """The time for a file at the start, and for a record."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(args.records):
        writer.write(b"%d " % i * 20)
    writer.close()
    start = time.perf_counter()
    array_records._describe((path, path.name))
    print(f"a file of {args.records} records: {1e3 * (time.perf_counter() - start):.1f} ms at the start")
    documents = open_documents("array_record", str(path), pattern="*")
    indices = np.random.default_rng(0).integers(0, args.records, 5000).tolist()
    for threads in args.threads:
        speed, cores, _ = rate(documents.read, indices, threads)
        print(f"reading, {threads} threads: {1e6 / speed:.0f} us a record, {cores:.2f} cores")


if __name__ == "__main__":
    main()
