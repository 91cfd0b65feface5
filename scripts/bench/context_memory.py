#!/usr/bin/env python
"""Memory of one device as the sequence is cut over more of them: the whole train step, compiled for a CPU's devices.

    scripts/bench/context_memory.py [--length 32768] [--context 1 2 4 8] [--recipe tiny-v4-131k-cpu]

Temporaries of each device at a fixed length, which are activations all but a few MB: the weights are the tiny model's.
Nothing is run.
"""

from __future__ import annotations

import argparse

import fathom
from fathom.mesh import make_mesh, simulate_devices
from fathom.train.step import make_program


def temporaries(recipe: fathom.Recipe, context: int, length: int, **compiler_options) -> int:
    """Bytes on each device of a step on one row of `length` tokens, cut over the first `context` devices."""
    import jax

    mesh = make_mesh({"context": context}, jax.devices()[:context])
    lowered = make_program(recipe, mesh).lower(1, length)
    return lowered.compile(compiler_options=compiler_options).memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--recipe", default="tiny-v4-131k-cpu")
    args = parser.parse_args()
    simulate_devices(max(args.context))
    recipe = fathom.load_recipe(args.recipe, [f"data.sequence_length={args.length}"])
    first = None
    for context in args.context:
        size = temporaries(recipe, context, args.length)
        first = size if first is None else first
        told = f"{size / 2**20:8.1f} MiB a device, {size / first:.3f}"
        print(f"{args.length} tokens, context {context}: {told}", flush=True)


if __name__ == "__main__":
    main()
