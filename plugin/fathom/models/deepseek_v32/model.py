"""DeepSeek-V3.2: embedding, the planned run of blocks, the head, and MTP.

Single-device mathematics: no mesh, no checkpoint, no loop. Letters: B batch, S sequence, D hidden, V vocab, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.decoder import Decoder, Features, Head, Statistics
from fathom.layers.documents import make_documents
from fathom.layers.embedding import HIDDEN
from fathom.layers.linear import Linear
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.norms import RMSNorm
from fathom.layers.options import ComputeOptions
from fathom.layers.router import GroupLimitedRouter
from fathom.mesh import constrain
from fathom.models.deepseek_v32.attention import Attention, LayerInputs, make_layer_inputs
from fathom.models.deepseek_v32.config import DeepseekV32Config


def make_moe(rngs: nnx.Rngs, config: DeepseekV32Config, dtype: str) -> MoE:
    """The mixture of experts of one block: group-limited sigmoid routing, experts without a clamp."""
    c = config
    common = dict(hidden_size=c.hidden_size, init_std=c.initializer_range, param_dtype=dtype)
    router = GroupLimitedRouter(
        rngs,
        num_groups=c.num_groups,
        groups_per_token=c.groups_per_token,
        num_experts=c.num_experts,
        top_k=c.num_experts_per_tok,
        scale=c.routed_scaling_factor,
        **common,
    )
    inner = c.moe_intermediate_size
    experts = Experts(rngs, intermediate_size=inner, num_experts=c.num_experts, limit=None, **common)
    shared = SharedExpert(rngs, intermediate_size=inner * c.num_shared_experts, limit=None, **common)
    return MoE(router, experts, shared)


def make_ffn(rngs: nnx.Rngs, config: DeepseekV32Config, kind: str, dtype: str) -> MoE | SharedExpert:
    """The feed-forward part of one block; `kind` is "dense" or "moe"."""
    if kind == "moe":
        return make_moe(rngs, config, dtype)
    return SharedExpert(
        rngs,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        limit=None,
        init_std=config.initializer_range,
        param_dtype=dtype,
    )


class Block(nnx.Module):
    """One decoder block: x + attn(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions, *, kind: str):
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, options.param_dtype
        self.kind = kind
        self.attn_norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.ffn_norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.attn = Attention(rngs, config, options)
        self.ffn = make_ffn(rngs, config, kind, dtype)

    def __call__(
        self, x_BSD: jax.Array, inputs: LayerInputs, routing_BSK: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """Hidden states after the block; "indexer": its indexer's loss, and "load" [E], "balance" and "indices"
        [B, S, K] of its router. `routing_BSK`: experts to use in place of its router's choice."""
        x = constrain(x_BSD, HIDDEN)
        attended, indexer = self.attn(self.attn_norm(x), inputs)
        x = x + constrain(attended, HIDDEN)
        normed, documents = self.ffn_norm(x), inputs.documents
        if self.kind == "dense":
            return constrain(x + self.ffn(normed).astype(x.dtype), HIDDEN), {"indexer": indexer}
        segments = None if documents.single else documents.segment_ids_BS
        y, stats = self.ffn(normed, inputs.tokens_BS, segments, routing_BSK)
        told = {"load": stats.load, "balance": stats.balance, "indices": stats.indices}
        return constrain(x + y, HIDDEN), {**told, "indexer": indexer}


def make_block(rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions, layer: int) -> Block:
    """The block of decoder layer `layer`."""
    return Block(rngs, config, options, kind=config.ffn_kinds[layer])


class MTP(nnx.Module):
    """Multi-token prediction: one block over the final normalised states and the next token's embedding.

    Attributes:
      enorm, hnorm: norms of the embedding and of the states. eh_proj: [2 D, D], the embedding's half first.
      block: a decoder block with experts. norm: before the model's head.
    """

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions):
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, options.param_dtype
        self.enorm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.hnorm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        axes = ("embed", "projection")
        self.eh_proj = Linear(rngs, (2 * size, size), axes, stddev=config.initializer_range, dtype=dtype)
        self.block = Block(rngs, config, options, kind="moe")
        self.norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)

    def __call__(
        self, hidden_BSD: jax.Array, next_embedding_BSD: jax.Array, inputs: LayerInputs, run_block: Any
    ) -> tuple[jax.Array, dict]:
        """Final hidden states [B, S, D] that predict the token after next, and the router's statistics."""
        both = jnp.concatenate([self.enorm(next_embedding_BSD), self.hnorm(hidden_BSD)], axis=-1)
        x, stats = run_block(self.block, self.eh_proj.contract("bsd,de->bse", both), inputs)
        return self.norm(x), stats


class DeepseekV32(Decoder):
    """The whole model."""

    def __init__(self, config: DeepseekV32Config, rngs: nnx.Rngs, options: ComputeOptions):
        if config.num_mtp_layers > 1:
            raise ValueError(
                f"the model has {config.num_mtp_layers} MTP stages; one is supported; set num_mtp_layers=0 to leave "
                "them out"
            )
        super().__init__(config, rngs, options, make_block)
        dtype = options.param_dtype
        self.mtp = nnx.List([MTP(rngs, config, options) for _ in range(config.num_mtp_layers)])
        self.norm = RMSNorm(rngs, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = Head(rngs, config.hidden_size, config.vocab_size, stddev=config.initializer_range, dtype=dtype)

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        return_streams: bool = False,
        routing: Mapping[str, jax.Array] | None = None,
        return_routing: bool = False,
    ) -> Features:
        """Runs everything but the heads; arguments as in `Decoder.features`. There is one stream."""
        documents = make_documents(tokens, positions, segment_ids)
        inputs = make_layer_inputs(self.config, tokens, documents)
        sums = ["balance", *(["indexer"] if self.options.indexer_loss else [])]
        statistics = Statistics(*sums, keep_routing=return_routing)
        x = self.embed(tokens, self.options.dtype)
        x, kept = self.run_layers(x, inputs, statistics, return_streams, routing)
        hidden, mtp_hidden = self.norm(x), []
        for i, stage in enumerate(self.mtp):
            experts = None if routing is None else routing.get(f"mtp/{i}/block")
            run_block = functools.partial(self.run_block, routing=experts, keep_routing=return_routing)
            following = self.embed(documents.roll_left(tokens), self.options.dtype)
            ahead, stats = stage(hidden, following, inputs, run_block)
            statistics.record(f"mtp/{i}/block", stats)
            mtp_hidden.append(ahead)
        streams = tuple(states[:, :, None] for states in kept)
        return Features(hidden, tuple(mtp_hidden), documents, statistics.aux(), streams)
