"""DeepSeek-V4: embedding, the planned run of blocks over n residual streams, the head, and MTP.

Single-device mathematics: no mesh, no checkpoint, no loop. Letters: B batch, S sequence, D hidden, n streams, V vocab,
E experts.
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
from fathom.layers.hyper_connections import HyperConnection, HyperHead, collapse, expand
from fathom.layers.linear import Linear
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.norms import RMSNorm
from fathom.layers.options import ComputeOptions
from fathom.layers.router import HashRouter, LearnedRouter
from fathom.mesh import constrain
from fathom.models.deepseek_v4.attention import Attention, LayerInputs, make_layer_inputs
from fathom.models.deepseek_v4.config import DeepseekV4Config

STREAMS = ("act_batch", "act_sequence", None, "act_embed")


def hyper_connection(rngs: nnx.Rngs, config: DeepseekV4Config) -> HyperConnection:
    """An mHC mixing of this config's size."""
    return HyperConnection(
        rngs,
        num_streams=config.hc_mult,
        hidden_size=config.hidden_size,
        iterations=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        stddev=config.initializer_range,
    )


def hyper_head(rngs: nnx.Rngs, config: DeepseekV4Config) -> HyperHead:
    """A final stream collapse of this config's size."""
    return HyperHead(
        rngs,
        num_streams=config.hc_mult,
        hidden_size=config.hidden_size,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        stddev=config.initializer_range,
    )


def make_moe(rngs: nnx.Rngs, config: DeepseekV4Config, router_kind: str, dtype: str) -> MoE:
    """The mixture of experts of one block; `router_kind` is "hash" or "learned"."""
    common = dict(
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
        init_std=config.initializer_range,
        param_dtype=dtype,
    )
    if router_kind == "hash":
        router = HashRouter(rngs, vocab_size=config.vocab_size, **common)
    else:
        router = LearnedRouter(rngs, **common)
    size = dict(
        hidden_size=config.hidden_size,
        limit=config.swiglu_limit,
        init_std=config.initializer_range,
        param_dtype=dtype,
    )
    inner = config.moe_intermediate_size
    experts = Experts(rngs, intermediate_size=inner, num_experts=config.num_experts, **size)
    shared = SharedExpert(rngs, intermediate_size=inner * config.num_shared_experts, **size)
    return MoE(router, experts, shared)


