"""The arrays of a step folder, block by block: written as orbax lays them out, and read however it wrote them.

Orbax saves arrays that live on devices; a conversion never holds one whole. Each array is a Zarr v3 folder of
files, one file per written block, cut inside into pieces with a CRC-32C each, so that a reader fetches only the
pieces its shard needs and no flipped bit goes unnoticed.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

PIECE_BYTES = 4 << 20
"""Largest piece that is read at once; smaller ones cost more requests, larger ones more unneeded bytes."""

ITEM_FILES = ("_METADATA", "_sharding", "array_metadatas")
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


class ArraySpec(NamedTuple):
    """An array to be written: names of the tree's levels, shape, numpy dtype, shape of one written block."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by name, those of `ml_dtypes` included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def piece_shape(block: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """A shape that divides a block evenly and holds at most PIECE_BYTES where halving reaches that."""
    piece = list(block)
    while math.prod(piece) * itemsize > PIECE_BYTES:
        axis = next((i for i, size in enumerate(piece) if size % 2 == 0), None)
        if axis is None:
            break
        piece[axis] //= 2
    return tuple(piece)


class ArrayStore:
    """The arrays of one item ("model", "quantised") of a step folder.

    Args:
      folder: the item's folder. cache_bytes: of decoded pieces kept in memory, for readers that visit one piece
        several times.
    """

    def __init__(self, folder: Path, *, cache_bytes: int = 0):
        self.folder = Path(folder)
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "file_io_sync": False,  # the conversion syncs once, before it says it is complete
            }
        )
        self._open: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()
        self._ocdbt: bool | None = None

    def create(self, spec: ArraySpec) -> None:
        """Makes an array, or opens the one that is there when it is the same.

        Raises:
          ValueError: (TensorStore's) when another array has the name.
        """
        piece = piece_shape(spec.block, spec.dtype.itemsize)
        inner = {"chunk_shape": list(piece), "codecs": [_BYTES, _CRC], "index_codecs": [_BYTES, _CRC]}
        metadata = {
            "shape": list(spec.shape),
            "data_type": spec.dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.block)}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        }
        # Blocks of zeros (a fresh router bias) are files too: that a block is there says that it was written.
        opened = ts.open(
            {
                "driver": "zarr3",
                "kvstore": self._kvstore(spec.path, False),
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,
            },
            context=self._context,
            create=True,
            open=True,
        ).result()
        with self._lock:
            self._open[spec.path] = opened

    def _kvstore(self, path: tuple[str, ...], ocdbt: bool) -> dict[str, Any]:
        name = ".".join(path)
        if ocdbt:
            base = {"driver": "file", "path": f"{self.folder}/"}
            return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return {"driver": "file", "path": f"{self.folder}/{name}/"}

    def array(self, path: tuple[str, ...]) -> Any:
        """The TensorStore of an array; FileNotFoundError or ValueError when it is missing or damaged."""
        with self._lock:
            found = self._open.get(path)
        if found is not None:
            return found
        if self._ocdbt is None:
            self._ocdbt = bool(self.metadata()["use_ocdbt"])
        driver = "zarr3" if self.metadata()["use_zarr3"] else "zarr"
        spec = {"driver": driver, "kvstore": self._kvstore(path, self._ocdbt)}
        opened = ts.open(spec, context=self._context, open=True, read=True).result()
        with self._lock:
            self._open[path] = opened
        return opened

    def metadata(self) -> dict[str, Any]:
        """Orbax's description of the item."""
        return json.loads((self.folder / "_METADATA").read_text("utf-8"))

    def write(self, path: tuple[str, ...], region: tuple[int | slice, ...], values: np.ndarray) -> None:
        """Writes a region made of whole blocks."""
        self.array(path)[region].write(values).result()

    def read(self, path: tuple[str, ...], region: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A region of an array, in memory of its own."""
        return np.asarray(self.array(path)[region].read().result() if region else self.array(path).read().result())

    def finish(self, arrays: Iterable[ArraySpec]) -> None:
        """Writes what orbax wants to find beside the arrays."""
        tree, metadatas = {}, []
        for spec in arrays:
            keys = [{"key": key, "key_type": 2} for key in spec.path]
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(spec.block)}
            tree[str(tuple(spec.path))] = {"key_metadata": keys, "value_metadata": value}
            inner = {
                "param_name": ".".join(spec.path),
                "write_shape": list(spec.block),
                "chunk_shape": list(piece_shape(spec.block, spec.dtype.itemsize)),
                "ext_metadata": None,
            }
            metadatas.append({"array_metadata": inner})
        about = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        folder = self.folder / "array_metadatas"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "process_0").write_text(json.dumps({"array_metadatas": metadatas}), "utf-8")
        (self.folder / "_METADATA").write_text(json.dumps(about), "utf-8")


def step_metadata(items: Sequence[str], custom: dict[str, Any], nanoseconds: int) -> dict[str, Any]:
    """The content of `_CHECKPOINT_METADATA`: with it a step folder is complete.

    Args:
      items: names of the item folders. custom: the payload and its checksum. nanoseconds: when it was made.
    """
    return {
        "item_handlers": dict.fromkeys(items, _HANDLER),
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": nanoseconds,
        "commit_timestamp_nsecs": nanoseconds,
        "custom_metadata": custom,
    }
