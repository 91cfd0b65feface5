"""What a Hub folder's tensors have to be: the model's table laid beside the names, shapes and dtypes of the files.

Conversion, loading and `fathom inspect` all compare here, from headers alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from checkpoints_tools.safetensors_io import TensorInfo
from fathom.hub import HubTensor, scale_shape

CONFIG_NAME = "config.json"
PLAIN_DTYPES = ("F32", "BF16", "F16")
INT_DTYPES = ("I64", "I32")
KIND_OF_DTYPE = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4", "F4": "fp4"}
SCALE_DTYPES = {"fp8": ("F8_E8M0", "F32"), "fp4": ("F8_E8M0",)}
MAX_UNFOUNDED_TENSORS = 1_000_000
"""A config is disbelieved when it describes this many tensors more than ten times those found."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where and how one weight lies in the files.

    Attributes:
      tensor: the model's entry. name: of the file's tensor; index: the piece of it.
      shape: of the piece as stored (FP4 in I8 has half the columns).
      dtype: as spelled in the file. kind: "plain", "fp8" or "fp4".
      scale: name of the tensor with its scales, None for plain ones.
    """

    tensor: HubTensor
    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: str
    scale: str | None


class Place(NamedTuple):
    """Where a native name lies: the file's tensor, the piece of it, that piece's shape, its dtype as spelled."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    dtype: str


Pieces = Callable[[str, tuple[int, ...]], list]
"""A model's `hub_pieces`: (name in any spelling, shape) -> [(native name, index of the piece)]."""


def size_problem(config: Any, found: int) -> str | None:
    """What is wrong with a config that describes absurdly more tensors than there are, before they are listed."""
    described = getattr(config, "num_layers", 0) * getattr(config, "num_experts", 0) * 3
    if described > MAX_UNFOUNDED_TENSORS + 10 * found:
        return f"{CONFIG_NAME} describes {described:,} expert tensors, the files hold {found:,}"
    return None


def find_places(
    tensors: Mapping[str, TensorInfo], pieces: Pieces | None
) -> tuple[dict[str, Place], list[str]]:
    """Native name -> where it lies, and the problems of spelling; without `pieces` the names are taken as they are."""
    places: dict[str, Place] = {}
    problems = []
    for name, info in tensors.items():
        try:
            found = pieces(name, info.shape) if pieces is not None else [(name, ())]
        except ValueError as error:
            problems.append(str(error))
            continue
        for native, index in found:
            if native in places:
                problems.append(f"{native}: found twice, as {places[native].name} and {name}")
            places[native] = Place(name, index, _indexed(info.shape, index), info.dtype)
    return places, problems


