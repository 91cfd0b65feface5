#!/usr/bin/env python
"""Conversion of a synthetic DeepSeek-V4-Flash folder of few layers: time against a plain copy, and peak memory.

    scripts/bench/convert.py FOLDER [--layers 4] [--dtype native] [--keep]

FOLDER needs about four times the size of the model (Flash: 3.5 GB a layer). Each phase runs in a process of its own,
with the files' pages dropped before. The copy reads the same bytes and writes them, with as many threads, and syncs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoints_tools.safetensors_io import NUMPY_DTYPES, SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import Entry, ShardWriter, shard_name, write_index
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors

GIB = 1 << 30
KINDS = ("sliding", "sliding", "csa", "hca")


def make_config(layers: int) -> DeepseekV4Config:
    """Flash with fewer layers: two sliding ones, then CSA and HCA in turn; hash routers in the first three."""
    kinds = (*KINDS[:2], *(KINDS[2 + i % 2] for i in range(layers - 2)))[:layers]
    ratios = tuple({"sliding": 0, "csa": 4, "hca": 128}[kind] for kind in kinds)
    routers = tuple("hash" if i < 3 else "learned" for i in range(layers))
    return dataclasses.replace(
        DeepseekV4Config.flash(), attention_kinds=kinds, compress_ratios=ratios, router_kinds=routers
    )


def write_folder(folder: Path, config: DeepseekV4Config) -> int:
    """Released names, shapes and dtypes, one shard a layer, random bits; returns the bytes."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 126, 1 << 26, np.uint8)
    shards: dict[str, list] = {}
    for tensor in hub_tensors(config):
        parts = tensor.name.split(".")
        group = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0].startswith("embed")
        shards.setdefault(group, []).append(tensor)
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards.values(), 1):
        name = shard_name(number, len(shards))
        entries = [Entry(s.name, s.dtype, s.shape) for tensor in tensors for s in tensor.stored()]
        with ShardWriter(folder / name, entries) as shard:
            for entry in entries:
                shard.write(entry.name, fill(entry, noise, config))
        weight_map |= {entry.name: name for entry in entries}
        total += sum(entry.num_bytes for entry in entries)
    write_index(folder, weight_map, total)
    (folder / "config.json").write_text(json.dumps({**config.to_hf_config(), "expert_dtype": "fp4"}))
    return total


def fill(entry: Entry, noise: np.ndarray, config: DeepseekV4Config) -> np.ndarray:
    """Random bits that are sound: no NaN codes or scales, ids of experts there are."""
    if entry.dtype == "I64":
        return (np.arange(np.prod(entry.shape)) % config.num_experts).reshape(entry.shape)
    repeats = -(-entry.num_bytes // noise.size)
    data = np.tile(noise, repeats)[: entry.num_bytes] if repeats > 1 else noise[: entry.num_bytes]
    if entry.dtype == "F8_E8M0":
        data = 110 + data % 8
    return data.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)


def drop_pages(folder: Path) -> None:
    """Writes back and forgets what memory holds of a folder's files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(source: Path, destination: Path) -> float:
    """Seconds to read every file and write it again, synced."""
    destination.mkdir()
    begin = time.perf_counter()

    def one(path: Path) -> None:
        with path.open("rb") as read, (destination / path.name).open("wb") as write:
            while block := read.read(16 << 20):
                write.write(block)
            os.fsync(write.fileno())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, source.iterdir()))
    return time.perf_counter() - begin


def convert(*arguments: str) -> float:
    """Seconds of one conversion in a process of its own."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fathom", "convert", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def peak_memory() -> int:
    """Bytes the largest child has had resident."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def count_differences(one: Path, other: Path) -> int:
    """Tensors that are not in both folders with the same dtype, shape and bytes."""
    first, second = SafetensorsCheckpoint(one), SafetensorsCheckpoint(other)
    different = len(set(first.tensors) ^ set(second.tensors))
    for name in set(first.tensors) & set(second.tensors):
        a, b = first.tensors[name], second.tensors[name]
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        different += not (same and first.fetch(name).tobytes() == second.fetch(name).tobytes())
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="native", choices=("native", "bf16", "fp32"))
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    arguments = parser.parse_args()
    source, step, hub = (arguments.folder / name for name in ("hub", "step", "again"))
    for path in (step, hub, arguments.folder / "copy"):
        shutil.rmtree(path, ignore_errors=True)
    if not source.exists():
        write_folder(source, make_config(arguments.layers))
    total = sum(p.stat().st_size for p in source.iterdir())
    shard = max(p.stat().st_size for p in source.iterdir())
    print(f"{total / GIB:.2f} GiB in shards of up to {shard / GIB:.2f} GiB, {os.cpu_count()} cores", flush=True)
    drop_pages(source)
    floor = plain_copy(source, arguments.folder / "copy")
    print(f"copy         {floor:7.1f} s  {total / GIB / floor:.2f} GiB/s", flush=True)
    shutil.rmtree(arguments.folder / "copy")
    limit = 4 * GIB + 2 * shard
    phases = (
        ("to orbax", source, ("--to", "orbax", str(source), str(step), "--dtype", arguments.dtype)),
        ("to hf", step, ("--to", "hf", str(step), str(hub))),
    )
    for name, reads, command in phases:
        drop_pages(reads)
        seconds = convert(*command)
        os.sync()
        print(
            f"{name:<12} {seconds:7.1f} s  {seconds / floor:.2f} times the copy; peak memory "
            f"{peak_memory() / GIB:.2f} GiB of {limit / GIB:.2f} allowed",
            flush=True,
        )
    if arguments.dtype == "native":
        print(f"tensors that differ after the round trip: {count_differences(source, hub)}")
    if not arguments.keep:
        for path in (source, step, hub):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
