"""How a model's weights are named and stored on the Hub: one table per model, read in both
directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

FP8_BLOCK = 128
"""Rows and columns that share one scale in FP8 storage."""
FP4_BLOCK = 32
"""Columns that share one scale in FP4 storage."""

_ELEMENT_BYTES = {"bf16": 2, "f32": 4, "i64": 8}
_STORED_DTYPE = {"bf16": "BF16", "f32": "F32", "i64": "I64"}
STORAGE_KINDS = ("bf16", "f32", "i64", "fp8", "fp4")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A Hub array's elements in our order: reshape to `view`, then transpose by `order`. Exact both
    ways."""

    view: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape on our side."""
        return tuple(self.view[axis] for axis in self.order)

    def to_ours(self, hub: np.ndarray) -> np.ndarray:
        """Hub array -> ours, a view without a copy where strides allow."""
        return hub.reshape(self.view).transpose(self.order)

    def to_hub(self, ours: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `to_ours`; `shape` is the Hub's."""
        if ours.shape != self.our_shape:
            raise ValueError(f"array of shape {ours.shape}, expected {self.our_shape}")
        return ours.transpose(np.argsort(self.order)).reshape(shape)

    def hub_window(
        self, shape: tuple[int, ...], region: tuple[slice, ...]
    ) -> tuple[tuple[slice, ...], Layout, tuple[slice, ...]]:
        """What to read of a Hub array for a region of ours.

        Args:
          shape: the Hub's. region: one slice with start and stop for each dimension of ours.

        Returns:
          (slices of the Hub array, the layout of that part, slices of the part in our order): the
          part is contiguous along every Hub dimension, at most the region's bounding box.
        """
        wanted = [region[self.order.index(axis)] for axis in range(len(self.view))]
        outer, view, inner = [], list(self.view), list(wanted)
        axis = 0
        for size in shape:
            group, product = [], 1
            while axis < len(view) and (product < size or not group):
                group.append(axis)
                product *= view[axis]
                axis += 1
            # Only the slowest dimension of a group cuts the Hub's into one run.
            first, stride = group[0], math.prod(view[i] for i in group[1:])
            outer.append(slice(wanted[first].start * stride, wanted[first].stop * stride))
            view[first] = wanted[first].stop - wanted[first].start
            inner[first] = slice(0, view[first])
        part = Layout(tuple(view), self.order)
        return tuple(outer), part, tuple(inner[axis] for axis in self.order)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a released safetensors file (dtype spelled as there)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """One weight of a model: its name on the Hub and its place in ours.

    Attributes:
      name: the native Hub name.
      shape: the Hub's logical shape; FP4 storage packs two elements of the last axis in a byte.
      storage: how released files store it: "bf16", "f32", "i64", or "fp8" and "fp4", which have a
        companion tensor of block scales.
      path: the parameter's path in `nnx.state`.
      index: leading indices into that parameter (repetition of a scanned layer, expert); empty for
        all of it.
      layout: from the Hub's array to ours.
      limit: for "i64" tables, their integers are in [0, limit).

    "f32" and "i64" weights keep their type on our side (float32 and int32) whatever the parameter
    dtype.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    path: tuple[str | int, ...]
    index: tuple[int, ...]
    layout: Layout
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in STORAGE_KINDS:
            raise ValueError(
                f"{self.name}: storage {self.storage!r}, expected one of {STORAGE_KINDS}"
            )
        if math.prod(self.layout.view) != math.prod(self.shape):
            raise ValueError(f"{self.name}: view {self.layout.view} of shape {self.shape}")

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of this weight on our side, without the leading indices."""
        return self.layout.our_shape

    @property
    def scale_name(self) -> str | None:
        """Name of the companion scale tensor of quantised storage."""
        if self.storage not in ("fp8", "fp4"):
            return None
        return self.name.removesuffix(".weight") + ".scale"

    def to_ours(self, hub: np.ndarray) -> np.ndarray:
        """Hub array of `shape` -> our array of `our_shape` (a view where possible; dtype
        unchanged).

        Raises:
          ValueError: naming the tensor, when the shape is another.
        """
        if hub.shape != self.shape:
            raise ValueError(f"{self.name}: found shape {hub.shape}, expected {self.shape}")
        return self.layout.to_ours(hub)

    def to_hub(self, ours: np.ndarray) -> np.ndarray:
        """The exact inverse of `to_ours`.

        Raises:
          ValueError: naming the tensor, when the shape is not `our_shape`.
        """
        if ours.shape != self.our_shape:
            raise ValueError(
                f"{self.name}: found our shape {ours.shape}, expected {self.our_shape}"
            )
        return self.layout.to_hub(ours, self.shape)

    def stored(self) -> tuple[StoredTensor, ...]:
        """What released files hold for this weight: the tensor and, when quantised, its scales.

        FP8 is E4M3 with one E8M0 scale per 128 x 128 block; FP4 is two codes to an int8 with one
        E8M0 scale per 32 columns.
        """
        count = math.prod(self.shape)
        if self.storage in _ELEMENT_BYTES:
            dtype, size = _STORED_DTYPE[self.storage], _ELEMENT_BYTES[self.storage]
            return (StoredTensor(self.name, dtype, self.shape, count * size),)
        rows, columns = self.shape
        scale = scale_shape(self.shape, self.storage)
        if self.storage == "fp8":
            weight = StoredTensor(self.name, "F8_E4M3", self.shape, count)
        else:
            if columns % FP4_BLOCK:
                raise ValueError(
                    f"{self.name}: {columns} columns, FP4 storage needs a multiple of {FP4_BLOCK}"
                )
            weight = StoredTensor(self.name, "I8", (rows, columns // 2), count // 2)
        return (weight, StoredTensor(self.scale_name, "F8_E8M0", scale, math.prod(scale)))


def scale_shape(shape: tuple[int, ...], storage: str) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns] in "fp8" or "fp4" storage."""
    rows, columns = shape
    if storage == "fp8":
        return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    return rows, columns // FP4_BLOCK


def group_by_path(table: Iterable[HubTensor]) -> dict[tuple, dict[tuple[int, ...], HubTensor]]:
    """Parameter path -> leading index -> tensor."""
    grouped: dict[tuple, dict[tuple[int, ...], HubTensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.path, {})[tensor.index] = tensor
    return grouped


def stacked_shape(
    name: str, parts: Mapping[tuple[int, ...], HubTensor]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(leading dimensions, whole shape) of the parameter that some Hub tensors make.

    Raises:
      ValueError: naming the parameter, when an index is missing or the tensors differ in shape.
    """
    first = next(iter(parts.values()))
    lead = tuple(max(index[axis] for index in parts) + 1 for axis in range(len(first.index)))
    shapes = {tensor.our_shape for tensor in parts.values()}
    if len(parts) != math.prod(lead) or len(shapes) != 1:
        raise ValueError(
            f"parameter {name}: {len(parts)} Hub tensors of shapes {sorted(shapes)} do not fill {lead}"
        )
    return lead, lead + first.our_shape
