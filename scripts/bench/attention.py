#!/usr/bin/env python
"""Speed of one whole CSA attention layer, forward and backward, beside its peers, on this machine's CPU in float32.

    scripts/bench/attention.py [--lengths 2048 4096 8192 16384 32768] [--repeats 5] [--peers transformers dense]

V4-Flash's layer at reduced width: hidden 512, 4 heads x 512, queries of rank 128, output in 2 groups of rank 256,
indexer 8 heads x 64, top-k 512, window 128, ratio 4; batch 1, one document. Every step gives y and the gradients of x
and of every weight, given dy. The peers run in turn with ours, on the same weights and inputs:

    transformers  its eager `deepseek_v4` attention in PyTorch, with as many threads as THREADS says;
    dense         JAX as JAX frameworks write it: whole indexer scores, the selection as a mask, one softmax over
                  tokens and entries together, all of it under jit and autodiff; arrays laid out as is fastest here.

A peer that would need more than --limit-gib is left out. What `dense` needs is the compiler's figure; that of
`transformers` is calculated (`transformers_gib`).

Differences are relative L2. `transformers` adds its scores up in another order: where two entries at the edge of the
top-k score alike, it may take the other one, and that token's output is another.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.norms import rms_normalize
from fathom.layers.options import ComputeOptions
from fathom.layers.rope import apply_rope, rope_tables
from fathom.models.deepseek_v4.attention import Attention, compressed_frequencies, make_layer_inputs
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, normalise_name

RATIO, THREADS = 4, 2
CONFIG = dataclasses.replace(
    DeepseekV4Config.flash(),
    hidden_size=512,
    num_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=256,
    index_num_heads=8,
    index_head_dim=64,
    attention_kinds=("csa",),
    compress_ratios=(RATIO,),
    router_kinds=("learned",),
    num_experts=8,
    moe_intermediate_size=64,
    num_mtp_layers=0,
    initializer_range=512**-0.5,  # as wide as trained ones: the selection and the softmax are not flat
)
Step = Callable[[], tuple]
"""Runs once and returns y and the gradient of x, both [1, S, D], then whatever else was made."""


def make_layer():
    """(graph definition, weights) of the layer; what starts at zero is random instead."""
    layer = Attention(nnx.Rngs(0), CONFIG, "csa", RATIO, ComputeOptions(dtype="float32"))
    for key, weight in enumerate((layer.sink, layer.compressor.ape, layer.indexer.compressor.ape)):
        weight[...] = jax.random.normal(jax.random.key(key), weight[...].shape)
    return nnx.split(layer)


def compiled(forward: Callable, state, x, dy) -> tuple[Step, float]:
    """The step of `forward(state, x)`, compiled, and the GiB that it needs."""

    def step(state, x, dy):
        y, pull = jax.vjp(forward, state, x)
        dstate, dx = pull(dy)
        return y, dx, dstate

    program = jax.jit(step).lower(state, x, dy).compile()
    memory = program.memory_analysis()
    needs = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return lambda: jax.block_until_ready(program(state, x, dy)), needs / 2**30


def ours(graphdef) -> Callable:
    def forward(state, x):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)
        inputs = make_layer_inputs(CONFIG, tokens, make_documents(tokens, None, None))
        return nnx.merge(graphdef, state)(x, inputs)[0]

    return forward


def dense(state, x):
    """[1, S, D] -> [1, S, D], everything whole. `state` holds the weights of our layer."""
    c, w, length = CONFIG, nnx.to_pure_dict(state), x.shape[1]
    positions = jnp.arange(length)
    rope = rope_tables(positions[None], compressed_frequencies(c))
    entry_rope = rope_tables(jnp.arange(length // RATIO)[None] * RATIO, compressed_frequencies(c))
    head_rope = tuple(table[:, :, None] for table in rope)
    qr = normed(w["q_norm"], jnp.einsum("bsd,dr->bsr", x, w["wq_a"]["weight"]))
    q = jnp.einsum("bsr,rnh->bsnh", qr, w["wq_b"]["weight"])
    q = apply_rope(rms_normalize(q, c.rms_norm_eps), head_rope)
    kv = apply_rope(normed(w["kv_norm"], jnp.einsum("bsd,dh->bsh", x, w["wkv"]["weight"])), rope)
    entries = apply_rope(pooled(w["compressor"], x), entry_rope)
    distance = positions[:, None] - positions
    window = (distance >= 0) & (distance < c.sliding_window)
    selected = selection_mask(*jax.lax.stop_gradient((w["indexer"], x, qr)), head_rope, entry_rope)
    mask = jnp.concatenate([jnp.broadcast_to(window, (x.shape[0], *window.shape)), selected], axis=-1)
    out = masked_attention(q, jnp.concatenate([kv, entries], axis=1), mask, w["sink"])
    groups = apply_rope(out, head_rope, inverse=True).reshape(*x.shape[:2], c.o_groups, -1)
    latent = jnp.einsum("bsgk,gko->bsgo", groups, w["wo_a"]["weight"])
    return jnp.einsum("bsgo,god->bsd", latent, w["wo_b"]["weight"])


def normed(norm, x):
    return norm["weight"] * rms_normalize(x, CONFIG.rms_norm_eps)


def pooled(w, x):
    """CSA's compressed entries [B, E, H] before RoPE: each of its own window and of the one before."""
    batch, entries = x.shape[0], x.shape[1] // RATIO
    values, logits = (
        jnp.einsum("bsd,dp->bsp", x[:, : entries * RATIO], w[name]["weight"]).reshape(batch, entries, RATIO, 2, -1)
        for name in ("wkv", "wgate")
    )
    logits += w["ape"].reshape(RATIO, 2, -1)
    before = jnp.pad(logits[:, :-1, :, 0], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)
    probabilities = jax.nn.softmax(jnp.concatenate([before, logits[:, :, :, 1]], axis=2), axis=2)
    both = jnp.concatenate([jnp.roll(values[:, :, :, 0], 1, axis=1), values[:, :, :, 1]], axis=2)
    return normed(w["norm"], (probabilities * both).sum(axis=2))


