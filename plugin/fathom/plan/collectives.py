"""What crosses between devices in one step: every collective of the compiled program, as often as it runs.

Bytes are what one device sends, under the ring algorithms that the optimal schedules of a torus amount to; a group of g
devices: all-gather (g - 1) x its input, reduce-scatter (g - 1) / g x its input, all-reduce twice that, all-to-all
(g - 1) / g x its input, collective-permute its input. Between slices they are what at least leaves a slice.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.unknown_fields import UnknownFieldSet

from fathom.plan.between_slices import crossing_bytes, exchange_of
from fathom.plan.hlo_proto import NEWEST_FIELD, shape_bytes

logger = logging.getLogger(__name__)

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one kind of collective sends along one set of mesh axes.

    Attributes:
      kind: "all-gather", ... axes: mesh axes whose coordinates differ within a group, e.g. ("fsdp", "expert"); between
        slices those that span the group's slices.
      runs: executions in a step. sent_bytes: of one device, over all of them. between_slices: whether they leave the
        slice.
    """

    kind: str
    axes: tuple[str, ...]
    runs: float
    sent_bytes: float
    between_slices: bool = False


def step_traffic(
    module: Any, mesh_shape: Mapping[str, int], loops: float = 1.0, across: Mapping[str, int] | None = None
) -> list[Traffic]:
    """The collectives of a compiled step, the heaviest first.

    Args:
      module: as `fathom.plan.hlo_proto` reads it. mesh_shape: mesh axis -> size, in the mesh's order.
      loops: how often a loop is taken to run whose number of trips depends on the data.
      across: mesh axis -> how many slices it spans (`fathom.mesh.across_slices`); one slice unless given.

    Raises:
      ValueError: for groups of devices in a form that is not known here.
    """
    walk = _Walk(module, mesh_shape, loops, across or dict.fromkeys(mesh_shape, 1))
    walk.computation(module.entry_computation_id, 1.0)
    found = [Traffic(kind, axes, *totals, between) for (kind, axes, between), totals in walk.totals.items()]
    return sorted(found, key=lambda traffic: -traffic.sent_bytes)


