"""V4 attention: sliding, compressed sparse (CSA) and heavily compressed (HCA), one module for the three kinds.

Shared-KV multi-query attention with per-head sinks; RoPE on the trailing channels of queries and of the shared
key-values, turned back on the output; grouped low-rank output projection (README.md "Attention").
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fathom.layers.documents import Documents, Windows
from fathom.layers.linear import Linear
from fathom.layers.norms import RMSNorm, rms_normalize
from fathom.layers.options import ComputeOptions
from fathom.layers.param import constant, param
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies
from fathom.mesh import constrain, split_axes
from fathom.models.deepseek_v4.compressors import Compressor
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.attention import Selected, Selection, VisibleRange, shared_kv_attention
from fathom.ops.indexer import indexer_topk
from fathom.ops.quantization import hadamard, simulate_fp4, simulate_fp8

KV_QUANT_BLOCK = 64
INDEX_QUANT_BLOCK = 32
Tables = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What every layer reads and no weight changes, computed once per forward pass.

    Attributes:
      tokens_BS: input ids (hash routing needs them at every layer).
      documents: where the documents lie.
      windows: compression ratio -> its windows.
      rope: "main" or "compress" -> (cos, sin) at the tokens, [B, S, rope_head_dim / 2].
      entry_rope: compression ratio -> (cos, sin) at the entries, [B, E, rope_head_dim / 2].
    """

    tokens_BS: jax.Array
    documents: Documents
    windows: dict[int, Windows]
    rope: dict[str, Tables]
    entry_rope: dict[int, Tables]


def make_layer_inputs(
    config: DeepseekV4Config, tokens_BS: jax.Array, documents: Documents
) -> LayerInputs:
    """Windows and RoPE tables for every ratio of the config; YaRN exactly where a layer compresses."""
    main = rope_frequencies(config.rope_head_dim, config.rope_theta)
    compress = compressed_frequencies(config)
    windows = {ratio: documents.windows(ratio) for ratio in sorted(set(config.compress_ratios) - {0})}
    return LayerInputs(
        tokens_BS=tokens_BS,
        documents=documents,
        windows=windows,
        rope={
            "main": rope_tables(documents.positions_BS, main),
            "compress": rope_tables(documents.positions_BS, compress),
        },
        entry_rope={ratio: rope_tables(w.start_BE, compress) for ratio, w in windows.items()},
    )


def compressed_frequencies(config: DeepseekV4Config):
    """RoPE frequencies of everything in a layer that compresses: its own theta, with YaRN where configured."""
    scaling = config.rope_scaling
    if scaling is None:
        return rope_frequencies(config.rope_head_dim, config.compress_rope_theta)
    return yarn_frequencies(
        config.rope_head_dim,
        config.compress_rope_theta,
        factor=scaling.factor,
        original_length=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
    )


class Indexer(nnx.Module):
    """The lightning indexer: scores compressed entries and selects the top_k per query."""

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV4Config, ratio: int, options: ComputeOptions):
        self.top_k, self.options = config.index_top_k, options
        heads, width = config.index_num_heads, config.index_head_dim
        self.weight_scale = width**-0.5 * heads**-0.5
        common = dict(stddev=config.initializer_range, dtype=options.param_dtype)
        self.wq_b = Linear(
            rngs,
            (config.q_lora_rank, heads, width),
            ("q_lora_in", "index_heads", None),
            **common,
        )
        self.weights_proj = Linear(
            rngs, (config.hidden_size, heads), ("embed", "index_heads"), **common
        )
        self.compressor = Compressor(
            rngs,
            hidden_size=config.hidden_size,
            width=width,
            ratio=ratio,
            overlap=True,
            eps=config.rms_norm_eps,
            **common,
        )

    def __call__(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: LayerInputs, windows: Windows
    ) -> Selection:
        """Which entries each query attends to. No scoring when the row has no more entries than top_k."""
        visible = VisibleRange(windows.begin_BS, windows.end_BS)
        if windows.num_entries <= self.top_k or self.options.stage == "dense":
            return visible
        # Selection is discrete: the language-model loss never reaches the indexer.
        x_BSD, qr_BSR = jax.lax.stop_gradient((x_BSD, qr_BSR))
        cos, sin = inputs.rope["compress"]
        q = self.wq_b.contract("bsr,rnh->bsnh", qr_BSR)
        q = apply_rope(q, (cos[:, :, None], sin[:, :, None]))
        k = apply_rope(self.compressor(x_BSD, windows), inputs.entry_rope[windows.ratio])
        if self.options.simulate_quant:
            q = simulate_fp4(hadamard(q), INDEX_QUANT_BLOCK)
            k = simulate_fp4(hadamard(k), INDEX_QUANT_BLOCK)
        weights = self.weights_proj.contract("bsd,dn->bsn", x_BSD, jnp.float32)
        indices = self._select(q, k, weights * self.weight_scale, visible)
        return Selected(checkpoint_name(indices, "selected_entries"))

    def _select(
        self, q: jax.Array, k: jax.Array, weights: jax.Array, visible: VisibleRange
    ) -> jax.Array:
        """`indexer_topk`, each device for its own queries."""
        select = functools.partial(
            indexer_topk, top_k=self.top_k, query_chunk=self.options.query_chunk
        )
        batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
        if not batch + sequence:
            return select(q, k, weights, visible)
        # XLA would gather the scores of the whole batch on every device: it does not partition top_k.
        queries, keys = PartitionSpec(batch or None, sequence or None), PartitionSpec(batch or None)
        in_specs = (queries, keys, queries, VisibleRange(queries, queries))
        return jax.shard_map(select, in_specs=in_specs, out_specs=queries)(q, k, weights, visible)


