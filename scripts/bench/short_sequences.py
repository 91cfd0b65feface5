#!/usr/bin/env python
"""Short sequences: one attention layer as it runs, against the general path that scores and selects all the same.

    scripts/bench/short_sequences.py [--batch 32] [--lengths 64 128 256 512] [--repeats 7]

Forward and backward, float32, on this machine's CPU, at the widths of the tiny presets with the released top-k, so that
everything visible is selected. The general path scores, takes the top-k and attends to that list under a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.indexer import INDEX_CHUNK, BaseIndexer, Choice
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4 import attention as v4
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v32 import attention as v32
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.ops.chunks import map_chunks
from fathom.ops.indexer import exact_topk, indexer_scores
from fathom.ops.selection import Selected


def always_select(self, x, qr, inputs, place, asked) -> Choice:
    """In the place of `BaseIndexer.__call__`: no shortcut, neither its own nor that of `indexer_topk`."""
    x, qr = jax.lax.stop_gradient((x, qr))
    visible, num_entries = self.visible(inputs)
    k = jax.lax.stop_gradient(self.keys(x, inputs, place))

    def of_chunk(parts):
        x, qr, tables, visible = parts
        q, weights = self.queries(x, qr, tables)
        return exact_topk(indexer_scores(q, k, weights), visible, min(self.top_k, num_entries))

    parts = jax.lax.stop_gradient((x, qr, self.tables(inputs), visible))
    return Choice(Selected(jax.lax.stop_gradient(map_chunks(of_chunk, parts, INDEX_CHUNK))), None)


def make_layer(model: str, options: ComputeOptions):
    """(module, its config, its module file) of one attention layer with an indexer."""
    if model == "v4 csa":
        config = dataclasses.replace(DeepseekV4Config.tiny(), index_top_k=DeepseekV4Config.flash().index_top_k)
        return v4.Attention(nnx.Rngs(0), config, "csa", 4, options), config, v4
    config = dataclasses.replace(DeepseekV32Config.tiny(), index_top_k=DeepseekV32Config.v32().index_top_k)
    return v32.Attention(nnx.Rngs(0), config, options), config, v32


def compiled(model: str, batch: int, length: int, general: bool):
    """The compiled forward and backward, and its arguments."""
    options = ComputeOptions(dtype="float32", attention="masked" if general else "auto")
    layer, config, module = make_layer(model, options)
    graphdef, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (batch, length, config.hidden_size))

    # As the train step gives them: a program for rows that may be packed, here with one document each.
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    segment_ids = jnp.ones_like(positions)

    def loss(state, x, positions, segment_ids):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)
        inputs = module.make_layer_inputs(config, tokens, make_documents(tokens, positions, segment_ids))
        out = nnx.merge(graphdef, state)(x, inputs)
        return jnp.square(out[0] if isinstance(out, tuple) else out).sum()

    step, arguments = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (state, x, positions, segment_ids)
    if not general:
        return step.lower(*arguments).compile(), arguments
    with mock.patch.object(BaseIndexer, "__call__", always_select):
        return step.lower(*arguments).compile(), arguments


def measure(programs, repeats: int) -> list[float]:
    """Median seconds of each, taken in turn."""
    times = [[] for _ in programs]
    for _ in range(repeats + 1):
        for taken, (program, arguments) in zip(times, programs, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"batch {arguments.batch}; ms and MB of temporaries, general path -> as it runs")
    for model in ("v4 csa", "v3.2"):
        for length in arguments.lengths:
            programs = [compiled(model, arguments.batch, length, general) for general in (True, False)]
            general, fast = measure(programs, arguments.repeats)
            values = [program(*arguments)[0].item() for program, arguments in programs]
            memory = [program.memory_analysis().temp_size_in_bytes / 2**20 for program, _ in programs]
            difference = np.abs(values[0] - values[1]) / np.abs(values[0])
            print(
                f"{model:<8} S {length:>4}  {1e3 * general:8.1f} -> {1e3 * fast:8.1f}  {general / fast:5.2f}x   "
                f"{memory[0]:7.1f} -> {memory[1]:7.1f}  {100 * (1 - memory[1] / memory[0]):+4.0f}% less   "
                f"results differ by {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
