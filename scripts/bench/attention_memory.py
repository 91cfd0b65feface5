#!/usr/bin/env python
"""Memory of one whole V4-Flash attention sublayer, forward and backward, by the TPU's compiler and no TPU.

    python scripts/bench/attention_memory.py                           the table of BENCHMARKS.md
    python scripts/bench/attention_memory.py --lengths 32768 --kinds csa --loss

The model's own `Attention`, bfloat16 weights and activations, one sequence of one document on one chip: y and the
gradients of x and of every weight, given dy; with --loss also the loss that trains the indexer, and its gradients.
"temporaries" is XLA's arena; "peak" also counts arguments (x, dy, weights) and results (y, dx, gradients). "products"
are the matrix products of the program with every loop counted as often as it runs (fathom/plan/flops.py), per token,
beside what the layer costs as published (`published_products`) and the time which that takes at the device's peak
("roofline"). "compiler's" operations and bytes count the body of a loop once, so that they tell sizes of steps and not
of layers.
Needs libtpu, which `pip install jax[tpu]` brings.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from fathom.layers.documents import make_documents
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4.attention import Attention, make_layer_inputs
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.plan.flops import count_flops

CONFIG = DeepseekV4Config.flash()
RATIOS = {"csa": 4, "hca": 128, "sliding": 0}
PEAK = {"v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12 / 2}
"""bfloat16 operations per second of a device, as published: a chip, or on tpu7x, where a chip is two devices, half."""


def make_step(kind: str, options: ComputeOptions):
    """(step of (weights, x, dy) -> results and gradients, the abstract weights)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(nnx.Rngs(0), CONFIG, kind, RATIOS[kind], options)))

    def step(state, x, dy):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)
        inputs = make_layer_inputs(CONFIG, tokens, make_documents(tokens, None, None))

        def layer(state, x):
            y, loss = nnx.merge(graph, state)(x, inputs)
            return y, loss

        (y, loss), pull = jax.vjp(layer, state, x)
        return y, loss, pull((dy, jnp.ones_like(loss)))

    return step, state


def published_products(kind: str, length: int) -> float:
    """Floating-point operations per token, forward and backward, by the published costs of the layer's parts.

    Projections, those of compressors and indexer among them, three times (forward, both gradients), attention's two
    products 3.5 times (the scores once more in the backward), the indexer's scores once; causal means over one
    document.
    """
    c = CONFIG
    group = c.num_heads * c.head_dim // c.o_groups
    widths = c.hidden_size * c.q_lora_rank + c.q_lora_rank * c.num_heads * c.head_dim + c.hidden_size * c.head_dim
    widths += c.o_groups * (group * c.o_lora_rank + c.o_lora_rank * c.hidden_size)
    ratio, visible, scored, index = RATIOS[kind], 0.0, 0.0, 0
    if ratio:
        entries = (np.arange(length) + 1) // ratio
        scored = entries.mean() * (length // ratio > c.index_top_k)
        visible = np.minimum(entries, c.index_top_k if kind == "csa" else length).mean()
        widths += c.hidden_size * 2 * c.head_dim * (2 if kind == "csa" else 1)
    if kind == "csa" and length // ratio > c.index_top_k:
        widths += c.q_lora_rank * c.index_num_heads * c.index_head_dim + c.hidden_size * c.index_num_heads
        widths += c.hidden_size * 4 * c.index_head_dim
        index = scored * c.index_num_heads * c.index_head_dim
    band = np.minimum(np.arange(length) + 1, c.sliding_window).mean()
    attention = 2 * c.num_heads * c.head_dim * (band + visible)
    return 2 * (3 * widths + 3.5 * attention + index)


def tpu_mesh() -> jax.sharding.AbstractMesh:
    """A mesh of one v5p chip, for tracing: the versions of the attention are picked for the platform."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("chip",)).abstract_mesh


def compile_layer(kind: str, length: int, *, topology: str, options: ComputeOptions):
    """The compiled step, and the seconds it took to trace and compile: on the clock and of all cores together."""
    if topology == "cpu":
        devices = jax.devices("cpu")
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step, state = make_step(kind, options)

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    x = shaped(jax.ShapeDtypeStruct((1, length, CONFIG.hidden_size), jnp.bfloat16))
    with jax.set_mesh(mesh):
        flops = count_flops(step, state, x, x, platform="cpu" if topology == "cpu" else "tpu")
        start = time.perf_counter(), time.process_time()
        compiled = jax.jit(step).lower(jax.tree.map(shaped, state), x, x).compile()
    return compiled, flops / length, (time.perf_counter() - start[0], time.process_time() - start[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--kinds", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--topology", default="v5p:2x2x1", help='a TPU slice, one device of it, or "cpu"')
    parser.add_argument("--stretch", type=int, default=None, help="tokens whose queries are held at a time")
    parser.add_argument("--query-chunk", type=int, default=None, help="queries attended at a time")
    parser.add_argument("--loss", action="store_true", help="train the indexer too")
    args = parser.parse_args()
    options = ComputeOptions(
        param_dtype="bfloat16", stretch=args.stretch, query_chunk=args.query_chunk, indexer_loss=args.loss
    )
    loss = ", indexer's loss too" if args.loss else ""
    print(f"V4-Flash attention sublayer, forward + backward{loss}, bfloat16, one device of {args.topology}")
    print("| layer | tokens | temporaries GiB | peak GiB | arguments + results GiB | compiler's GFLOP, GB "
          "| products MFLOP/token | published | ratio | roofline us/token | compile s | CPU s |")  # fmt: skip
    print("|" + "---|" * 12)
    peak = PEAK.get(args.topology.partition(":")[0], float("nan"))
    for kind in args.kinds:
        for length in args.lengths:
            compiled, flops, seconds = compile_layer(kind, length, topology=args.topology, options=options)
            m = compiled.memory_analysis()
            sizes = m.temp_size_in_bytes, m.peak_memory_in_bytes, m.argument_size_in_bytes + m.output_size_in_bytes
            cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
            cost, published = compiled.cost_analysis(), published_products(kind, length)
            print(
                f"| {kind} | {length} | {cells} | {cost['flops'] / 1e9:.0f}, {cost['bytes accessed'] / 1e9:.1f} "
                f"| {flops / 1e6:.0f} | {published / 1e6:.0f} | {flops / published:.2f} | {1e6 * published / peak:.2f} "
                f"| {seconds[0]:.0f} | {seconds[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