def selection_mask(w, x, qr, head_rope, entry_rope):
    """bool [B, S, E]: the top-k visible entries of each query, by the threshold that the last one sets."""
    c = CONFIG
    q = apply_rope(jnp.einsum("bsr,rnh->bsnh", qr, w["wq_b"]["weight"]), head_rope)
    k = apply_rope(pooled(w["compressor"], x), entry_rope)
    weights = jnp.einsum("bsd,dn->bsn", x, w["weights_proj"]["weight"])
    weights *= (c.index_head_dim * c.index_num_heads) ** -0.5
    by_head = jax.nn.relu(jnp.einsum("bsnh,beh->bsne", q, k))
    places = jnp.arange(k.shape[1])
    visible = places < (jnp.arange(x.shape[1])[:, None] + 1) // RATIO
    scores = jnp.where(visible, jnp.einsum("bsne,bsn->bse", by_head, weights), -jnp.inf)
    values, indices = jax.lax.top_k(scores, min(c.index_top_k, k.shape[1]))
    threshold, last = values[..., -1:], indices[..., -1:]
    # Of equal scores the lowest places are taken, so the last one taken tells them from the rest.
    return visible & ((scores > threshold) | ((scores == threshold) & (places <= last)))


def masked_attention(q, keys, mask, sink):
    """q [B, S, N, H] over keys = values [B, T, H] under mask [B, S, T], the sinks [N] in the denominator."""
    logits = jnp.einsum("bsnh,bth->bsnt", q, keys) * CONFIG.head_dim**-0.5
    logits = jnp.where(mask[:, :, None], logits, -jnp.inf)
    most = jnp.maximum(logits.max(axis=-1, keepdims=True), sink[:, None])
    weights = jnp.exp(logits - jax.lax.stop_gradient(most))
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink[:, None] - jax.lax.stop_gradient(most))
    return jnp.einsum("bsnt,bth->bsnh", weights, keys) / total


def transformers_gib(length: int) -> float:
    """What a step of the eager layer holds at its peak, in GiB.

    The indexer's scores by head at once in three forms, then the attention's logits [N, S, S + E] in four, of the
    backward, beside the two masks.
    """
    entries, c = length // RATIO, CONFIG
    scores = 3 * c.index_num_heads * length * entries
    attention = (4 * c.num_heads + 2) * length * (length + entries)
    return 4 * max(scores, attention) / 2**30


