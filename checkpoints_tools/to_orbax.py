"""Hub folder -> a step folder that training restores: the plan, block by block, and doing it.

Each weight of the Hub becomes one or a few blocks of a stacked array, so that no array is ever held whole, any process
can write any block, and what is written stays written when a conversion is interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.array_store import ArraySpec, ArrayStore
from checkpoints_tools.hub_source import HubSource
from checkpoints_tools.hub_table import Stored
from checkpoints_tools.journal import Block, crc32_of
from checkpoints_tools.narrowing import Narrowing
from checkpoints_tools.safetensors_io import NUMPY_DTYPES
from fathom.hub import HubTensor, group_by_path, stacked_shape
from fathom.step_folder import MODEL, QUANTISED

DTYPES = ("native", "bf16", "fp32")
BLOCK_BYTES = 128 << 20
"""Larger weights are cut into several blocks, which bounds the memory of a conversion."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: one weight, or a region of it.

    Attributes:
      tensor: the weight. codes: copy codes and scales, instead of writing values.
      array: path of the values' array, or of the folder of "codes" and "scales".
      region: of the weight in our layout (values only).
      processes: that hold it on the mesh; one of them does it.
    """

    tensor: HubTensor
    codes: bool
    array: tuple[str, ...]
    region: tuple[slice, ...] | None
    processes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class OrbaxPlan:
    """Everything a conversion will write.

    Attributes:
      source: the Hub folder. dtype: "native", "bf16" or "fp32".
      arrays: item -> arrays. units: the work, in the Hub's order.
    """

    source: HubSource
    dtype: str
    arrays: Mapping[str, list[ArraySpec]]
    units: list[Unit]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.num_bytes for specs in self.arrays.values() for spec in specs)


def plan_orbax(
    source: HubSource, dtype: str, collections: Mapping[tuple, str], narrowing: Narrowing, cut: Any = None
) -> OrbaxPlan:
    """Plans a conversion.

    Args:
      source: the folder. dtype: of quantised weights in the result; "native" keeps their codes and scales, "fp32"
        widens all floats. Nothing else changes its dtype.
      collections: parameter path -> "params" or "model_state".
      narrowing: weights that shall be stored in fewer bits, by name.
      cut: a `MeshCut`, when blocks shall be those of a mesh's shards.

    Raises:
      ValueError: listing weights that cannot be kept in native storage.
    """
    arrays: dict[str, list[ArraySpec]] = {MODEL: [], QUANTISED: []}
    units: list[Unit] = []
    problems: list[str] = []
    for path, parts in group_by_path(s.tensor for s in source.stored.values()).items():
        name = tuple(map(str, path))
        lead, shape = stacked_shape("/".join(name), parts)
        stored = [source.stored[tensor.name] for tensor in parts.values()]
        kinds = {(s.kind, s.dtype if s.kind != "plain" else None) for s in stored}
        full = (collections[path], *name)
        if dtype == "native" and kinds != {("plain", None)}:
            if len(kinds) > 1:
                found = ", ".join(sorted(f"{kind} as {dtype or 'floats'}" for kind, dtype in kinds))
                problems.append(f"{'/'.join(name)}: its weights are stored in different ways ({found})")
                continue
            arrays[QUANTISED] += _code_arrays(source, full, lead, stored[0])
            units += [Unit(t, True, full, None, _owners(cut, path, i, ())) for i, t in parts.items()]
            continue
        target = _target_dtype(stored, dtype, narrowing)
        block = _block_shape(stored[0].tensor, target, cut.shards(path)[len(lead) :] if cut else None)
        arrays[MODEL].append(ArraySpec(full, shape, target, (1,) * len(lead) + block))
        for index, tensor in parts.items():
            for region in _regions(tensor.our_shape, block):
                units.append(Unit(tensor, False, full, region, _owners(cut, path, index, region)))
    if problems:
        raise ValueError(
            f"{source.path}: {len(problems)} arrays cannot keep their storage:\n  "
            + "\n  ".join(problems)
            + "\nconvert with --dtype bf16 or fp32"
        )
    order = {name: number for number, name in enumerate(source.stored)}
    units.sort(key=lambda unit: order[unit.tensor.name])
    return OrbaxPlan(source, dtype, {k: v for k, v in arrays.items() if v}, units)


def _owners(cut: Any, path: tuple, index: tuple[int, ...], region: tuple[slice, ...]) -> tuple[int, ...]:
    return () if cut is None else cut.owners(path, (*index, *(s.start for s in region)))


def _code_arrays(
    source: HubSource, path: tuple[str, ...], lead: tuple[int, ...], first: Stored
) -> list[ArraySpec]:
    """Codes as bytes, scales as bytes or float32, in the Hub's layout, stacked."""
    one = (1,) * len(lead)
    shape = first.shape if first.dtype != "F4" else (*first.shape[:-1], first.shape[-1] // 2)
    scale = source.files.tensors[first.scale]
    scale_dtype = np.dtype(np.float32 if scale.dtype == "F32" else np.uint8)
    return [
        ArraySpec((*path, "codes"), lead + shape, np.dtype(np.uint8), one + shape),
        ArraySpec((*path, "scales"), lead + scale.shape, scale_dtype, one + scale.shape),
    ]


def _target_dtype(stored: list[Stored], dtype: str, narrowing: Narrowing) -> np.dtype:
    """The narrowest dtype that holds all weights of an array exactly, as far as `dtype` leaves them exact."""
    wanted = {narrowing.apply(s.tensor.name, _stored_as(s, dtype)) for s in stored}
    if wanted == {"F16", "BF16"}:
        wanted = {"F32"}
    widest = max(wanted, key=lambda name: NUMPY_DTYPES[name].itemsize)
    return NUMPY_DTYPES[widest]


def _stored_as(stored: Stored, dtype: str) -> str:
    if stored.tensor.storage == "i64":
        return stored.dtype
    if dtype == "fp32":
        return "F32"
    return stored.dtype if stored.kind == "plain" else "BF16"


def _block_shape(
    tensor: HubTensor, dtype: np.dtype, shards: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The block of a weight in our layout: a shard of it where a mesh is given, of at most BLOCK_BYTES.

    It is cut along the dimension that comes from the Hub's rows, so that each block reads rows of its own.
    """
    block = list(tensor.our_shape)
    if shards is not None:
        block = [size // pieces for size, pieces in zip(block, shards, strict=True)]
    rows = tensor.layout.order.index(0) if block else 0
    pieces = math.ceil(math.prod(block) * dtype.itemsize / BLOCK_BYTES)
    if pieces > 1:
        block[rows] = max(1, math.ceil(block[rows] / pieces))
    return tuple(block)


def _regions(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, block, shape, strict=True)
        )


class OrbaxWriter:
    """Does the units of a plan.

    Args:
      plan: what to write. destination: the step folder.
    """

    def __init__(self, plan: OrbaxPlan, destination: Path):
        self.plan = plan
        self._stores = {item: ArrayStore(destination / item) for item in plan.arrays}
        self._specs = {spec.path: spec for specs in plan.arrays.values() for spec in specs}

    def create(self) -> None:
        """Makes all arrays, empty."""
        for item, specs in self.plan.arrays.items():
            for spec in specs:
                self._stores[item].create(spec)

    def keys(self, unit: Unit) -> list[tuple]:
        """Keys of the blocks that a unit writes."""
        if unit.codes:
            return [
                ("/".join((QUANTISED, *unit.array, part)), None, self._start(unit))
                for part in ("codes", "scales")
            ]
        return [("/".join((MODEL, *unit.array)), None, self._start(unit))]

    def _start(self, unit: Unit) -> tuple[int, ...]:
        inner = (0, 0) if unit.codes else tuple(s.start for s in unit.region)
        return (*unit.tensor.index, *inner)

    def run(self, unit: Unit) -> list[Block]:
        """Reads, decodes and writes one unit."""
        index = unit.tensor.index
        if not unit.codes:
            spec = self._specs[unit.array]
            values = self.plan.source.read(unit.tensor, spec.dtype, unit.region)
            return [self._write(MODEL, unit, unit.array, (*index, *unit.region), values)]
        codes, scales = self.plan.source.read_codes(unit.tensor)
        blocks = []
        for part, array in (("codes", codes), ("scales", scales)):
            path = (*unit.array, part)
            region = (*index, *(slice(0, size) for size in array.shape))
            raw = array.view(self._specs[path].dtype)
            blocks.append(self._write(QUANTISED, unit, path, region, raw))
        return blocks

    def _write(
        self, item: str, unit: Unit, path: tuple[str, ...], region: tuple[int | slice, ...], values: np.ndarray
    ) -> Block:
        values = np.ascontiguousarray(values)
        self._stores[item].write(path, region, values)
        lead = len(unit.tensor.index)
        start = (*region[:lead], *(s.start for s in region[lead:]))
        stop = (*(i + 1 for i in region[:lead]), *(s.stop for s in region[lead:]))
        name = "/".join((item, *path))
        return Block(unit.tensor.name, name, values.nbytes, crc32_of(values), start, stop)

    def written(self, block: Block) -> bool:
        """Whether a recorded block's file is still there."""
        item, *path = block.array.split("/")
        spec = self._specs[tuple(path)]
        chunk = [str(start // size) for start, size in zip(block.start, spec.block, strict=True)]
        file = self._stores[item].folder.joinpath(".".join(path), "c", *chunk)
        return file.is_file() and file.stat().st_size > block.num_bytes

    def finish(self) -> None:
        """Writes the metadata of the items, the last thing before the payload."""
        for item, specs in self.plan.arrays.items():
            self._stores[item].finish(specs)


def leaves_of(plan: OrbaxPlan) -> dict[str, dict[str, Any]]:
    """The payload's description of the arrays; every piece carries its own checksum."""
    return {
        "/".join((item, *spec.path)): {"shape": list(spec.shape), "dtype": spec.dtype.name, "checksum": None}
        for item, specs in plan.arrays.items()
        for spec in specs
    }


def unlike_dtypes(plan: OrbaxPlan) -> dict[str, str]:
    """Native name -> dtype as spelled in the source, for every weight whose array does not say it.

    Those of an array whose weights have different dtypes, and the codes and scales of quantised storage (the latter
    under the scale's name).
    """
    dtypes = {spec.path: spec.dtype for spec in plan.arrays.get(MODEL, [])}
    found = {}
    for unit in plan.units:
        stored = plan.source.stored[unit.tensor.name]
        if unit.codes:
            found[unit.tensor.name] = stored.dtype
            found[unit.tensor.scale_name] = plan.source.scale_dtype(unit.tensor)
        elif stored.kind == "plain" and NUMPY_DTYPES[stored.dtype] != dtypes[unit.array]:
            found[unit.tensor.name] = stored.dtype
    return found


def read_block(stores: dict[str, ArrayStore], folder: Path, block: Block) -> np.ndarray:
    """A block of a step folder, for verification."""
    item, *path = block.array.split("/")
    if item not in stores:
        stores[item] = ArrayStore(folder / item)
    region = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
    return stores[item].read(tuple(path), region)