class Block(nnx.Module):
    """One decoder block: attention and MoE, each read from and written to the streams through mHC."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: DeepseekV4Config,
        options: ComputeOptions,
        *,
        kind: str,
        ratio: int,
        router_kind: str,
    ):
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, options.param_dtype
        self.attn_hc = hyper_connection(rngs, config)
        self.ffn_hc = hyper_connection(rngs, config)
        self.attn_norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.ffn_norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.attn = Attention(rngs, config, kind, ratio, options)
        self.ffn = make_moe(rngs, config, router_kind, dtype)

    def __call__(
        self, streams_BSnD: jax.Array, inputs: LayerInputs, routing_BSK: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """Streams after the block; {"load": [E], "balance": scalar, "indices": [B, S, K] or None} of its router,
        "indexer": its indexer's loss. `routing_BSK`: experts to use in place of its learned router's choice."""
        streams = constrain(streams_BSnD, STREAMS)
        mixing = self.attn_hc(streams)
        x = self.attn_norm(collapse(mixing.pre_nBS, streams))
        attended, indexer = self.attn(x, inputs)
        streams = expand(mixing, constrain(attended, HIDDEN), streams)
        mixing = self.ffn_hc(streams)
        x = self.ffn_norm(collapse(mixing.pre_nBS, streams))
        documents = inputs.documents
        segments = None if documents.single else documents.segment_ids_BS
        y, stats = self.ffn(x, inputs.tokens_BS, segments, routing_BSK)
        balance = jnp.zeros((), jnp.float32) if stats.balance is None else stats.balance
        streams = constrain(expand(mixing, constrain(y, HIDDEN), streams), STREAMS)
        return streams, {"load": stats.load, "balance": balance, "indexer": indexer, "indices": stats.indices}


def make_block(rngs: nnx.Rngs, config: DeepseekV4Config, options: ComputeOptions, layer: int) -> Block:
    """The block of decoder layer `layer`."""
    return Block(
        rngs,
        config,
        options,
        kind=config.attention_kinds[layer],
        ratio=config.compress_ratios[layer],
        router_kind=config.router_kinds[layer],
    )


class MTP(nnx.Module):
    """Multi-token prediction: one sliding block over the un-collapsed streams and the next token's embedding."""

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV4Config, options: ComputeOptions):
        size, eps, dtype = config.hidden_size, config.rms_norm_eps, options.param_dtype
        common = dict(stddev=config.initializer_range, dtype=dtype)
        self.enorm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.hnorm = RMSNorm(rngs, size, eps=eps, dtype=dtype)
        self.e_proj = Linear(rngs, (size, size), ("embed", "projection"), **common)
        self.h_proj = Linear(rngs, (size, size), ("embed", "projection"), **common)
        self.block = Block(rngs, config, options, kind="sliding", ratio=0, router_kind="learned")
        self.hc_head = hyper_head(rngs, config)
        self.norm = RMSNorm(rngs, size, eps=eps, dtype=dtype)

    def __call__(
        self,
        streams_BSnD: jax.Array,
        next_embedding_BSD: jax.Array,
        inputs: LayerInputs,
        run_block: Any,
    ) -> tuple[jax.Array, dict]:
        """Final hidden states [B, S, D] that predict the token after next, and the router's statistics."""
        embedded = self.e_proj.contract("bsd,de->bse", self.enorm(next_embedding_BSD))
        carried = self.h_proj.contract("bsnd,de->bsne", self.hnorm(streams_BSnD))
        streams, stats = run_block(self.block, embedded[:, :, None, :] + carried, inputs)
        return self.norm(self.hc_head(streams)), stats


class DeepseekV4(Decoder):
    """The whole model."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs, options: ComputeOptions):
        if config.num_mtp_layers > 1 or config.mtp_kind != "mtp":
            raise ValueError(
                f"the model has {config.num_mtp_layers} MTP stages of kind {config.mtp_kind!r}; one stage "
                "of kind 'mtp' is supported; set num_mtp_layers=0, mtp_kind='mtp' to leave them out"
            )
        super().__init__(config, rngs, options, make_block)
        dtype = options.param_dtype
        self.mtp = nnx.List([MTP(rngs, config, options) for _ in range(config.num_mtp_layers)])
        self.hc_head = hyper_head(rngs, config)
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
        """Runs everything but the heads; arguments as in `Decoder.features`."""
        documents = make_documents(tokens, positions, segment_ids)
        inputs = make_layer_inputs(self.config, tokens, documents)
        sums = ["balance", *(["indexer"] if self.options.indexer_loss else [])]
        statistics = Statistics(*sums, keep_routing=return_routing)
        embedded = self.embed(tokens, self.options.dtype)
        streams = jnp.repeat(embedded[:, :, None, :], self.config.hc_mult, axis=2)
        streams, kept = self.run_layers(streams, inputs, statistics, return_streams, routing)
        mtp_hidden = []
        for i, stage in enumerate(self.mtp):
            experts = None if routing is None else routing.get(f"mtp/{i}/block")
            run_block = functools.partial(self.run_block, routing=experts, keep_routing=return_routing)
            following = self.embed(documents.roll_left(tokens), self.options.dtype)
            hidden, stats = stage(streams, following, inputs, run_block)
            statistics.record(f"mtp/{i}/block", stats)
            mtp_hidden.append(hidden)
        hidden = self.norm(self.hc_head(streams))
        return Features(hidden, tuple(mtp_hidden), documents, statistics.aux(), kept)
