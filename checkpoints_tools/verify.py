"""Recomputing the checksums of a converted checkpoint, on either side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoints_tools.array_store import ArrayStore
from checkpoints_tools.journal import MANIFEST, Block, crc32_of, read_manifest
from checkpoints_tools.safetensors_io import SafetensorsError, SafetensorsFile
from checkpoints_tools.to_orbax import read_block


def verify(path: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> list[str]:
    """Reads everything a conversion wrote and compares it with the manifest.

    Args:
      path: the destination of a conversion. progress: called with the bytes of every block that was read.

    Returns:
      One text per block that is missing, unreadable or different; none when all is well.

    Raises:
      FileNotFoundError: without a manifest. ValueError: when the manifest is damaged.
    """
    folder = Path(path)
    about, blocks = read_manifest(folder)
    read = _step_reader(folder) if about["to"] == "orbax" else _hub_reader(folder)

    def one(block: Block) -> list[str]:
        found = list(_check(block, read))
        if progress is not None:
            progress(block.num_bytes)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for found in pool.map(one, blocks) for problem in found]


def has_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is the complete destination of a conversion."""
    return (Path(path) / MANIFEST).is_file()


def _check(block: Block, read: Callable[[Block], np.ndarray]) -> Iterator[str]:
    where = block.array if block.name is None else f"{block.array}: {block.name}"
    try:
        data = read(block)
    except (ValueError, KeyError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        yield f"{where}: {block.tensor} cannot be read ({type(error).__name__}: {first})"
        return
    found = crc32_of(data)
    if data.nbytes != block.num_bytes or found != block.crc32:
        yield (
            f"{where}: {block.tensor}: found {data.nbytes} bytes with CRC-32 {found:08x}, expected "
            f"{block.num_bytes} with {block.crc32:08x}"
        )


def _step_reader(folder: Path) -> Callable[[Block], np.ndarray]:
    stores: dict[str, ArrayStore] = {}
    return lambda block: read_block(stores, folder, block)


def _hub_reader(folder: Path) -> Callable[[Block], np.ndarray]:
    files: dict[str, SafetensorsFile] = {}

    def read(block: Block) -> np.ndarray:
        if block.array not in files:
            path = folder / block.array
            if not path.is_file():
                raise SafetensorsError(f"{path} is missing")
            files[block.array] = SafetensorsFile(path)
        return files[block.array].fetch(block.name)

    return read
