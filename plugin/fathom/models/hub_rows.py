"""What the models' Hub tables are made of: rows of the shapes that every model has, and where a layer's weights live.

Hub matrices are [out, in], ours [in, out...]. Hub names of matrices and norms are given without their ".weight",
and paths without their "weight". Letters: D hidden, F expert width, E experts, N heads of width H, R what they read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from fathom.hub import HubTensor, Layout

Path = tuple[str | int, ...]
Swiglu = tuple[str, str, str]
"""Hub names of gate, down and up projection; ours are w1, w2, w3."""
Piece = tuple[str, tuple[int | slice, ...]]


class Row(NamedTuple):
    """A `HubTensor` whose name, path and index are relative to a block."""

    name: str
    path: Path
    shape: tuple[int, ...]
    storage: str
    layout: Layout
    index: tuple[int, ...] = ()
    limit: int | None = None


def same(name: str, path: Path, storage: str, *shape: int, limit: int | None = None) -> Row:
    """Stored as it is used; name and path are whole."""
    return Row(name, path, shape, storage, Layout(shape, tuple(range(len(shape)))), limit=limit)


def norm(hub: str, ours: Path, width: int, storage: str = "bf16") -> Row:
    """A norm's weight [width]."""
    return same(f"{hub}.weight", (*ours, "weight"), storage, width)


def linear(hub: str, ours: Path, storage: str, out: int, inner: int) -> Row:
    """Hub [out, in] -> [in, out]."""
    return Row(f"{hub}.weight", (*ours, "weight"), (out, inner), storage, Layout((out, inner), (1, 0)))


def split(hub: str, ours: Path, shape: tuple[int, int], view: tuple[int, int, int], order: tuple[int, int, int]) -> Row:
    """Hub [out, in] of `shape`, one dimension taken apart as in `view` -> `view` transposed by `order`; FP8."""
    return Row(f"{hub}.weight", (*ours, "weight"), shape, "fp8", Layout(view, order))


def heads(hub: str, ours: Path, number: int, width: int, inner: int) -> Row:
    """Hub [N*H, R] -> [R, N, H]; FP8."""
    return split(hub, ours, (number * width, inner), (number, width, inner), (2, 0, 1))


def swiglu(hub: str, ours: Path, names: Swiglu, storage: str, dim: int, width: int) -> list[Row]:
    """Gate and up, Hub [F, D] -> [D, F], and down, Hub [D, F] -> [F, D]."""
    gate, down, up = names
    return [
        linear(f"{hub}.{gate}", (*ours, "w1"), storage, width, dim),
        linear(f"{hub}.{down}", (*ours, "w2"), storage, dim, width),
        linear(f"{hub}.{up}", (*ours, "w3"), storage, width, dim),
    ]


def experts(hub: str, ours: Path, names: Swiglu, storage: str, count: int, dim: int, width: int) -> list[Row]:
    """One Hub tensor per expert and matrix, all experts in one array [E, in, out] on our side, without "weight"."""
    rows = [row._replace(path=row.path[:-1]) for row in swiglu("", ours, names, storage, dim, width)]
    return [row._replace(name=f"{hub}.{expert}{row.name}", index=(expert,)) for expert in range(count) for row in rows]


def place(
    rows: Iterable[Row],
    hub: str = "",
    ours: Path = (),
    index: tuple[int, ...] = (),
    tensor: type[HubTensor] = HubTensor,
) -> list[HubTensor]:
    """The rows as tensors of one block: its names' prefix, its path and its index in the stack of layers."""
    return [
        tensor(hub + row.name, row.shape, row.storage, (*ours, *row.path), (*index, *row.index), row.layout, row.limit)
        for row in rows
    ]


def layer_place(config: Any, layer: int) -> tuple[Path, tuple[int, ...]]:
    """Where a layer lives: its path and its index in the stack (empty for an unrolled layer)."""
    plan = config.plan
    if layer in plan.prefix:
        return ("prefix", layer - plan.prefix.start), ()
    if layer in plan.suffix:
        return ("suffix", layer - plan.suffix.start), ()
    repeat, unit_index = divmod(layer - len(plan.prefix), plan.unit)
    return ("repeated", unit_index), (repeat,)


def fused_pieces(name: str, fused: re.Match[str], shape: tuple[int, ...], names: Swiglu) -> list[Piece]:
    """(native name, index into the array) of each weight in the fused experts of `transformers`' modules.

    They are `<experts>.gate_up_proj` [E, 2F, D] (gate first) and `<experts>.down_proj` [E, D, F].

    Args:
      name: as the file spells it, for the message.
      fused: groups 1 and 2 are the native name of the experts, and which of the two it is.

    Raises:
      ValueError: for another rank, or an odd number of gate and up rows.
    """
    if len(shape) != 3 or (fused[2] == "gate_up_proj" and shape[1] % 2):
        raise ValueError(f"{name}: found shape {shape}, expected [experts, rows, columns]")
    gate, down, up = names
    pieces: list[Piece] = []
    for expert in range(shape[0]):
        prefix = f"{fused[1]}.{expert}"
        if fused[2] == "down_proj":
            pieces.append((f"{prefix}.{down}.weight", (expert,)))
            continue
        half = shape[1] // 2
        pieces.append((f"{prefix}.{gate}.weight", (expert, slice(0, half))))
        pieces.append((f"{prefix}.{up}.weight", (expert, slice(half, None))))
    return pieces
