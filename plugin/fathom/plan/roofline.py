"""The least time a step can take on a slice: a bound from counted work and published rates, no prediction.

Three things must happen in a step: its matrix products at the chips' peak rate, its collectives over all of a chip's
links at once, and every byte of the state read and written once. Each alone is a lower bound; the largest counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    flops: float,
    model_flops: float | None,
    traffic: Sequence[Traffic],
    state_bytes: int,
) -> Bound:
    """The bound of one step.

    Args:
      flops: of all matrix products the program runs, recomputation included, over all devices; model_flops: those of
        the model's formula, None where it has none for what trains.
      traffic: of one device; what leaves its slice goes over the data-centre network.
      state_bytes: of one device, what is read and written once a step.
    """
    generation = topology.generation
    per_chip = generation.devices_per_chip
    peak = topology.chips * generation.flops
    outside = sum(t.sent_bytes for t in traffic if t.between_slices)
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
