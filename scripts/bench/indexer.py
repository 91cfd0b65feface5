#!/usr/bin/env python
"""A selection as a mask: written by a scatter, against comparing every key with every index.

    scripts/bench/indexer.py [--queries 1024] [--keys 131072] [--top-k 2048] [--repeats 3]

CPU seconds are measured; those of the comparison over the first COMPARED queries and scaled up, for it takes minutes
and on a CPU holds queries x top-k x keys. Flops, bytes and temporary memory are the compiler's for one v5p chip, for
all queries, which need no TPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from fathom.ops.selection import Selected, entry_mask  # noqa: E402


def by_scatter(indices: jax.Array, keys: int) -> jax.Array:
    """What Fathom does."""
    return entry_mask(Selected(indices), keys)


def by_comparison(indices: jax.Array, keys: int) -> jax.Array:
    """What it is measured against."""
    return (indices[..., None] == jnp.arange(keys)).any(axis=2)


def seconds(function, indices: jax.Array, repeats: int) -> tuple[float, jax.Array]:
    """Median of the runs, compilation aside, and the mask."""
    program = jax.jit(function).lower(indices).compile()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        mask = program(indices).block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), mask


def compiled_for_v5p(function, shape: tuple[int, ...]):
    """The program for one chip of a v5p slice."""
    device = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices[0]
    indices = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=SingleDeviceSharding(device))
    return jax.jit(function).trace(indices).lower(lowering_platforms=("tpu",)).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("queries", 1024), ("keys", 131072), ("top-k", 2048), ("compared", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    shape = (1, arguments.queries, arguments.top_k)
    scores = jax.random.uniform(jax.random.key(0), (1, arguments.queries, arguments.keys))
    indices = jax.jit(lambda s: jax.lax.top_k(s, arguments.top_k)[1])(scores).block_until_ready()
    versions = {
        "scatter": lambda i: by_scatter(i, arguments.keys),
        "comparison": lambda i: by_comparison(i, arguments.keys),
    }
    figures, masks = {}, []
    for name, version in versions.items():
        program = compiled_for_v5p(version, shape)
        cost, memory = program.cost_analysis(), program.memory_analysis()
        rows = arguments.queries if name == "scatter" else min(arguments.compared, arguments.queries)
        cpu, mask = seconds(version, indices[:, :rows], arguments.repeats)
        cpu *= arguments.queries / rows
        masks.append(mask[:, : arguments.compared])
        figures[name] = (
            cpu,
            cost.get("flops", 0.0),
            cost.get("bytes accessed", 0.0),
            memory.temp_size_in_bytes,
        )
    equal = bool((masks[0] == masks[1]).all())
    print(f"mask [1, {arguments.queries}, {arguments.keys}], top-k {arguments.top_k}; equal: {equal}")
    print(f"{'':<12}{'CPU s':>10}{'v5p flops':>12}{'v5p bytes':>12}{'v5p temp':>12}")
    for name, (cpu, flops, moved, temporary) in figures.items():
        print(f"{name:<12}{cpu:>10.3f}{flops:>12.3g}{moved:>12.3g}{temporary:>12.3g}")
    first, second = figures["scatter"], figures["comparison"]
    ratios = [b / a if a else float("inf") for a, b in zip(first, second, strict=True)]
    print(f"{'ratio':<12}{ratios[0]:>10.1f}{ratios[1]:>12.3g}{ratios[2]:>12.3g}{ratios[3]:>12.3g}")


if __name__ == "__main__":
    main()
