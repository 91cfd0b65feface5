"""TPU slices: what generations there are, and what a topology such as "v5p:8x8x8" names.

Chips are counted everywhere, never cores: cloud slice names count cores on some generations. Figures are of one chip as
its maker states them (Cloud TPU documentation); `hbm_bytes` is what the compiler lets a program of one device use.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator

GIB = 2**30

PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""All slices of generations with a torus of two dimensions."""
PARTS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices smaller than a cube, of generations with three dimensions."""
CUBE = 4
"""Chips along each dimension of a cube; larger slices are of whole cubes."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
      name: as in a topology, "v5p". label: as people write it.
      devices_per_chip: what JAX counts as devices; 2 where the cores of a chip are separate ones.
      dimensions: of the torus. host: chips of a host along each.
      hbm_bytes: a device's memory that a program may use. flops: bfloat16 per second of a chip. hbm_rate, ici_rate,
        dcn_rate: bytes per second of a chip: memory, all links of the torus one way, the data-centre network.
      gke_accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
      cloud_prefix: what clouds call it, in front of a shape or a number of chips or cores.
      listed: shapes that the documentation lists one by one. largest: chips of the largest slice of whole cubes, of
        which any ascending shape exists; 0 where there are none.
      chip_config: the compiler's name of how the chip's cores are joined, where it has to be told.
    """

    name: str
    label: str
    devices_per_chip: int
    dimensions: int
    host: tuple[int, ...]
    hbm_bytes: int
    flops: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    gke_accelerator: str
    cloud_prefix: str
    listed: tuple[tuple[int, ...], ...]
    largest: int
    chip_config: str | None = None

    @property
    def chips_per_host(self) -> int:
        """Chips of a host of a slice with several hosts."""
        return math.prod(self.host)

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """All slices that exist: on GKE the nodes of a slice are found by its shape, spelled as Google does."""
        yield from self.listed
        for x in range(CUBE, self.largest, CUBE):
            for y in range(x, self.largest // x + 1, CUBE):
                for z in range(y, self.largest // (x * y) + 1, CUBE):
                    yield x, y, z


GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", "TPU v4", 1, 3, (2, 2, 1), int(30.75 * GIB), 275e12, 1228e9, 300e9, 6.25e9,
                   "tpu-v4-podslice", "v4", PARTS, 4096, "megacore"),
        Generation("v5e", "TPU v5e", 1, 2, (2, 2), int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9,
                   "tpu-v5-lite-podslice", "v5litepod", PLANE, 0),
        Generation("v5p", "TPU v5p", 1, 3, (2, 2, 1), int(95.73 * GIB), 459e12, 2765e9, 600e9, 6.25e9,
                   "tpu-v5p-slice", "v5p", PARTS, 6144),
        Generation("v6e", "TPU v6e", 1, 2, (2, 2), int(31.24 * GIB), 918e12, 1640e9, 400e9, 12.5e9,
                   "tpu-v6e-slice", "v6e", PLANE, 0),
        Generation("tpu7x", "TPU7x", 2, 3, (2, 2, 1), int(94.74 * GIB), 2307e12, 7380e9, 600e9, 12.5e9,
                   "tpu7x", "tpu7x", ((1, 1, 1), *PARTS), 9216),
    )
}  # fmt: skip

EXAMPLE = "for example v5p:8x8x8, v6e:16x16, or 2*v6e:16x16 for two slices"


class TopologyError(ValueError):
    """A topology that names no slice; the text says what was found, what was expected, and the fix."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice or several alike.

    Attributes:
      generation: of its chips. shape: chips along each dimension of a slice's torus. slices: how many slices.
    """

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """Of one slice: "v5p:8x8x8"."""
        return f"{self.generation.name}:{_spell(self.shape)}"

    def __str__(self) -> str:
        return f"{self.slices}*{self.slice_name}" if self.slices > 1 else self.slice_name

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * self.chips_per_slice

    @property
    def devices(self) -> int:
        """What JAX counts, in all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def hosts_per_slice(self) -> int:
        return max(1, self.chips_per_slice // self.generation.chips_per_host)

    @property
    def hosts(self) -> int:
        """Of all slices; one process each."""
        return self.slices * self.hosts_per_slice

    @property
    def chips_per_host(self) -> int:
        return self.chips_per_slice // self.hosts_per_slice


def parse_topology(text: str) -> Topology:
    """Reads "v5p:8x8x8", or "2*v5p:8x8x8" for two slices.

    Raises:
      TopologyError: for an unknown generation, a shape of the wrong rank, or one of which there is no slice.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[*]\s*)?([A-Za-z0-9]+):(\d+(?:x\d+)*)", text.strip())
    if not match:
        raise TopologyError(f"topology: found {text!r}, expected a generation and its chips, {EXAMPLE}")
    slices, name, dims = int(match[1] or 1), match[2].lower(), tuple(int(n) for n in match[3].split("x"))
    generation = GENERATIONS.get(name)
    if generation is None:
        close = difflib.get_close_matches(name, GENERATIONS, 1)
        raise TopologyError(
            f"topology {text!r}: found generation {name!r}, expected one of {', '.join(GENERATIONS)}"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    if len(dims) != generation.dimensions or min(dims) < 1 or slices < 1:
        example = "2x2x1" if generation.dimensions == 3 else "4x4"
        raise TopologyError(
            f"topology {text!r}: found {len(dims)} dimensions, {generation.label} has {generation.dimensions}, each at "
            f"least 1; write it like {name}:{example}"
        )
    if dims not in generation.shapes():
        expected = ", ".join(_spell(shape) for shape in generation.listed)
        if generation.largest:
            expected += f", or multiples of {CUBE} in ascending order, at most {generation.largest} chips in all"
        near = Topology(generation, _nearest(generation, dims), slices)
        raise TopologyError(
            f"topology {text!r}: found {_spell(dims)}, which is no slice of {generation.label}; expected {expected}; "
            f"did you mean {near}?"
        )
    return Topology(generation, dims, slices)


def _nearest(generation: Generation, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The slice closest in chips, and of these in shape, whatever the order of the dimensions."""

    def logarithms(shape: tuple[int, ...]) -> list[float]:
        return [math.log(n) for n in sorted(shape)]

    def distance(shape: tuple[int, ...]) -> tuple[float, float]:
        more = abs(math.log(math.prod(shape) / math.prod(dims)))
        return more, math.dist(logarithms(shape), logarithms(dims))

    return min(generation.shapes(), key=distance)


def _spell(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
