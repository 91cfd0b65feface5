#!/usr/bin/env python
"""Memory of a whole train step on a TPU slice, by the TPU's compiler and no TPU.

    python scripts/bench/step_memory.py deepseek-v4-flash v5p:4x4x8 --mesh fsdp=8,expert=16 --preset long \\
        --length 1048576 --rows 1

AdamW, bfloat16 compute, float32 weights and moments, every block recomputed in the backward. Bytes are of one chip:
"arguments" are the state and the batch, "temporaries" all else, "peak" both together at their most. The step's output
is donated into the state. Needs libtpu, which `pip install jax[tpu]` brings.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax.experimental import topologies

from fathom.mesh import make_mesh
from fathom.recipe import Recipe
from fathom.train.step import make_program


def make_recipe(args: argparse.Namespace) -> Recipe:
    mesh = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh.split(","))}
    return Recipe.model_validate(
        {
            "name": "step-memory",
            "model": {"name": args.model, "dtype": "bfloat16", "param_dtype": args.param_dtype, "remat": args.remat},
            "data": {"path": ".", "sequence_length": args.length, "batch_size": args.rows},
            "optimizer": {"learning_rate": 1e-4, "momentum_dtype": args.momentum_dtype},
            "mesh": mesh | {"preset": args.preset},
            "train": {"steps": 100, "stage": args.stage},
        }
    )


def compile_step(args: argparse.Namespace):
    """(chips, memory analysis of one, seconds to trace, seconds to compile)."""
    recipe = make_recipe(args)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    begin = time.perf_counter()
    lowered = make_program(recipe, make_mesh(recipe.mesh.shape, devices)).lower(args.rows, args.length)
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return len(devices), memory, traced - begin, time.perf_counter() - traced


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("topology", help="e.g. v5p:4x4x8")
    parser.add_argument("--mesh", required=True, help="axis=size,axis=size")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--stage", default="sparse")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--param-dtype", default="float32")
    parser.add_argument("--momentum-dtype", default="float32")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    devices, m, traced, seconds = compile_step(args)
    print(f"{args.model} on {devices} chips of {args.topology}, {args.rows} x {args.length} tokens")
    print(
        f"arguments {m.argument_size_in_bytes / 2**30:.2f}  output {m.output_size_in_bytes / 2**30:.2f}  "
        f"aliased {m.alias_size_in_bytes / 2**30:.2f}  temporaries {m.temp_size_in_bytes / 2**30:.2f}  "
        f"peak {m.peak_memory_in_bytes / 2**30:.2f} GiB a chip; traced in {traced:.0f} s, "
        f"compiled in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
