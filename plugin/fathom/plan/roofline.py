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
      limited_by: its name. mfu: model flops utilisation at that time, the highest there can be.
    """

    compute: float
    network: float
    memory: float
    seconds: float
    limited_by: str
    mfu: float


def step_bound(
    topology: Topology, flops: float, model_flops: float, traffic: Sequence[Traffic], state_bytes: int,
    across_slices: frozenset[str] = frozenset(),
) -> Bound:  # fmt: skip
    """The bound of one step.

    Args:
      flops: of all matrix products the program runs, recomputation included, over all devices; model_flops: those of
        the model's formula. traffic: of one device. state_bytes: of one device, read and written once a step.
      across_slices: mesh axes that span slices, whose collectives go over the data-centre network.
    """
    generation = topology.generation
    per_chip = generation.devices_per_chip
    peak = topology.chips * generation.flops
    outside = sum(t.sent_bytes for t in traffic if across_slices.intersection(t.axes))
    inside = sum(t.sent_bytes for t in traffic) - outside
    parts = {
        "compute": flops / peak,
        "network": per_chip * (inside / generation.ici_rate + outside / generation.dcn_rate),
        "memory": 2 * per_chip * state_bytes / generation.hbm_rate,
    }
    limited_by = max(parts, key=lambda name: parts[name])
    seconds = parts[limited_by]
    return Bound(**parts, seconds=seconds, limited_by=limited_by, mfu=model_flops / peak / seconds if seconds else 0.0)