class Attention(nnx.Module):
    """One attention sublayer; `kind` is "sliding", "csa" or "hca".

    Attributes:
      wq_a [D, R], q_norm, wq_b [R, N, H]: low-rank queries. wkv [D, H], kv_norm: the shared key-values.
      sink: float32 [N]. wo_a [G, N*H/G, O], wo_b [G, O, D]: grouped output projection.
      compressor, indexer: only where the kind has them.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: DeepseekV4Config,
        kind: str,
        ratio: int,
        options: ComputeOptions,
    ):
        self.config, self.kind, self.ratio, self.options = config, kind, ratio, options
        c, eps = config, config.rms_norm_eps
        common = dict(stddev=c.initializer_range, dtype=options.param_dtype)
        self.wq_a = Linear(rngs, (c.hidden_size, c.q_lora_rank), ("embed", "q_lora"), **common)
        self.q_norm = RMSNorm(rngs, c.q_lora_rank, eps=eps, dtype=options.param_dtype)
        self.wq_b = Linear(
            rngs, (c.q_lora_rank, c.num_heads, c.head_dim), ("q_lora_in", "heads", None), **common
        )
        self.wkv = Linear(rngs, (c.hidden_size, c.head_dim), ("embed", "head_dim"), **common)
        self.kv_norm = RMSNorm(rngs, c.head_dim, eps=eps, dtype=options.param_dtype)
        self.sink = param(
            rngs.params(), (c.num_heads,), constant(0.0), axes=("heads",), dtype="float32"
        )
        group = c.num_heads * c.head_dim // c.o_groups
        self.wo_a = Linear(
            rngs, (c.o_groups, group, c.o_lora_rank), ("o_groups", "o_group_in", None), **common
        )
        self.wo_b = Linear(
            rngs, (c.o_groups, c.o_lora_rank, c.hidden_size), ("o_groups", None, "embed"), **common
        )
        if kind != "sliding":
            self.compressor = Compressor(
                rngs,
                hidden_size=c.hidden_size,
                width=c.head_dim,
                ratio=ratio,
                overlap=kind == "csa",
                eps=eps,
                **common,
            )
        if kind == "csa":
            self.indexer = Indexer(rngs, config, ratio, options)

    def __call__(self, x_BSD: jax.Array, inputs: LayerInputs) -> jax.Array:
        """[B, S, D] -> [B, S, D]; a padding token's output is 0."""
        c = self.config
        rope = inputs.rope["main" if self.kind == "sliding" else "compress"]
        head_rope = (rope[0][:, :, None], rope[1][:, :, None])
        qr = self.q_norm(self.wq_a.contract("bsd,dr->bsr", x_BSD))
        q = self.wq_b.contract("bsr,rnh->bsnh", qr)
        q = apply_rope(rms_normalize(q, c.rms_norm_eps), head_rope)
        q = constrain(q, ("act_batch", "act_sequence", "act_heads", None))
        kv = apply_rope(self.kv_norm(self.wkv.contract("bsd,dh->bsh", x_BSD)), rope)
        entries, selection = self._compressed(x_BSD, qr, inputs)
        out = shared_kv_attention(
            q,
            self._simulate_kv(kv),
            self.sink[...],
            inputs.documents.band(c.sliding_window),
            entries,
            selection,
            scale=c.head_dim**-0.5,
            window=c.sliding_window,
            implementation=self.options.attention,
            query_chunk=self.options.query_chunk,
        )
        out = apply_rope(checkpoint_name(out, "attention"), head_rope, inverse=True)
        groups = out.reshape(*out.shape[:2], c.o_groups, -1)
        return self.wo_b.contract("bsgo,god->bsd", self._project_groups(groups))

    def _project_groups(self, groups_BSGK: jax.Array) -> jax.Array:
        """Each group of heads through its own matrix: [B, S, G, O]."""
        if groups_BSGK.dtype == jnp.float32:
            return self.wo_a.contract("bsgk,gko->bsgo", groups_BSGK)
        # Groups first: XLA's CPU has no bfloat16 product whose batch dimension stands elsewhere.
        latent = self.wo_a.contract("gbsk,gko->gbso", jnp.moveaxis(groups_BSGK, 2, 0))
        return jnp.moveaxis(latent, 0, 2)

    def _compressed(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array | None, Selection]:
        """The layer's compressed entries and which of them each query sees."""
        if self.kind == "sliding":
            return None, None
        windows = inputs.windows[self.ratio]
        if windows.num_entries == 0:
            return None, None
        entries = apply_rope(self.compressor(x_BSD, windows), inputs.entry_rope[self.ratio])
        entries = self._simulate_kv(entries)
        if self.kind == "hca":
            return entries, VisibleRange(windows.begin_BS, windows.end_BS)
        return entries, self.indexer(x_BSD, qr_BSR, inputs, windows)

    def _simulate_kv(self, kv: jax.Array) -> jax.Array:
        """FP8 rounding of the channels without RoPE, as the released cache stores them."""
        if not self.options.simulate_quant:
            return kv
        plain = self.config.head_dim - self.config.rope_head_dim
        rounded = simulate_fp8(kv[..., :plain], KV_QUANT_BLOCK)
        return jnp.concatenate([rounded, kv[..., plain:]], axis=-1)
