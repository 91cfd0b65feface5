"""What a device's memory holds when a compiled step needs most of it, from the compiler's own assignment of buffers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fathom.plan.hlo_proto import ELEMENT_BITS

HBM = 0
"""The compiler's number of the memory that is assigned here; others are on the chip itself."""

_ALLOCATE, _FREE, _SHARE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class HeapUse:
    """One device's memory, in bytes.

    Attributes:
      arguments: of the step: state and batch, as the compiler lays them out. temporaries: the heap of everything the
        step makes. outputs: results that take no argument's place.
      saved: of the temporaries at their peak, what the forward has left for the backward. gradients: those of weights.
      working: what is being computed with. gaps: the heap's size beyond what lives in it at its peak.
      largest: (name of the operation, shape, bytes) of the largest buffers at the peak, largest first.
    """

    arguments: int
    temporaries: int
    outputs: int
    saved: int
    gradients: int
    working: int
    gaps: int
    largest: tuple[tuple[str, str, int], ...]

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.arguments + self.temporaries + self.outputs


def heap_use(hlo: Any, weight_shapes: Iterable[Sequence[int]], top: int = 12) -> HeapUse:
    """Reads an HloProto with buffers (`fathom.plan.hlo_proto.parse_hlo`).

    Args:
      weight_shapes: of each weight, the shape of one device's part: float32 buffers of these shapes, made by the
        backward, are gradients.
      top: how many of the largest buffers to name.

    Raises:
      ValueError: when the compiler has assigned no buffers.
    """
    allocations = [a for a in hlo.buffers.allocations if a.color == HBM and not a.is_thread_local]
    if not allocations:
        raise ValueError("the compiled program holds no assignment of buffers to memory")
    arguments = sum(a.size for a in allocations if a.is_entry_computation_parameter)
    outputs = sum(a.size for a in allocations if a.maybe_live_out and not a.is_entry_computation_parameter)
    heaps = [a for a in allocations if not a.is_entry_computation_parameter and not a.maybe_live_out]
    temporaries = sum(a.size for a in heaps)
    heap = max(heaps, key=lambda a: a.size)
    names = _Names(hlo)
    live, where = _peak(hlo, heap.index)
    shapes = {tuple(shape) for shape in weight_shapes}
    backward = "transpose(" in names.of_instruction(where)
    parts: collections.Counter[str] = collections.Counter()
    for buffer, size in live.items():
        parts[_kind(*names.of_buffer(buffer), shapes, backward)] += size
    largest = sorted(live.items(), key=lambda item: -item[1])[:top]
    return HeapUse(
        arguments,
        temporaries,
        outputs,
        parts["saved"],
        parts["gradients"],
        parts["working"],
        temporaries - sum(live.values()),
        tuple((name, _shape(shape), size) for (name, shape), size in ((names.of_buffer(b), s) for b, s in largest)),
    )


def _kind(name: str, shape: Any, weight_shapes: set[tuple[int, ...]], backward: bool) -> str:
    if backward and "transpose(" in name:
        float32 = shape is not None and shape.element_type == 11
        squeezed = tuple(shape.dimensions) if float32 else ()
        return "gradients" if squeezed in weight_shapes else "working"
    return "saved" if backward and "jvp(" in name else "working"


def _peak(hlo: Any, allocation: int) -> tuple[Mapping[int, int], str]:
    """(logical buffer -> bytes of all that live when most do, name of the instruction there)."""
    sizes = {b.id: b.size for b in hlo.buffers.logical_buffers}
    events = next((t.events for t in hlo.buffers.traces if t.buffer_allocation_index == allocation), ())
    holder: dict[int, int] = {}
    users: collections.Counter[int] = collections.Counter()
    live: dict[int, int] = {}
    now, most, best, where, name = 0, -1, {}, "", ""
    changed = False
    for event in events:
        if event.kind == _FREE:
            if now > most and changed:
                most, best, where = now, dict(live), name
            changed = False
            own = holder[event.buffer_id]
            users[own] -= 1
            if not users[own]:
                now -= live.pop(own)
            continue
        own = event.buffer_id
        if event.kind == _SHARE:
            own = holder.get(event.share_with_canonical_id, event.share_with_canonical_id)
        holder[event.buffer_id] = own
        if not users[own]:
            live[own] = sizes[own]
            now += sizes[own]
        users[own] += 1
        changed, name = True, event.instruction_name
    return best, where


class _Names:
    """Names of buffers, by the operation that makes them, or by the first to use what has none itself."""

    def __init__(self, hlo: Any):
        self.buffers = {b.id: b for b in hlo.buffers.logical_buffers}
        self.instructions = {i.id: i for c in hlo.module.computations for i in c.instructions}
        self.by_name = {i.name: i for i in self.instructions.values()}
        self.user: dict[int, Any] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operand_ids:
                self.user.setdefault(operand, instruction)

    def of_instruction(self, name: str) -> str:
        instruction = self.by_name.get(name)
        return "" if instruction is None else self._name(instruction)

    def _name(self, instruction: Any) -> str:
        """Its own name if that tells forward from backward, else that of what uses it, through tuples and copies."""
        named, found = instruction, instruction.metadata.op_name
        for _ in range(8):
            if named is None or "jvp(" in named.metadata.op_name:
                break
            named = self.user.get(named.id)
        return named.metadata.op_name if named is not None and named.metadata.op_name else found or instruction.name

    def of_buffer(self, number: int) -> tuple[str, Any]:
        """(name, shape or None)."""
        made = self.buffers[number].defined_at
        instruction = self.instructions.get(made.instruction_id)
        if instruction is None:
            return made.instruction_name, None
        shape = instruction.shape
        for index in made.shape_index:
            shape = shape.tuple_shapes[index]
        return self._name(instruction), shape


def _shape(shape: Any) -> str:
    if shape is None:
        return "?"
    bits = ELEMENT_BITS.get(shape.element_type, 0)
    letter = {11: "float", 16: "bfloat"}.get(shape.element_type, "int")
    return f"{letter}{bits}[{','.join(map(str, shape.dimensions))}]"
