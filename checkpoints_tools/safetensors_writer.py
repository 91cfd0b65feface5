"""Writing safetensors files and folders: shard by shard, each complete under its name or not there."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints_tools.safetensors_io import (
    DTYPE_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsError,
    bits_per_element,
    check_name,
)


class Entry(NamedTuple):
    """A tensor to be written: its dtype as spelled in the file, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * bits_per_element(self.dtype) // 8


class ShardWriter:
    """One safetensors file whose tensors come in any order, from any thread.

    The data goes to a temporary name beside the file; `close` renames it, once every tensor is there. Tensors
    lie in the reference implementation's order: widest elements first, then by name.

    Args:
      path: the file. entries: everything it will hold. metadata: the header's text entries.
      suffix: of the temporary name; writers of one file at the same time need different ones.

    Raises:
      SafetensorsError: for a name that the format does not have, or FP4 of an odd element count.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        entries: Iterable[Entry],
        metadata: Mapping[str, str] | None = None,
        suffix: str | None = None,
    ):
        self.path = Path(path)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._entries: dict[str, tuple[Entry, int]] = {}
        end = 0
        for entry in sorted(entries, key=lambda e: (-max(8, bits_per_element(e.dtype)), e.name)):
            check_name(entry.name, str(self.path))
            if math.prod(entry.shape) * bits_per_element(entry.dtype) % 8:
                raise SafetensorsError(
                    f"{self.path}: tensor {entry.name!r} of shape {entry.shape}: FP4 needs an even "
                    "element count"
                )
            begin, end = end, end + entry.num_bytes
            self._entries[entry.name] = (entry, begin)
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self._entries)
        self._partial = self.path.with_name(f"{self.path.name}.partial-{suffix or os.getpid()}")
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write_at(memoryview(struct.pack("<Q", len(text)) + text), 0)

    def write(self, name: str, array: np.ndarray) -> np.ndarray:
        """Writes one tensor: an array of its dtype and shape, or for FP4 the packed bytes.

        Returns:
          The bytes that were written, uint8.

        Raises:
          SafetensorsError: when the array is not what was announced.
        """
        entry, begin = self._entries[name]
        packed = _pack_f4(array) if DTYPE_NAMES.get(array.dtype) == "F4" else array
        found = DTYPE_NAMES.get(array.dtype)
        raw = entry.dtype == "F4" and array.dtype == np.uint8
        if not raw and (found != entry.dtype or array.shape != entry.shape):
            raise SafetensorsError(
                f"{self.path}: tensor {name!r} is {found or array.dtype} {list(array.shape)}, "
                f"expected {entry.dtype} {list(entry.shape)}"
            )
        data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
        if data.size != entry.num_bytes:
            raise SafetensorsError(f"{self.path}: tensor {name!r}: {data.size} bytes, expected {entry.num_bytes}")
        self._write_at(data.data, self._start + begin)
        self._missing.discard(name)
        return data

    def _write_at(self, data: memoryview, offset: int) -> None:
        data = data.cast("B")
        while len(data):
            count = os.pwrite(self._file, data[: 1 << 30], offset)
            data, offset = data[count:], offset + count

    def close(self) -> None:
        """Syncs and gives the file its name. Raises SafetensorsError when a tensor was never written."""
        if self._missing:
            missing = ", ".join(sorted(self._missing)[:5])
            self.abandon()
            raise SafetensorsError(f"{self.path}: {len(self._missing)} tensors not written, among them {missing}")
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        self._partial.replace(self.path)

    def abandon(self) -> None:
        """Removes what was written, unless `close` has completed it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *exc_info: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _pack_f4(values: np.ndarray) -> np.ndarray:
    codes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2)
    return (codes[:, 0] & 0xF) | (codes[:, 1] << 4)


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file: to a temporary name beside it, synced, then renamed.

    Raises:
      SafetensorsError: for a name or a dtype that the format does not have.
    """
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPE_NAMES:
            raise SafetensorsError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, expected one of "
                f"{', '.join(map(str, DTYPE_NAMES))}"
            )
    entries = [Entry(name, DTYPE_NAMES[array.dtype], array.shape) for name, array in arrays.items()]
    with ShardWriter(path, entries, metadata) as shard:
        for name, array in arrays.items():
            shard.write(name, array)


def shard_name(number: int, count: int) -> str:
    """File name of a shard, numbered from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes the index of a sharded folder, complete or not at all."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    partial = folder / f".{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    partial.replace(folder / INDEX_NAME)


def write_folder(
    folder: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a Hub-format folder: one file, or shards with an index when they exceed
    `max_shard_bytes`.

    Args:
      folder: made when it does not exist.
      config: written as `config.json`.
      max_shard_bytes: a shard closes before the tensor that would take it past this size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, array in tensors.items():
        array = np.asarray(array)
        if max_shard_bytes is not None and shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size, total = size + array.nbytes, total + array.nbytes
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    if len(shards) == 1:
        write_file(folder / SINGLE_NAME, shards[0], {"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = shard_name(number, len(shards))
        write_file(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_index(folder, weight_map, total)
