"""Parameters and training FLOPs of DeepSeek-V4 in closed form, from the config alone.

Letters: D hidden, N heads, H head_dim, R q_lora, G o_groups, O o_lora, E experts, K experts per
token, F expert width, n streams, V vocabulary, m compress ratio, W window, k indexer top-k, S
sequence length.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from fathom.models.config_parts import visible_entries
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.chunked_layer import stretch_length
from fathom.zoo import ParamCount, StepShape


def attention_weights(config: DeepseekV4Config) -> int:
    """Matrix elements every attention has: D*R + R*N*H + D*H + N*H*O + G*O*D."""
    c = config
    heads = c.num_heads * c.head_dim
    queries = c.hidden_size * c.q_lora_rank + c.q_lora_rank * heads
    output = heads * c.o_lora_rank + c.o_groups * c.o_lora_rank * c.hidden_size
    return queries + c.hidden_size * c.head_dim + output


def compressor_weights(config: DeepseekV4Config, kind: str) -> int:
    """Matrix elements of wkv and wgate: 2*D*H for hca, 2*D*2H for csa's overlapping windows."""
    width = {"sliding": 0, "hca": config.head_dim, "csa": 2 * config.head_dim}[kind]
    return 2 * config.hidden_size * width


def indexer_weights(config: DeepseekV4Config) -> int:
    """Matrix elements of one indexer: R*Ni*Hi + D*Ni + 2*D*2Hi."""
    c = config
    queries = c.q_lora_rank * c.index_num_heads * c.index_head_dim
    return queries + c.hidden_size * (c.index_num_heads + 4 * c.index_head_dim)


def expert_weights(config: DeepseekV4Config) -> int:
    """Matrix elements of one expert: 3*D*F."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def hyper_connection_weights(config: DeepseekV4Config) -> int:
    """fn of one hyper-connection: (2+n)*n * n*D."""
    n = config.hc_mult
    return (2 + n) * n * n * config.hidden_size


def _attention_vectors(config: DeepseekV4Config, kind: str, ratio: int) -> int:
    """Norms and sinks, and the compressors' norms and position biases."""
    total = config.q_lora_rank + config.head_dim + config.num_heads
    if kind == "hca":
        total += config.head_dim + ratio * config.head_dim
    if kind == "csa":
        total += sum(
            width + ratio * 2 * width for width in (config.head_dim, config.index_head_dim)
        )
    return total


def _block_params(config: DeepseekV4Config, kind: str, ratio: int, router: str) -> tuple[int, int]:
    """(all, active) parameters of one layer."""
    c = config
    shared = attention_weights(c) + compressor_weights(c, kind) + _attention_vectors(c, kind, ratio)
    if kind == "csa":
        shared += indexer_weights(c)
    n = c.hc_mult
    shared += 2 * (hyper_connection_weights(c) + (2 + n) * n + 3) + 2 * c.hidden_size
    shared += c.hidden_size * c.num_experts + (c.num_experts if router == "learned" else 0)
    shared += expert_weights(c) * c.num_shared_experts
    routed = expert_weights(c)
    return shared + routed * c.num_experts, shared + routed * c.num_experts_per_tok


def num_params(config: DeepseekV4Config) -> ParamCount:
    """Numbers of parameters: total and active.

    Both count every weight and the routers' selection bias, not the integer hash tables. Total is
    `2*V*D + sum over layers and multi-token-prediction blocks`; a layer's sum is attention,
    compressor, indexer, hyper-connections, norms, router, shared expert and E experts. Active is
    what one token passes through when served: the main model (no multi-token prediction) with K of
    E experts a layer, and without the embedding, of which a token reads one row. So counted, Flash
    has 290.9e9, of which 284.3e9 are the main model the paper counts, and 13.3e9 active.

    Raises:
      ValueError: for DSpark's blocks.
    """
    config.require_plain_mtp()
    c, n = config, config.hc_mult
    collapse = n * n * c.hidden_size + n + 1
    root = c.vocab_size * c.hidden_size + c.hidden_size + collapse  # head, norm, hc_head
    total = root + c.vocab_size * c.hidden_size
    active = root
    for kind, ratio, router in c.layer_kinds:
        of_block = _block_params(c, kind, ratio, router)
        total += of_block[0]
        active += of_block[1]
    mtp_block, _ = _block_params(c, "sliding", 0, "learned")
    mtp = mtp_block + 2 * c.hidden_size**2 + 3 * c.hidden_size + collapse
    return ParamCount(total + c.num_mtp_layers * mtp, active)


