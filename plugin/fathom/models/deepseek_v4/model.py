"""DeepSeek-V4: embedding, the planned run of blocks over n residual streams, the head, and MTP.

Single-device mathematics: no mesh, no checkpoint, no loop. Letters: B batch, S sequence, D hidden, n streams, V vocab,
E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.documents import Documents, make_documents
from fathom.layers.hyper_connections import HyperConnection, HyperHead, collapse, expand
from fathom.layers.linear import Linear
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.norms import RMSNorm
from fathom.layers.options import ComputeOptions
from fathom.layers.param import normal, param
from fathom.layers.remat import remat
from fathom.layers.router import HashRouter, LearnedRouter
from fathom.mesh import constrain
from fathom.models.deepseek_v4.attention import Attention, LayerInputs, make_layer_inputs
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.embedding import embedding_lookup
from fathom.ops.precision import precision_of

STREAMS = ("act_batch", "act_sequence", None, "act_embed")
HIDDEN = ("act_batch", "act_sequence", "act_embed")


class Output(NamedTuple):
    """Result of a forward pass.

    logits [B, S, V] float32; mtp_logits likewise, or None without MTP; aux: losses and statistics, see
    `Features.aux`; streams: after each layer [B, S, n, D], empty unless asked for.
    """

    logits: jax.Array
    mtp_logits: jax.Array | None
    aux: dict[str, Any]
    streams: tuple[jax.Array, ...]


class Features(NamedTuple):
    """Everything before the head, so that a loss can apply it in chunks.

    hidden [B, S, D]: final normalised states; mtp_hidden: one [B, S, D] per MTP stage; documents: the layout of
    the rows; aux: "balance" (float32, summed over valid tokens and learned layers), "indexer" (where options ask for
    it: the indexers' loss, summed over tokens and layers) and "expert_load" (block path -> float32 token counts
    [..., E]).
    """

    hidden: jax.Array
    mtp_hidden: tuple[jax.Array, ...]
    documents: Documents
    aux: dict[str, Any]
    streams: tuple[jax.Array, ...]


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, rngs: nnx.Rngs, vocab: int, hidden: int, *, stddev: float, dtype: str):
        self.weight = param(
            rngs.params(), (vocab, hidden), normal(stddev), axes=("vocab", "embed"), dtype=dtype
        )

    def __call__(self, tokens_BS: jax.Array, dtype: str) -> jax.Array:
        def spread(table: jax.Array) -> jax.Array:
            return constrain(table, ("vocab", "act_embed"))

        return constrain(embedding_lookup(self.weight[...], tokens_BS, dtype, spread), HIDDEN)


class Head(nnx.Module):
    """Prediction head [D, V]."""

    def __init__(self, rngs: nnx.Rngs, hidden: int, vocab: int, *, stddev: float, dtype: str):
        self.weight = param(
            rngs.params(), (hidden, vocab), normal(stddev), axes=("embed", "vocab"), dtype=dtype
        )

    def kernel(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel in the compute dtype, gathered once over the axes that shard its rows."""
        return constrain(self.weight[...].astype(dtype), ("act_embed", "vocab"))

    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        """float32 logits [B, S, V]."""
        kernel = self.kernel(hidden_BSD.dtype)
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden_BSD,
            kernel,
            precision=precision_of(hidden_BSD),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits, ("act_batch", "act_sequence", "act_vocab"))


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

    def __call__(self, streams_BSnD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, dict]:
        """Streams after the block; {"load": [E], "balance": scalar} of its router, "indexer": its indexer's loss."""
        streams = constrain(streams_BSnD, STREAMS)
        mixing = self.attn_hc(streams)
        x = self.attn_norm(collapse(mixing.pre_nBS, streams))
        attended, indexer = self.attn(x, inputs)
        streams = expand(mixing, constrain(attended, HIDDEN), streams)
        mixing = self.ffn_hc(streams)
        x = self.ffn_norm(collapse(mixing.pre_nBS, streams))
        documents = inputs.documents
        segments = None if documents.single else documents.segment_ids_BS
        y, stats = self.ffn(x, inputs.tokens_BS, segments)
        balance = jnp.zeros((), jnp.float32) if stats.balance is None else stats.balance
        streams = constrain(expand(mixing, constrain(y, HIDDEN), streams), STREAMS)
        return streams, {"load": stats.load, "balance": balance, "indexer": indexer}


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