def transformers(state, x, dy) -> Step:
    """The step of the eager layer with our weights."""
    import torch
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config as HFConfig

    torch.set_num_threads(THREADS)
    config = HFConfig(**CONFIG.to_hf_config())
    config._attn_implementation = "eager"
    layer = hf.DeepseekV4Attention(config, 0)
    flat = {path: np.asarray(weight.get_value()) for path, weight in nnx.to_flat_state(state)}
    tensors = {tensor.name: tensor for tensor in hub_tensors(CONFIG)}
    for name, weight in layer.named_parameters():
        tensor = tensors[normalise_name(f"layers.0.self_attn.{name}")]
        path = tensor.path[tensor.path.index("attn") + 1 :]
        weight.data = torch.tensor(tensor.to_hub(flat[path])).reshape(weight.shape)

    x, dy = (torch.tensor(np.asarray(value)) for value in (x, dy))
    x.requires_grad_()
    length = x.shape[1]
    positions = torch.arange(length)[None]
    rotary = hf.DeepseekV4RotaryEmbedding(config)
    rope = {kind: rotary(x.detach(), positions, layer_type=kind) for kind in ("main", "compress")}
    distance = positions[0][:, None] - positions[0]
    mask = torch.where((distance >= 0) & (distance < CONFIG.sliding_window), 0.0, -torch.inf)[None, None]
    weights = list(layer.parameters())

    def step():
        y = layer(x, rope, positions, mask)[0]
        dx, *rest = torch.autograd.grad(y, (x, *weights), dy, allow_unused=True)  # the indexer has no gradient
        return y.detach().numpy(), dx.numpy(), rest

    return step


def measure(steps: dict[str, Step], repeats: int) -> tuple[dict[str, float], dict[str, list[np.ndarray]]]:
    """Median seconds of each, taken in turn after one run unmeasured; and y and dx of each."""
    times, results = {name: [] for name in steps}, {}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            made = step()
            times[name].append(time.perf_counter() - begin)
            if turn == 0:
                results[name] = [np.array(value) for value in made[:2]]
            del made
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}, results


def differences(ours: list[np.ndarray], theirs: list[np.ndarray]) -> str:
    """How far y and dx of ours are from a peer's, both [1, S, D]."""
    y, dx = (np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True))
    of_tokens = np.linalg.norm(ours[0] - theirs[0], axis=-1) / np.linalg.norm(theirs[0], axis=-1)
    return f"y differs by {y:.1e} (by over 1e-4 at {(of_tokens > 1e-4).sum()} tokens), dx by {dx:.1e}"


def one_length(length: int, peers: list[str], repeats: int, limit_gib: float) -> float:
    """Measures and prints one length; seconds per token of ours."""
    graphdef, state = make_layer()
    x, dy = (jax.random.normal(jax.random.key(10 + i), (1, length, CONFIG.hidden_size)) for i in range(2))
    step, needs = compiled(ours(graphdef), state, x, dy)
    steps, notes = {"ours": step}, {"ours": f"needs {needs:.1f} GiB"}
    for name in peers:
        if name == "dense":
            step, needs = compiled(dense, state, x, dy)
        else:
            step, needs = None, transformers_gib(length)
        notes[name] = f"needs {needs:.1f} GiB"
        if needs <= limit_gib:
            steps[name] = step or transformers(state, x, dy)
    seconds, results = measure(steps, repeats)
    for name, note in notes.items():
        line = f"skipped: {note}"
        if name in seconds:
            line = f"{seconds[name]:8.3f} s {1e6 * seconds[name] / length:8.1f} us/token   {note}"
        if name in seconds and name != "ours":
            ratio = seconds[name] / seconds["ours"]
            line += f"   {ratio:5.2f}x ours   {differences(results['ours'], results[name])}"
        print(f"S {length:>5}  {name:<12}  {line}", flush=True)
    return seconds["ours"] / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=["transformers", "dense"], choices=["transformers", "dense"])
    parser.add_argument("--limit-gib", type=float, default=10.0, help="leave out peers that need more than this")
    arguments = parser.parse_args()
    print(f"median of {arguments.repeats}; peers that need more than {arguments.limit_gib:g} GiB are skipped")
    per_token = {}
    for length in arguments.lengths:
        per_token[length] = one_length(length, arguments.peers, arguments.repeats, arguments.limit_gib)
    for length in sorted(per_token):
        if 2 * length in per_token:
            growth = per_token[2 * length] / per_token[length]
            print(f"ours, time per token at {2 * length} over that at {length}: {growth:.2f}")


if __name__ == "__main__":
    main()
