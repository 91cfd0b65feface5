"""What crosses between slices, read from the compiled program.

All slices run one program, made for the devices of one. What is exchanged within a slice are collectives; what leaves
it is a `send` to the runtime of the hosts, whose attributes tell the kind of exchange and the devices that take part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

RUNTIME = "xla_megascale_runtime"
SLICE = 100_000
"""A device's id is the number of its slice, from 1, times this, plus its id within the slice."""

KINDS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


def exchange_of(instruction: Any) -> tuple[str, list[list[int]]] | None:
    """The kind of exchange that a `send` takes part in, and the slices (from 0) of each group's devices.

    None for what is sent to anybody else. The pairs of a collective-permute are (sender, receiver).

    Raises:
      ValueError: for an exchange in a form that is not known here.
    """
    told = {entry.key: entry.value for entry in instruction.frontend_attributes.map}
    if told.get("_xla_host_transfer_handler_name") != RUNTIME:
        return None
    name, target = told.get("_xla_megascale_transfer_type", ""), told.get("_xla_megascale_target", "")
    if name not in KINDS:
        raise ValueError(f"{instruction.name}: between slices found {name!r}, expected one of {', '.join(KINDS)}")
    groups = _slices(target)
    if not groups:
        raise ValueError(
            f"{instruction.name}: the devices between slices are told as {target[:80]!r}, expected "
            "{{100000,200000},...}, {{100000->200000},...} or {1,2}x{0:3}"
        )
    return KINDS[name], groups


def _slices(target: str) -> list[list[int]]:
    """Of every group in an attribute; none if it cannot be read."""
    same = re.fullmatch(r"\{(\d+(?:,\d+)*)\}x\{(\d+):(\d+)\}", target)
    if same:  # each device of the range with those of the same id in the other slices
        return [[int(n) - 1 for n in same[1].split(",")]] * (int(same[3]) - int(same[2]) + 1)
    if not re.fullmatch(r"\{\{\d+(?:(?:,|->)\d+)*\}(?:,\{\d+(?:(?:,|->)\d+)*\})*\}", target):
        return []
    return [[int(n) // SLICE - 1 for n in re.findall(r"\d+", group)] for group in target.split("},")]


def crossing_bytes(kind: str, groups: Sequence[Sequence[int]], given: float, devices: int) -> float:
    """What a device sends out of its slice at least, the mean of all `devices`, each giving as much to the exchange."""
    if kind == "collective-permute":
        return given * sum(source != target for source, target in groups) / devices
    size, slices = len(groups[0]), len(set(groups[0]))
    share = {"all-gather": 1, "all-reduce": 2 / size, "reduce-scatter": 1 / size, "all-to-all": 1 / slices}[kind]
    return given * (slices - 1) * share