def _indexed(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    if not index:
        return shape
    kept = []
    for axis, size in enumerate(shape):
        entry = index[axis] if axis < len(index) else slice(None)
        if isinstance(entry, slice):
            kept.append(len(range(*entry.indices(size))))
    return tuple(kept)


def settle_mtp(config: Any, places: Mapping[str, Place]) -> tuple[Any, Mapping[str, Place], str | None]:
    """The config and the places of what can be had, and what is left out of the multi-token prediction, if anything.

    `transformers` saves models without it although their config still announces it; DSpark's stages are blocks that
    the model does not have.
    """
    announced = getattr(config, "num_mtp_layers", 0)
    if not announced:
        return config, places, None
    dspark = getattr(config, "mtp_kind", "mtp") == "dspark"
    changes = {"mtp_kind": "mtp", "dspark": None} if dspark else {}
    without = dataclasses.replace(config, num_mtp_layers=0, **changes)
    prefixes = getattr(config, "mtp_prefixes", ("mtp.",))
    found = [name for name in places if name.startswith(prefixes)]
    if dspark:
        kept = {name: place for name, place in places.items() if not name.startswith(prefixes)}
        return without, kept, (
            f"DSpark: {announced} stages of multi-token prediction ({len(found)} tensors), blocks that the model "
            "does not have; they are left out"
        )
    if found or not any(place.name.startswith("model.") for place in places.values()):
        return config, places, None
    return without, places, f"no multi-token prediction ({announced} layers announced), as transformers saves models"


def match_table(
    table: Iterable[HubTensor], places: Mapping[str, Place]
) -> tuple[dict[str, Stored], list[str]]:
    """Native name -> how each weight is stored, in the table's order, and every problem of the whole."""
    stored, problems, known = {}, [], set()
    for tensor in table:
        entry, found = _match(tensor, places)
        problems += found
        known.add(tensor.name)
        if entry is not None:
            stored[tensor.name] = entry
        if tensor.scale_name is not None and (entry is None or entry.kind != "plain"):
            known.add(tensor.scale_name)  # of a weight that itself is wrong, they are not a second problem
    problems += _mixed_storage(stored)
    problems += [
        f"{place.name}: left over, the model has no such tensor (shape {list(place.shape)})"
        for native, place in places.items()
        if native not in known
    ]
    return stored, problems


def _match(tensor: HubTensor, places: Mapping[str, Place]) -> tuple[Stored | None, list[str]]:
    """How a weight is stored, and what is wrong with it."""
    place = places.get(tensor.name)
    if place is None:
        return None, [f"{tensor.name}: missing, expected shape {list(tensor.shape)}"]
    kind = KIND_OF_DTYPE.get(place.dtype, "plain") if tensor.scale_name is not None else "plain"
    if tensor.storage == "i64":
        allowed = INT_DTYPES
    elif tensor.scale_name is None:
        allowed = PLAIN_DTYPES
    else:
        allowed = (*PLAIN_DTYPES, *KIND_OF_DTYPE)
    if place.dtype not in allowed:
        expected = " or ".join(allowed)
        return None, [f"{place.name}: found dtype {place.dtype}, expected {expected}"]
    problems = []
    expected = tensor.shape
    if kind == "fp4" and place.dtype != "F4":
        expected = (*tensor.shape[:-1], tensor.shape[-1] // 2)
    if place.shape != expected:
        problems.append(
            f"{place.name}: found shape {list(place.shape)}, expected {list(expected)} as {place.dtype}"
        )
    scale = None
    if kind != "plain":
        scale, found = _match_scale(tensor, kind, places)
        problems += found
    return Stored(tensor, place.name, place.index, place.shape, place.dtype, kind, scale), problems


def _match_scale(tensor: HubTensor, kind: str, places: Mapping[str, Place]) -> tuple[str | None, list[str]]:
    place = places.get(tensor.scale_name)
    if place is None:
        return None, [f"{tensor.scale_name}: missing, and {tensor.name} is stored as {kind}"]
    problems = []
    expected = scale_shape(tensor.shape, kind)
    if place.shape != expected:
        problems.append(
            f"{place.name}: found shape {list(place.shape)}, expected {list(expected)} for {kind}"
        )
    if place.dtype not in SCALE_DTYPES[kind]:
        problems.append(
            f"{place.name}: found dtype {place.dtype}, expected {' or '.join(SCALE_DTYPES[kind])} for {kind}"
        )
    return place.name, problems


def _mixed_storage(stored: Mapping[str, Stored]) -> list[str]:
    """Experts of one array must be stored alike: a few that differ are a damaged conversion."""
    groups: dict[tuple, list[Stored]] = {}
    for entry in stored.values():
        if ".experts." in entry.tensor.name:
            groups.setdefault((entry.tensor.path, entry.tensor.index[:-1]), []).append(entry)
    problems = []
    for entries in groups.values():
        counts = Counter(entry.dtype for entry in entries)
        usual, number = counts.most_common(1)[0]
        problems += [
            f"{entry.name}: found dtype {entry.dtype}, expected {usual} as {number} of the {len(entries)} "
            "weights beside it"
            for entry in entries
            if entry.dtype != usual
        ]
    return problems