class _Walk:
    """Adds up the collectives of a computation and of those that it calls."""

    def __init__(self, module: Any, mesh_shape: Mapping[str, int], loops: float, across: Mapping[str, int]):
        self.computations = {c.id: c for c in module.computations}
        self.loops, self.across = loops, across
        self.devices = math.prod(mesh_shape.values())
        self.slice_shape = {axis: size // across[axis] for axis, size in mesh_shape.items()}
        self.totals: dict[tuple, tuple[float, float]] = collections.defaultdict(lambda: (0.0, 0.0))

    def computation(self, number: int, times: float) -> None:
        computation = self.computations[number]
        by_id = {i.id: i for i in computation.instructions}
        for instruction in computation.instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                self.collective(kind, instruction, by_id, computation, times)
            elif instruction.opcode == "send":
                self.send(instruction, by_id, times)
            called = list(instruction.called_computation_ids)
            if instruction.opcode == "while":
                trips = trip_count(self.computations, instruction, by_id)
                before = sum(runs for runs, _ in self.totals.values())
                self.computation(called[0], times * (self.loops if trips is None else trips))
                if trips is None and sum(runs for runs, _ in self.totals.values()) != before:
                    logger.warning(
                        "%s: how often it runs does not follow from constants, and it holds collectives: they are "
                        "counted as if it ran %g times", instruction.name, self.loops,
                    )  # fmt: skip
            elif instruction.opcode == "conditional":
                for branch in called:  # which one runs depends on the device or the data
                    self.computation(branch, times / len(called))
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for part in called:
                    self.computation(part, times)

    def collective(self, kind: str, instruction: Any, by_id: Mapping[int, Any], computation: Any, times: float) -> None:
        groups = _groups(instruction, math.prod(self.slice_shape.values()))
        axes = _axes(groups, self.slice_shape)
        size = len(groups[0])
        given = _given(instruction, by_id)
        if kind == "all-reduce" and _is_scattered(instruction, computation):
            kind = "reduce-scatter"
        share = (size - 1) / size
        sent = {
            "all-gather": given * (size - 1),
            "all-reduce": 2 * given * share,
            "collective-permute": given,
        }.get(kind, given * share)
        self.add(kind, axes, False, times, sent)

    def send(self, instruction: Any, by_id: Mapping[int, Any], times: float) -> None:
        exchange = exchange_of(instruction)
        if exchange is not None:
            kind, groups = exchange
            sent = crossing_bytes(kind, groups, _given(instruction, by_id), self.devices)
            self.add(kind, _axes(groups, self.across), True, times, sent)

    def add(self, kind: str, axes: tuple[str, ...], between_slices: bool, times: float, sent: float) -> None:
        runs, total = self.totals[kind, axes, between_slices]
        self.totals[kind, axes, between_slices] = runs + times, total + times * sent


def _given(instruction: Any, by_id: Mapping[int, Any]) -> int:
    """Bytes of what an instruction is given."""
    return sum(shape_bytes(by_id[i].shape) for i in instruction.operand_ids if i in by_id)


def _is_scattered(instruction: Any, computation: Any) -> bool:
    """Whether a fusion keeps of an all-reduce only a slice, which a TPU carries out as a reduce-scatter."""
    users = [i for i in computation.instructions if instruction.id in i.operand_ids]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _groups(instruction: Any, devices: int) -> list[list[int]]:
    """The groups of devices that exchange with each other; all in one where the program names none."""
    if instruction.source_target_pairs:
        pairs = [[pair.source, pair.target] for pair in instruction.source_target_pairs]
        return [pair for pair in pairs if pair[0] != pair[1]] or [[0]]
    unknown = [field.field_number for field in UnknownFieldSet(instruction) if field.field_number > NEWEST_FIELD]
    if unknown:
        raise ValueError(
            f"{instruction.name}: the compiler writes fields {unknown} of an instruction, which are not known here; "
            "its groups of devices may be among them"
        )
    if instruction.mesh_groups.axes:
        return _mesh_groups(instruction.mesh_groups)
    found = instruction.device_list
    iota = instruction.iota_groups if instruction.iota_groups.num_replica_groups else found.iota
    if iota.num_replica_groups:
        shape, order = list(iota.iota_reshape_dims), list(iota.iota_transpose_perm)
        ids = np.arange(math.prod(shape)).reshape(shape)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(iota.num_replica_groups, iota.num_devices_per_group).tolist()
    listed = [list(group.replica_ids) for group in (found.replica_groups or instruction.replica_groups)]
    return [group for group in listed if group] or [list(range(devices))]


def _mesh_groups(found: Any) -> list[list[int]]:
    """Groups that are told as the axes of a mesh along which their devices differ, or as parts of such axes."""
    sizes = [axis.size for axis in found.mesh.axes]
    ids = np.array(found.mesh.device_ids or range(math.prod(sizes))).reshape(sizes)
    pieces: list[list[int]] = [[size] for size in sizes]
    within: list[list[int]] = [[] for _ in sizes]
    for reference in found.axes:
        axis, part = reference.mesh_axis_index, reference.sub_axis
        if part.size:
            pieces[axis] = [part.pre_size, part.size, sizes[axis] // (part.pre_size * part.size)]
        within[axis].append(1 if part.size else 0)
    if any(len(inside) > 1 for inside in within):
        raise ValueError("a collective's groups take an axis of the mesh in several pieces, which is not known here")
    starts = np.cumsum([0, *map(len, pieces)])
    inside = [int(start + piece) for start, found_in in zip(starts, within, strict=False) for piece in found_in]
    cut = ids.reshape([size for piece in pieces for size in piece])
    outside = [i for i in range(cut.ndim) if i not in inside]
    return cut.transpose(outside + inside).reshape(-1, math.prod(cut.shape[i] for i in inside)).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    sizes = tuple(mesh_shape.values())
    differs: set[str] = set()
    for group in groups[:64]:
        coordinates = np.array(np.unravel_index(np.asarray(group), sizes)).T
        changed = (coordinates != coordinates[0]).any(axis=0)
        differs |= {axis for axis, change in zip(mesh_shape, changed, strict=True) if change}
    return tuple(axis for axis in mesh_shape if axis in differs)


def trip_count(computations: Mapping[int, Any], loop: Any, by_id: Mapping[int, Any]) -> int | None:
    """How often a while loop runs: the constant that its condition compares its counter with; None if it has none.

    Loops that JAX makes of a scan count from 0 in steps of 1; the compiler leaves the comparison, or a fusion of it.
    """
    condition = computations[loop.called_computation_ids[1]]
    pending = [condition]
    while pending:
        computation = pending.pop()
        inside = {i.id: i for i in computation.instructions}
        for instruction in computation.instructions:
            if instruction.opcode == "compare" and instruction.comparison_direction == "LT":
                limit = _constant(inside.get(instruction.operand_ids[1]))
                if limit is not None:
                    return limit
            pending += [computations[number] for number in instruction.called_computation_ids]
    return None


def _constant(instruction: Any) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    literal = instruction.literal
    values = [*literal.s32s, *literal.s64s, *literal.u32s]
    return values[0] if values else 0
