"""Memory of one whole V4-Flash attention sublayer, forward and backward, by the TPU's compiler and no TPU.

    python scripts/bench/attention_memory.py                           the table of BENCHMARKS.md
    python scripts/bench/attention_memory.py --lengths 32768 --kinds csa

bfloat16 weights and activations, one sequence on one chip: y and the gradients of x and of every weight, given dy.
The sublayer is the model's (models/deepseek_v4/attention.py) on plain arrays: RMS norms without weights, everything
that is wider than the residual stream in stretches of queries. "temporaries" is XLA's arena; "peak" also counts
arguments (x, dy, weights) and results (y, dx, gradients). Needs libtpu, which `pip install jax[tpu]` brings.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from fathom.layers.norms import rms_normalize
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.chunked_layer import LAYER_CHUNK, attend_in_chunks
from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.indexer import indexer_topk
from fathom.ops.selection import Selected, VisibleRange

CONFIG = DeepseekV4Config.flash()
RATIOS = {"csa": 4, "hca": 128, "sliding": 0}
DTYPE, EPS = jnp.bfloat16, CONFIG.rms_norm_eps
INDEX_CHUNK = 16  # queries scored at a time: 64 heads x 32,768 entries x 4 bytes each


class Windows(NamedTuple):
    """Pooling weights of one compressor. overlap: entries also pool the window before theirs."""

    ratio: int
    overlap: bool


def weight_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Every weight of the sublayer; norms have none here."""
    c = CONFIG
    group = c.num_heads * c.head_dim // c.o_groups
    shapes = {
        "wq_a": (c.hidden_size, c.q_lora_rank),
        "wq_b": (c.q_lora_rank, c.num_heads, c.head_dim),
        "wkv": (c.hidden_size, c.head_dim),
        "wo_a": (c.o_groups, group, c.o_lora_rank),
        "wo_b": (c.o_groups, c.o_lora_rank, c.hidden_size),
    }
    size = c.head_dim * (2 if kind == "csa" else 1)
    if kind != "sliding":
        shapes |= {
            "compress_wkv": (c.hidden_size, size),
            "compress_wgate": (c.hidden_size, size),
            "compress_ape": (RATIOS[kind], size),
        }
    if kind == "csa":
        shapes |= {
            "index_wq_b": (c.q_lora_rank, c.index_num_heads, c.index_head_dim),
            "index_weights": (c.hidden_size, c.index_num_heads),
            "index_wkv": (c.hidden_size, 2 * c.index_head_dim),
            "index_wgate": (c.hidden_size, 2 * c.index_head_dim),
            "index_ape": (RATIOS[kind], 2 * c.index_head_dim),
        }
    return shapes