def window_keys(seq_len: int, window: int) -> float:
    """Mean over queries t = 1..S of min(t, W): keys of the sliding window."""
    full = min(seq_len, window)
    return (full * (full + 1) // 2 + window * max(0, seq_len - window)) / seq_len


def attention_flops(config: DeepseekV4Config, kind: str, ratio: int, seq_len: int) -> float:
    """Forward FLOPs per token of one core attention: 4*N*H * (window keys + selected entries)."""
    keys = window_keys(seq_len, config.sliding_window)
    if kind == "csa":
        keys += visible_entries(seq_len, ratio, config.index_top_k)
    if kind == "hca":
        keys += visible_entries(seq_len, ratio)
    return 4.0 * config.num_heads * config.head_dim * keys


def indexer_flops(config: DeepseekV4Config, ratio: int, seq_len: int) -> float:
    """Forward FLOPs per token of one indexer: 2*weights + 2*Ni*Hi * visible entries.

    0 where a row has no more entries than top-k: all are taken and nothing is scored.
    """
    if seq_len // ratio <= config.index_top_k:
        return 0.0
    scored = config.index_num_heads * config.index_head_dim * visible_entries(seq_len, ratio)
    return 2.0 * (indexer_weights(config) + scored)


def _block_flops(config: DeepseekV4Config, kind: str, ratio: int, seq_len: int) -> float:
    """Forward FLOPs per token of one layer without its indexer."""
    c, n = config, config.hc_mult
    weights = attention_weights(c) + compressor_weights(c, kind) + c.hidden_size * c.num_experts
    weights += expert_weights(c) * (c.num_experts_per_tok + c.num_shared_experts)
    # Each of the two hyper-connections: its projection, the stream sum and the stream mixing.
    weights += 2 * (hyper_connection_weights(c) + c.hidden_size * (2 * n + n * n))
    return 2.0 * weights + attention_flops(c, kind, ratio, seq_len)


def flops_per_token(config: DeepseekV4Config, seq_len: int) -> float:
    """Training FLOPs per token (multiply and add are 2) of rows of `seq_len` tokens, one document
    each.

    `3 * (layers + multi-token prediction + heads) + indexers`: the backward of a matrix product is
    two of them, and the language-model loss sends no gradient through the indexer, which counts
    once. Attention is what the causal sparse pattern needs, on average over the row; recomputation
    is not counted, nor elementwise work. Multi-token prediction is D*D on the embedding and on each
    of n streams, a sliding layer and the head a second time.

    Raises:
      ValueError: for a sequence shorter than 1, and for DSpark's blocks.
    """
    config.require_plain_mtp()
    if seq_len < 1:
        raise ValueError(f"seq_len: found {seq_len}, expected at least 1")
    c, n = config, config.hc_mult
    head = 2.0 * (c.vocab_size * c.hidden_size + c.hidden_size * (n * n + n))
    forward, indexers = head, 0.0
    for kind, ratio, _ in c.layer_kinds:
        forward += _block_flops(c, kind, ratio, seq_len)
        if kind == "csa":
            indexers += indexer_flops(c, ratio, seq_len)
    mtp = 2.0 * (1 + n) * c.hidden_size**2 + _block_flops(c, "sliding", 0, seq_len) + head
    return 3.0 * (forward + c.num_mtp_layers * mtp) + indexers


def step_flops(config: DeepseekV4Config, shape: StepShape) -> dict[str, float]:
    """What a train step multiplies per token, by purpose.

    "model" is `flops_per_token`, in the stage "dense" with attention to all that is visible and without indexers, in
    "indexer-warmup" the forward alone. "indexer loss" is the targets' queries and their product, the scores forward and
    twice backward, and the gradients of the indexers' weights, which alone train there. "again" is what is made again
    for the backward: blocks as told, heads, targets and scores once, and the choice of entries with its block.

    Raises:
      ValueError: as `flops_per_token`.
    """
    c, n, seq_len, stage, passes = config, config.hc_mult, shape.sequence_length, shape.stage, shape.passes
    held = shape.stretch or stretch_length(c.num_heads // shape.heads_cut, c.head_dim, jnp.dtype(shape.dtype))
    # Few enough queries are held within a block's backward, which has to make them again then; others always are.
    attention_passes = passes if shape.tokens > held else max(2.0, passes - 1)
    if stage != "sparse":
        c = dataclasses.replace(c, index_top_k=max(seq_len, c.index_top_k))
    kinds = [(kind, ratio) for kind, ratio, _ in c.layer_kinds] + [("sliding", 0)] * c.num_mtp_layers
    heads = (1 + c.num_mtp_layers) * 2.0 * c.hidden_size * (c.vocab_size + n * n + n)
    blocks = sum(_block_flops(c, kind, ratio, seq_len) for kind, ratio in kinds)
    blocks += c.num_mtp_layers * 2.0 * (1 + n) * c.hidden_size**2
    attention = sum(attention_flops(c, kind, ratio, seq_len) for kind, ratio in kinds)
    attention += len(kinds) * 2.0 * attention_weights(c)
    chosen = loss = loss_again = 0.0
    for ratio in (ratio for kind, ratio in kinds if kind == "csa" and stage != "dense"):
        seen = visible_entries(seq_len, ratio, c.index_top_k)
        targets = 2.0 * c.num_heads * c.head_dim * (seen + c.q_lora_rank)
        scores = 2.0 * c.index_num_heads * c.index_head_dim * seen
        weights = 2.0 * indexer_weights(c)
        chosen += indexer_flops(c, ratio, seq_len)
        loss += targets + 3 * scores + weights * (1 if stage == "sparse" else 2)
        loss_again += targets + scores
    if stage == "indexer-warmup":
        return {"model": blocks + heads, "indexer loss": loss, "again": loss_again}
    again = (passes - 1) * (blocks - attention) + (attention_passes - 1) * attention + heads + loss_again
    return {
        "model": 3.0 * (blocks + heads) + chosen,
        "indexer loss": loss,
        "again": again + max(0.0, passes - 2) * chosen,
    }