class DeepseekV4(nnx.Module):
    """The whole model. `prefix` and `suffix` blocks are unrolled; `repeated` holds one unit of blocks whose
    weights are stacked over the repeats and scanned (config.plan)."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs, options: ComputeOptions):
        if config.num_mtp_layers > 1 or config.mtp_kind != "mtp":
            raise ValueError(
                f"the model has {config.num_mtp_layers} MTP stages of kind {config.mtp_kind!r}; one stage "
                "of kind 'mtp' is supported; set num_mtp_layers=0, mtp_kind='mtp' to leave them out"
            )
        self.config, self.options = config, options
        plan, dtype = config.plan, options.param_dtype
        common = dict(stddev=config.initializer_range, dtype=dtype)
        self.embed = Embedding(rngs, config.vocab_size, config.hidden_size, **common)
        self.prefix = nnx.List([make_block(rngs, config, options, i) for i in plan.prefix])
        self.repeated = nnx.List(
            [
                _stacked_block(rngs, config, options, len(plan.prefix) + u, plan.repeats)
                for u in range(plan.unit if plan.repeats else 0)
            ]
        )
        self.suffix = nnx.List([make_block(rngs, config, options, i) for i in plan.suffix])
        self.mtp = nnx.List([MTP(rngs, config, options) for _ in range(config.num_mtp_layers)])
        self.hc_head = hyper_head(rngs, config)
        self.norm = RMSNorm(rngs, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = Head(rngs, config.hidden_size, config.vocab_size, **common)

    def layer(self, index: int) -> Block:
        """The block of decoder layer `index`, wherever the plan keeps it; a scanned layer's weights are copied.

        Raises:
          IndexError: when there is no such layer.
        """
        plan = self.config.plan
        if not 0 <= index < self.config.num_layers:
            raise IndexError(f"layer {index}: the model has layers 0 to {self.config.num_layers - 1}")
        if index in plan.prefix:
            return self.prefix[index]
        if index in plan.suffix:
            return self.suffix[index - plan.suffix.start]
        repeat, unit = divmod(index - len(plan.prefix), plan.unit)
        graphdef, state = nnx.split(self.repeated[unit])
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[repeat], state))

    def _run_block(self, block: Block, streams: jax.Array, inputs: LayerInputs):
        graphdef, state = nnx.split(block)

        def run(state, streams, inputs):
            return nnx.merge(graphdef, state)(streams, inputs)

        return remat(run, self.options.remat)(state, streams, inputs)

    def _scan(self, streams: jax.Array, inputs: LayerInputs, keep_streams: bool):
        """The repeated run: one scan step applies every block of the unit."""
        graphdef, state = nnx.split(self.repeated)

        def step(streams, layer_state):
            stats, kept = [], []
            for block in nnx.merge(graphdef, layer_state):
                streams, block_stats = self._run_block(block, streams, inputs)
                stats.append(block_stats)
                kept.append(streams if keep_streams else None)
            return streams, (stats, kept)

        return jax.lax.scan(step, streams, state)

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        return_streams: bool = False,
    ) -> Features:
        """Runs everything but the heads; arguments as in `__call__`."""
        documents = make_documents(tokens, positions, segment_ids)
        inputs = make_layer_inputs(self.config, tokens, documents)
        embedded = self.embed(tokens, self.options.dtype)
        streams = jnp.repeat(embedded[:, :, None, :], self.config.hc_mult, axis=2)
        load, sums, kept = {}, dict.fromkeys(("balance", "indexer"), jnp.zeros((), jnp.float32)), []

        def record(name: str, stats: dict) -> None:
            load[name] = stats["load"]
            for part in sums:
                sums[part] = sums[part] + jnp.sum(stats[part])

        for i, block in enumerate(self.prefix):
            streams, stats = self._run_block(block, streams, inputs)
            record(f"prefix/{i}", stats)
            kept.append(streams)
        if len(self.repeated):
            streams, (unit_stats, unit_streams) = self._scan(streams, inputs, return_streams)
            for u, stats in enumerate(unit_stats):
                record(f"repeated/{u}", stats)
            if return_streams:
                kept += [s[r] for r in range(self.config.plan.repeats) for s in unit_streams]
        for i, block in enumerate(self.suffix):
            streams, stats = self._run_block(block, streams, inputs)
            record(f"suffix/{i}", stats)
            kept.append(streams)
        mtp_hidden = []
        for i, stage in enumerate(self.mtp):
            following = self.embed(documents.roll_left(tokens), self.options.dtype)
            hidden, stats = stage(streams, following, inputs, self._run_block)
            record(f"mtp/{i}/block", stats)
            mtp_hidden.append(hidden)
        if not self.options.indexer_loss:
            del sums["indexer"]
        return Features(
            hidden=self.norm(self.hc_head(streams)),
            mtp_hidden=tuple(mtp_hidden),
            documents=documents,
            aux={**sums, "expert_load": load},
            streams=tuple(kept) if return_streams else (),
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        return_streams: bool = False,
    ) -> Output:
        """Logits of every position.

        Args:
          tokens: int [B, S] in [0, vocab_size).
          positions: int [B, S], restarting at 0 with each document.
          segment_ids: int [B, S], documents counted from 1, 0 for padding. Without both, a row is one document.
          return_streams: also return the residual streams after each layer.

        Raises:
          ValueError: for ids outside the vocabulary (checked whenever the values are known), shapes that differ.
        """
        self._check_tokens(tokens)
        features = self.features(
            jnp.asarray(tokens), positions, segment_ids, return_streams=return_streams
        )
        mtp = self.head(features.mtp_hidden[0]) if features.mtp_hidden else None
        return Output(self.head(features.hidden), mtp, features.aux, features.streams)

    def _check_tokens(self, tokens: jax.Array) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}, expected [batch, sequence]")
        if isinstance(tokens, jax.core.Tracer):
            return
        ids = np.asarray(tokens)
        bad = np.argwhere((ids < 0) | (ids >= self.config.vocab_size))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"token id {ids[row, column]} at row {row}, position {column} is outside the vocabulary "
                f"[0, {self.config.vocab_size}); {len(bad)} such ids in all"
            )


def _stacked_block(
    rngs: nnx.Rngs, config: DeepseekV4Config, options: ComputeOptions, layer: int, repeats: int
) -> Block:
    """`repeats` copies of a layer's block with different weights, stacked on a leading "layers" axis."""
    keys = jax.random.split(rngs.params(), repeats)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: make_block(nnx.Rngs(params=0), config, options, layer))
    )

    def weights(key: jax.Array) -> nnx.State:
        return nnx.state(make_block(nnx.Rngs(params=key), config, options, layer))

    block = nnx.merge(graphdef, jax.vmap(weights)(keys))
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable):
            axes = variable.get_metadata()["out_sharding"]
            variable.set_metadata(out_sharding=("layers", *axes))
    return block