def contract(spec: str, x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
    out = jnp.einsum(spec, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)


def low_rank_queries(params, x):
    return rms_normalize(contract("bsd,dr->bsr", x, params["wq_a"]), EPS)


def make_queries(params, inputs):
    x, cos, sin = inputs
    q = contract("bsr,rnh->bsnh", low_rank_queries(params, x), params["wq_b"])
    return apply_rope(rms_normalize(q, EPS), (cos[:, :, None], sin[:, :, None]))


def project(params, inputs, out):
    _, cos, sin = inputs
    out = apply_rope(out, (cos[:, :, None], sin[:, :, None]), inverse=True)
    groups = out.reshape(*out.shape[:2], CONFIG.o_groups, -1)
    return contract("bsgo,god->bsd", contract("bsgk,gko->bsgo", groups, params["wo_a"]), params["wo_b"])


def pool(values, logits, ape, windows: Windows):
    """Compressed entries of a stretch whose first `ratio` tokens belong to the stretch before."""
    m = windows.ratio
    v, g = (x.reshape(x.shape[0], -1, m, x.shape[-1]) for x in (values, logits))
    g = g + ape
    if windows.overlap:
        width = v.shape[-1] // 2
        v, g = (jnp.concatenate([x[:, :-1, :, :width], x[:, 1:, :, width:]], axis=2) for x in (v, g))
    else:
        v, g = v[:, 1:], g[:, 1:]
    return rms_normalize((jax.nn.softmax(g, axis=2) * v).sum(axis=2), EPS).astype(DTYPE)


def keys_of_stretches(kind: str, params, x, stretch: int):
    """Tokens' key-values, entries and index keys, before RoPE; a stretch at a time, again in the backward."""
    m, chunks = RATIOS[kind], to_chunks(x, stretch)
    before = chunks[:-1, :, -m:] if m else chunks[:-1, :, :0]
    before = jnp.concatenate([jnp.zeros_like(before[:1]) if before.shape[0] else chunks[:, :, :m], before])
    # Gradients of weights are summed over the stretches in the weights' dtype, so make it float32.
    names = [name for name in params if name.startswith(("wkv", "compress", "index_w", "index_ape"))]
    wide = {name: params[name].astype(jnp.float32) for name in names}

    @jax.checkpoint
    def one_stretch(parts):
        x, before = parts
        out = {"kv": rms_normalize(contract("bsd,dh->bsh", x, wide["wkv"]), EPS)}
        both = jnp.concatenate([before, x], axis=1)
        for name in ("compress", "index") if kind == "csa" else ("compress",) if kind == "hca" else ():
            here = jax.lax.stop_gradient(both) if name == "index" else both
            values = contract("bsd,dp->bsp", here, wide[f"{name}_wkv"], jnp.float32)
            logits = contract("bsd,dp->bsp", here, wide[f"{name}_wgate"], jnp.float32)
            out[name] = pool(values, logits, wide[f"{name}_ape"], Windows(m, kind == "csa"))
        return out

    made = jax.lax.map(one_stretch, (chunks, before))
    return {name: from_chunks(y, x.shape[1] if name == "kv" else x.shape[1] // m) for name, y in made.items()}


def select(params, x, tables, index_keys, visible: VisibleRange, stretch: int) -> Selected:
    """The indexer's choice, its queries made a stretch at a time."""
    params, x, index_keys = jax.lax.stop_gradient((params, x, index_keys))
    scale = (CONFIG.index_head_dim * CONFIG.index_num_heads) ** -0.5

    def one_stretch(parts):
        x, (cos, sin), visible = parts
        q = contract("bsr,rnh->bsnh", low_rank_queries(params, x), params["index_wq_b"])
        q = apply_rope(q, (cos[:, :, None], sin[:, :, None]))
        weights = contract("bsd,dn->bsn", x, params["index_weights"], jnp.float32) * scale
        return indexer_topk(q, index_keys, weights, visible, CONFIG.index_top_k, query_chunk=INDEX_CHUNK)

    parts = jax.tree.map(lambda part: to_chunks(part, stretch), (x, tables, visible))
    return Selected(from_chunks(jax.lax.map(one_stretch, parts), x.shape[1]))


def layer(kind: str, params, sink, x, stretch: int, query_chunk: int | None) -> jax.Array:
    """[1, S, D] -> [1, S, D]: one sublayer of the kind, of one document."""
    length, ratio = x.shape[1], RATIOS[kind]
    frequencies = rope_frequencies(CONFIG.rope_head_dim, CONFIG.rope_theta)
    positions = jnp.arange(length)[None]
    tables = rope_tables(positions, frequencies)
    made = keys_of_stretches(kind, params, x, stretch)
    kv = apply_rope(made["kv"], tables)
    entries, selection = None, None
    if ratio:
        starts = rope_tables(jnp.arange(length // ratio)[None] * ratio, frequencies)
        entries = apply_rope(made["compress"], starts)
        selection = VisibleRange(jnp.zeros_like(positions), (positions + 1) // ratio)
    if kind == "csa" and length // ratio > CONFIG.index_top_k:
        selection = select(params, x, tables, apply_rope(made["index"], starts), selection, stretch)
    return attend_in_chunks(
        make_queries,
        project,
        {name: params[name] for name in ("wq_a", "wq_b", "wo_a", "wo_b")},
        (x, *tables),
        kv,
        sink,
        positions + 1,
        entries,
        selection,
        scale=CONFIG.head_dim**-0.5,
        window=CONFIG.sliding_window,
        layer_chunk=stretch,
        query_chunk=query_chunk,
    )


def compile_layer(kind: str, length: int, *, topology: str, stretch: int, query_chunk: int | None):
    """The compiled step, and the seconds it took to trace and compile: on the clock and of all cores together."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shaped(shape, dtype=DTYPE):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(params, sink, x, dy):
        y, pull = jax.vjp(lambda *args: layer(kind, *args, stretch, query_chunk), params, sink, x)
        return y, pull(dy)

    params = {name: shaped(shape) for name, shape in weight_shapes(kind).items()}
    x = shaped((1, length, CONFIG.hidden_size))
    start = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(params, shaped((CONFIG.num_heads,), jnp.float32), x, x)
    compiled = lowered.compile()
    return compiled, (time.perf_counter() - start[0], time.process_time() - start[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--kinds", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--stretch", type=int, default=LAYER_CHUNK, help="queries projected at a time")
    parser.add_argument("--query-chunk", type=int, default=None, help="queries attended at a time")
    args = parser.parse_args()
    print(f"V4-Flash attention sublayer, forward + backward, bfloat16, one chip of {args.topology}, GiB")
    print("| layer | tokens | temporaries | peak | arguments + results | compile s | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        for length in args.lengths:
            compiled, seconds = compile_layer(
                kind, length, topology=args.topology, stretch=args.stretch, query_chunk=args.query_chunk
            )
            m = compiled.memory_analysis()
            sizes = m.temp_size_in_bytes, m.peak_memory_in_bytes, m.argument_size_in_bytes + m.output_size_in_bytes
            cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
            print(f"| {kind} | {length} | {cells} | {seconds[0]:.0f} | {seconds[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
