"""Parameters and training FLOPs of DeepSeek-V3.2 in closed form, from the config alone.

Letters: D hidden, N heads, Rq and R latents of queries and of key-values, H, P, V a head's channels without RoPE, with
RoPE, and of its value, E experts, K experts per token, F expert width, I dense width, k indexer top-k, S sequence
length.
"""

from __future__ import annotations

import dataclasses

from fathom.models.config_parts import visible_entries
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.zoo import ParamCount, StepShape


def attention_weights(config: DeepseekV32Config) -> int:
    """Matrix elements of one attention: D*Rq + Rq*N*(H+P) + D*(R+P) + R*N*(H+V) + N*V*D."""
    c = config
    queries = c.q_lora_rank * (c.hidden_size + c.num_heads * (c.nope_head_dim + c.rope_head_dim))
    latents = c.hidden_size * (c.kv_lora_rank + c.rope_head_dim)
    heads = c.kv_lora_rank * c.num_heads * (c.nope_head_dim + c.value_head_dim)
    return queries + latents + heads + c.num_heads * c.value_head_dim * c.hidden_size


def indexer_weights(config: DeepseekV32Config) -> int:
    """Matrix elements of one indexer: Rq*Ni*Hi + D*Hi + D*Ni."""
    c = config
    queries = c.q_lora_rank * c.index_num_heads * c.index_head_dim
    return queries + c.hidden_size * (c.index_head_dim + c.index_num_heads)


