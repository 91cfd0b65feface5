"""DeepSeek-V3.2: embedding, the planned run of blocks, the head, and MTP.

Single-device mathematics: no mesh, no checkpoint, no loop. Letters: B batch, S sequence, D hidden, V vocab, E experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.linear import Linear
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.norms import RMSNorm
from fathom.layers.options import ComputeOptions
from fathom.layers.remat import remat
from fathom.layers.router import GroupLimitedRouter
from fathom.mesh import constrain
from fathom.models.deepseek_v4.model import HIDDEN, Embedding, Features, Head, Output
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

    def __call__(self, x_BSD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, dict]:
        """Hidden states after the block; "indexer": its indexer's loss, and "load" [E] and "balance" of its router."""
        x = constrain(x_BSD, HIDDEN)
        attended, indexer = self.attn(self.attn_norm(x), inputs)
        x = x + constrain(attended, HIDDEN)
        normed, documents = self.ffn_norm(x), inputs.documents
        if self.kind == "dense":
            return constrain(x + self.ffn(normed).astype(x.dtype), HIDDEN), {"indexer": indexer}
        segments = None if documents.single else documents.segment_ids_BS
        y, stats = self.ffn(normed, inputs.tokens_BS, segments)
        return constrain(x + y, HIDDEN), {"load": stats.load, "balance": stats.balance, "indexer": indexer}


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


class DeepseekV32(nnx.Module):
    """The whole model. `prefix` and `suffix` blocks are unrolled; `repeated` holds one unit of blocks whose
    weights are stacked over the repeats and scanned (config.plan)."""

    def __init__(self, config: DeepseekV32Config, rngs: nnx.Rngs, options: ComputeOptions):
        if config.num_mtp_layers > 1:
            raise ValueError(
                f"the model has {config.num_mtp_layers} MTP stages; one is supported; set num_mtp_layers=0 to leave "
                "them out"
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

    def _run_block(self, block: Block, x: jax.Array, inputs: LayerInputs):
        graphdef, state = nnx.split(block)

        def run(state, x, inputs):
            return nnx.merge(graphdef, state)(x, inputs)

        return remat(run, self.options.remat)(state, x, inputs)

    def _scan(self, x: jax.Array, inputs: LayerInputs, keep: bool):
        """The repeated run: one scan step applies every block of the unit."""
        graphdef, state = nnx.split(self.repeated)

        def step(x, layer_state):
            stats, kept = [], []
            for block in nnx.merge(graphdef, layer_state):
                x, block_stats = self._run_block(block, x, inputs)
                stats.append(block_stats)
                kept.append(x if keep else None)
            return x, (stats, kept)

        return jax.lax.scan(step, x, state)

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
        x = self.embed(tokens, self.options.dtype)
        load, sums, kept = {}, dict.fromkeys(("balance", "indexer"), jnp.zeros((), jnp.float32)), []

        def record(name: str, stats: dict) -> None:
            if "load" in stats:
                load[name] = stats["load"]
            for part in sums.keys() & stats.keys():
                sums[part] = sums[part] + jnp.sum(stats[part])

        for i, block in enumerate(self.prefix):
            x, stats = self._run_block(block, x, inputs)
            record(f"prefix/{i}", stats)
            kept.append(x)
        if len(self.repeated):
            x, (unit_stats, unit_kept) = self._scan(x, inputs, return_streams)
            for u, stats in enumerate(unit_stats):
                record(f"repeated/{u}", stats)
            if return_streams:
                kept += [states[r] for r in range(self.config.plan.repeats) for states in unit_kept]
        for i, block in enumerate(self.suffix):
            x, stats = self._run_block(block, x, inputs)
            record(f"suffix/{i}", stats)
            kept.append(x)
        hidden, mtp_hidden = self.norm(x), []
        for i, stage in enumerate(self.mtp):
            following = self.embed(documents.roll_left(tokens), self.options.dtype)
            ahead, stats = stage(hidden, following, inputs, self._run_block)
            record(f"mtp/{i}/block", stats)
            mtp_hidden.append(ahead)
        if not self.options.indexer_loss:
            del sums["indexer"]
        return Features(
            hidden=hidden,
            mtp_hidden=tuple(mtp_hidden),
            documents=documents,
            aux={**sums, "expert_load": load},
            # One stream: the shape that a model with several has.
            streams=tuple(states[:, :, None] for states in kept) if return_streams else (),
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
          return_streams: also return the hidden states after each layer, [B, S, 1, D].

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
    rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions, layer: int, repeats: int
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
