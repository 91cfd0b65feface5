"""Safetensors files and sharded folders: a memory-mapped, typed reader, without
PyTorch.

The reader refuses every malformed file that the reference implementation refuses, and names that
try to leave their folder. BF16, FP8 and FP4 come back as `ml_dtypes` types.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's bound
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_LISTED = 200

NUMPY_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F4": ml_dtypes.float4_e2m1fn,
    }.items()
}
"""Dtype as spelled in the file -> numpy dtype. F4 holds two elements a byte, the even one in the
low bits."""
DTYPE_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class SafetensorsError(ValueError):
    """A malformed file or folder. The text names the file, the tensor, what was found and
    expected."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One header entry: dtype as spelled in the file, and the byte range `[begin, end)` of the
    data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def bits_per_element(dtype: str) -> int:
    """Bits of one element of a safetensors dtype."""
    return 4 if dtype == "F4" else 8 * NUMPY_DTYPES[dtype].itemsize


def list_problems(problems: Iterable[str]) -> str:
    """Problems as lines; past MAX_LISTED only their number."""
    problems = list(problems)
    lines = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  and {len(problems) - MAX_LISTED} more")
    return "\n".join(lines)


class SafetensorsFile:
    """One memory-mapped file; the header is checked on opening, data is read when asked for.

    Attributes:
      path: the file.
      tensors: name -> TensorInfo, in the header's order.
      metadata: the header's text entries.

    Raises:
      SafetensorsError: for a malformed file. OSError when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < 8:
            raise self._error(f"found {size} bytes, expected at least the 8 of the header length")
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._map[:8])
        if length > MAX_HEADER_BYTES:
            raise self._error(f"header length {length}, expected at most {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise self._error(f"header length {length}, but the file has {size - 8} bytes after it")
        self._data_start = 8 + length
        self.metadata, self.tensors = self._parse(self._map[8 : self._data_start])
        self._check_layout(size - self._data_start)

    def _error(self, text: str) -> SafetensorsError:
        return SafetensorsError(f"{self.path}: {text}")

    def _parse(self, raw: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            table = dict(pairs)
            if len(table) != len(pairs):
                seen: set[str] = set()
                twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})
                raise SafetensorsError(f"keys given twice: {', '.join(twice[:MAX_LISTED])}")
            return table

        if not raw.startswith(b"{"):
            raise self._error(f"header begins with {raw[:1]!r}, expected b'{{'")
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        except SafetensorsError as error:
            raise self._error(str(error)) from None
        except (ValueError, RecursionError) as error:
            raise self._error(f"header is not JSON: {error}") from None
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
            raise self._error("__metadata__ must map text to text")
        return metadata, {name: self._info(name, entry) for name, entry in header.items()}

    def _info(self, name: str, entry: Any) -> TensorInfo:
        check_name(name, str(self.path))
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(
                f"tensor {name!r}: found {entry!r}, expected dtype, shape and data_offsets"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
            raise self._error(
                f"tensor {name!r}: dtype {dtype!r}, expected one of {', '.join(NUMPY_DTYPES)}"
            )
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
                raise self._error(f"tensor {name!r}: {what} {numbers!r}, expected numbers from 0")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"tensor {name!r}: data_offsets {offsets}, expected [begin, end]")
        bits = math.prod(shape) * bits_per_element(dtype)
        if bits >= 2**67 or bits % 8 or bits // 8 != offsets[1] - offsets[0]:
            raise self._error(
                f"tensor {name!r}: found {offsets[1] - offsets[0]} bytes at {offsets}, expected "
                f"{bits / 8:g} for {dtype} {shape}"
            )
        return TensorInfo(name, dtype, tuple(shape), *offsets)

    def _check_layout(self, data_bytes: int) -> None:
        """The tensors cover the data exactly: no overlap, no hole, nothing beyond the end."""
        end = 0
        for info in sorted(self.tensors.values(), key=lambda info: (info.begin, info.end)):
            if info.begin != end:
                what = "overlaps the one before" if info.begin < end else "leaves a hole"
                raise self._error(
                    f"tensor {info.name!r} begins at {info.begin} and {what}, expected {end}"
                )
            end = info.end
        if end != data_bytes:
            raise self._error(
                f"found {data_bytes} bytes of data, expected {end}: the file is "
                f"{'cut off' if end > data_bytes else 'too long'}"
            )

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the file's pages (F4 is unpacked, so copied).

        Raises:
          KeyError: when there is no tensor of that name.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        info = self.tensors[name]
        raw = np.frombuffer(
            self._map, np.uint8, count=info.num_bytes, offset=self._data_start + info.begin
        )
        if info.dtype == "F4":
            return _unpack_f4(raw).reshape(info.shape)
        return raw.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)


    def fetch(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A part of a tensor, read into memory of its own: large files then leave no mapped pages behind.

        Args:
          name: of the tensor. index: integers, then slices, of its leading dimensions. Only the bytes of the
            leading run are read, the rest of the index picks from them.

        Returns:
          The array; of F4 tensors the packed bytes, uint8 [..., columns / 2].

        Raises:
          KeyError: when there is no tensor of that name. SafetensorsError: when the file was cut off since.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        info = self.tensors[name]
        dtype, shape = NUMPY_DTYPES[info.dtype], info.shape
        if info.dtype == "F4":
            dtype, shape = np.dtype(np.uint8), (*shape[:-1], shape[-1] // 2)
        offset, rest = 0, list(index)
        while rest and isinstance(rest[0], int):
            offset += rest.pop(0) * math.prod(shape[1:])
            shape = shape[1:]
        if rest and shape:
            start, stop, _ = rest.pop(0).indices(shape[0])
            offset += start * math.prod(shape[1:])
            shape = (stop - start, *shape[1:])
            rest.insert(0, slice(None))
        count = math.prod(shape)
        out = np.empty(count * dtype.itemsize, np.uint8)
        self._read_into(memoryview(out), self._data_start + info.begin + offset * dtype.itemsize)
        return out.view(dtype).reshape(shape)[tuple(rest)]

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while len(buffer):
                count = file.readinto(buffer)
                if not count:
                    raise self._error(f"ends at byte {offset}, expected {len(buffer)} more; was it changed?")
                buffer, offset = buffer[count:], offset + count


def check_name(name: str, where: str) -> None:
    """Refuses tensor and shard names that could leave their folder when used as a path."""
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        raise SafetensorsError(
            f"{where}: name {name!r}, expected one that is not empty, not absolute and has no '..'"
        )


def _unpack_f4(raw: np.ndarray) -> np.ndarray:
    codes = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)
    return codes.view(ml_dtypes.float4_e2m1fn)


class SafetensorsCheckpoint:
    """One file, or a folder of shards with an index, read as one mapping from name to tensor.

    Attributes:
      path: what was opened.
      files: the shards.
      tensors: name -> TensorInfo over all shards.

    Raises:
      SafetensorsError: listing every disagreement between index and shards at once.
      FileNotFoundError: when there is nothing to read at the path.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        if not self.path.is_dir():
            self.files = [SafetensorsFile(self.path)]
        elif (self.path / INDEX_NAME).exists():
            self.files = self._open_shards(self._read_index())
        else:
            self.files = [SafetensorsFile(self._only_file())]
        self._file_of = {name: file for file in self.files for name in file.tensors}
        self.tensors: dict[str, TensorInfo] = {
            name: info for file in self.files for name, info in file.tensors.items()
        }

    def _only_file(self) -> Path:
        single = self.path / SINGLE_NAME
        found = sorted(self.path.glob("*.safetensors"))
        if single in found or len(found) == 1:
            return single if single in found else found[0]
        if found:
            raise SafetensorsError(
                f"{self.path}: found {len(found)} safetensors files and no {INDEX_NAME}; "
                "add the index that says which tensor is where"
            )
        pickled = [
            p.name for p in sorted(self.path.iterdir()) if p.suffix in (".bin", ".pt", ".pth")
        ]
        hint = f"; {', '.join(pickled)} is pickled, which is never read" if pickled else ""
        raise FileNotFoundError(f"{self.path}: found no *.safetensors file{hint}")

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX_NAME
        try:
            weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SafetensorsError(f"{path}: expected JSON with a weight_map: {error!r}") from None
        if not isinstance(weight_map, dict) or any(
            not isinstance(shard, str) for shard in weight_map.values()
        ):
            raise SafetensorsError(f"{path}: weight_map must map tensor names to file names")
        return weight_map

    def _open_shards(self, weight_map: dict[str, str]) -> list[SafetensorsFile]:
        problems: list[str] = []
        files: list[SafetensorsFile] = []
        home: dict[str, str] = {}
        for shard in sorted(set(weight_map.values())):
            if set(shard) & set("/\\\0") or not shard.endswith(".safetensors"):
                problems.append(f"shard {shard!r}, expected the name of a *.safetensors file beside {INDEX_NAME}")
                continue
            if not (self.path / shard).exists():
                problems.append(f"shard {shard} is missing")
                continue
            try:
                file = SafetensorsFile(self.path / shard)
            except SafetensorsError as error:
                problems.append(str(error))
                continue
            files.append(file)
            for name in file.tensors:
                if name in home:
                    problems.append(f"tensor {name!r} is in both {home[name]} and {shard}")
                home[name] = shard
        broken = set(weight_map.values()) - {file.path.name for file in files}
        for name, shard in weight_map.items():
            if shard not in broken and home.get(name) != shard:
                found = f"found it in {home[name]}" if name in home else "it is in no shard"
                problems.append(f"tensor {name!r}: the index says {shard}, {found}")
        problems += [
            f"tensor {name!r} of {shard} is not in the index"
            for name, shard in home.items()
            if name not in weight_map
        ]
        if problems:
            raise SafetensorsError(
                f"{self.path}: index and shards disagree:\n{list_problems(problems)}"
            )
        return files

    def read(self, name: str) -> np.ndarray:
        """The tensor, as `SafetensorsFile.read`. Raises KeyError when there is none of that
        name."""
        if name not in self._file_of:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        return self._file_of[name].read(name)

    def fetch(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A part of a tensor in memory of its own, as `SafetensorsFile.fetch`."""
        if name not in self._file_of:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        return self._file_of[name].fetch(name, index)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name].path