def expert_weights(config: DeepseekV32Config) -> int:
    """Matrix elements of one expert: 3*D*F."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def _block_params(config: DeepseekV32Config, kind: str) -> tuple[int, int]:
    """(all, active) parameters of one layer."""
    c = config
    norms = 2 * c.hidden_size + c.q_lora_rank + c.kv_lora_rank + 2 * c.index_head_dim
    common = attention_weights(c) + indexer_weights(c) + norms
    if kind == "dense":
        total = common + 3 * c.hidden_size * c.intermediate_size
        return total, total
    common += (c.hidden_size + 1) * c.num_experts + expert_weights(c) * c.num_shared_experts
    routed = expert_weights(c)
    return common + routed * c.num_experts, common + routed * c.num_experts_per_tok


def num_params(config: DeepseekV32Config) -> ParamCount:
    """Numbers of parameters: total and active.

    Both count every weight and the routers' selection bias. Total is `2*V*D + D + sum over layers and
    multi-token-prediction blocks`, the embedding and the head once. Active is what one token passes through when
    served: the main model (no multi-token prediction) with K of E experts a layer, and without the embedding, of
    which a token reads one row. So counted the released model has 683.5e9, of which 671.9e9 are the main model with
    its indexers, and 37.5e9 active.
    """
    c = config
    root = c.vocab_size * c.hidden_size + c.hidden_size  # head, norm
    total = root + c.vocab_size * c.hidden_size
    active = root
    for kind in c.ffn_kinds:
        of_block = _block_params(c, kind)
        total += of_block[0]
        active += of_block[1]
    mtp = _block_params(c, "moe")[0] + 2 * c.hidden_size**2 + 3 * c.hidden_size
    return ParamCount(total + c.num_mtp_layers * mtp, active)


def attention_flops(config: DeepseekV32Config, seq_len: int) -> float:
    """Forward FLOPs per token of one core attention, expanded: 2*N*(H+P+V) * selected tokens."""
    c = config
    width = c.nope_head_dim + c.rope_head_dim + c.value_head_dim
    return 2.0 * c.num_heads * width * visible_entries(seq_len, 1, c.index_top_k)


def indexer_flops(config: DeepseekV32Config, seq_len: int) -> float:
    """Forward FLOPs per token of one indexer: 2*weights + 2*Ni*Hi * visible tokens.

    0 where a row has no more tokens than top-k: all are taken and nothing is scored.
    """
    if seq_len <= config.index_top_k:
        return 0.0
    scored = config.index_num_heads * config.index_head_dim * visible_entries(seq_len, 1)
    return 2.0 * (indexer_weights(config) + scored)


def _block_flops(config: DeepseekV32Config, kind: str, seq_len: int) -> float:
    """Forward FLOPs per token of one layer without its indexer."""
    c = config
    weights = attention_weights(c)
    if kind == "dense":
        weights += 3 * c.hidden_size * c.intermediate_size
    else:
        weights += c.hidden_size * c.num_experts
        weights += expert_weights(c) * (c.num_experts_per_tok + c.num_shared_experts)
    return 2.0 * weights + attention_flops(c, seq_len)


def flops_per_token(config: DeepseekV32Config, seq_len: int) -> float:
    """Training FLOPs per token (multiply and add are 2) of rows of `seq_len` tokens, one document each.

    `3 * (layers + multi-token prediction + heads) + indexers`: the backward of a matrix product is two of them, and
    the language-model loss sends no gradient through the indexer, which counts once. Attention is what the causal
    sparse pattern needs in the expanded form, on average over the row; recomputation is not counted, nor elementwise
    work.

    Raises:
      ValueError: for a sequence shorter than 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len: found {seq_len}, expected at least 1")
    c = config
    head = 2.0 * c.vocab_size * c.hidden_size
    forward = head + sum(_block_flops(c, kind, seq_len) for kind in c.ffn_kinds)
    mtp = 4.0 * c.hidden_size**2 + _block_flops(c, "moe", seq_len) + head
    indexers = (c.num_layers + c.num_mtp_layers) * indexer_flops(c, seq_len)
    return 3.0 * (forward + c.num_mtp_layers * mtp) + indexers


def step_flops(config: DeepseekV32Config, shape: StepShape) -> dict[str, float]:
    """What a train step multiplies per token, by purpose.

    "model" is `flops_per_token`, in the stage "dense" with attention to all that is visible and without indexers, in
    "indexer-warmup" the forward alone. "latents" is what attention to selected tokens multiplies more in the absorbed
    form, which reads latents that no head needs expanded: 2*N*(2*R+P) for each instead of 2*N*(H+P+V). "indexer loss"
    and "again" are those of V4 (`fathom.models.deepseek_v4.formulas.step_flops`); experts and dense MLPs, with which a
    block ends, are made again by their own backwards only.

    Raises:
      ValueError: as `flops_per_token`.
    """
    c, seq_len, stage, passes = config, shape.sequence_length, shape.stage, shape.passes
    if stage != "sparse":
        c = dataclasses.replace(c, index_top_k=max(seq_len, c.index_top_k))
    layers = c.num_layers + c.num_mtp_layers
    seen = visible_entries(seq_len, 1, c.index_top_k)
    heads = (1 + c.num_mtp_layers) * 2.0 * c.vocab_size * c.hidden_size
    blocks = sum(_block_flops(c, kind, seq_len) for kind in (*c.ffn_kinds, *["moe"] * c.num_mtp_layers))
    blocks += c.num_mtp_layers * 4.0 * c.hidden_size**2
    attention = layers * (2.0 * attention_weights(c) + attention_flops(c, seq_len))
    absorbed = seq_len > c.index_top_k
    latents = 0.0
    if absorbed:
        latents = layers * (2.0 * c.num_heads * (2 * c.kv_lora_rank + c.rope_head_dim) * seen)
        latents -= layers * attention_flops(c, seq_len)
    channels = (c.kv_lora_rank if absorbed else c.nope_head_dim) + c.rope_head_dim
    targets = layers * 2.0 * c.num_heads * channels * seen
    scores = layers * 2.0 * c.index_num_heads * c.index_head_dim * seen
    loss = targets + 3 * scores + layers * 2.0 * indexer_weights(c) * (1 if stage == "sparse" else 2)
    if stage == "indexer-warmup":
        return {"model": blocks + heads, "latents": latents, "indexer loss": loss, "again": targets + scores}
    chosen = layers * indexer_flops(c, seq_len) if stage == "sparse" else 0.0
    again = min(passes, 2.0) * (blocks - attention) - (blocks - attention)
    again += (passes - 1) * (attention + latents) + heads + max(0.0, passes - 2) * chosen
    if stage == "dense":
        return {"model": 3.0 * (blocks + heads), "latents": 3.0 * latents, "again": again}
    return {
        "model": 3.0 * (blocks + heads) + chosen,
        "latents": 3.0 * latents,
        "indexer loss": loss,
        "again": again + targets + scores,
    }
