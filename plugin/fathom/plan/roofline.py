"""The least time a step can take on a slice: a bound from counted work and published rates, no prediction.

Three things must happen in a step: its matrix products at the chips' peak rate, its collectives over all of a chip's
links at once, and every byte of the state read and written once. Each alone is a lower bound; the largest counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fathom.plan.collectives import Traffic
from fathom.topology import Topology


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of a step, at least.

    Attributes:
      compute, network, memory: seconds of each alone. seconds: the largest.
      limited_by: its name. mfu: model flops utilisation at that time, the highest there can be; None without a formula.
    """

    compute: float
    network: float
    memory: float
    seconds: float
    limited_by: str
    mfu: float | None


def step_bound(
    topology: Topology,
    mesh: Mapping[str, int],
    flops: float,
    model_flops: float | None,
    traffic: Sequence[Traffic],
    state_bytes: int,
    across_slices: frozenset[str] = frozenset(),
) -> Bound:
    """The bound of one step.

    Args:
      mesh: mesh axis -> size. flops: of all matrix products the program runs, recomputation included, over all devices;
        model_flops: those of the model's formula, None where it has none for what trains. traffic: of one device.
      state_bytes: of one device, what is read and written once a step.
      across_slices: mesh axes that span slices. Of a collective along one of them by g devices in n slices at least the
        share (n - 1) / (g - 1) crosses the data-centre network, whatever the order of its exchanges.
    """
    generation = topology.generation
    per_chip = generation.devices_per_chip
    peak = topology.chips * generation.flops
    outside = 0.0
    for t in traffic:
        if across_slices.intersection(t.axes):
            group = math.prod(mesh[axis] for axis in t.axes)
            outside += t.sent_bytes * (min(topology.slices, group) - 1) / (group - 1)
    inside = sum(t.sent_bytes for t in traffic) - outside
    parts = {
        "compute": flops / peak,
        "network": per_chip * max(inside / generation.ici_rate, outside / generation.dcn_rate),
        "memory": 2 * per_chip * state_bytes / generation.hbm_rate,
    }
    limited_by = max(parts, key=lambda name: parts[name])
    seconds = parts[limited_by]
    mfu = None if model_flops is None else model_flops / peak / seconds
    return Bound(**parts, seconds=seconds, limited_by=limited_by, mfu=mfu)
