"""V4 attention: sliding, compressed sparse (CSA) and heavily compressed (HCA), one module for the three kinds.

Shared-KV multi-query attention with per-head sinks; RoPE on the trailing channels of queries and of the shared
key-values, turned back on the output; grouped low-rank output projection (README.md "Attention").
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fathom.layers.documents import Documents, Windows
from fathom.layers.indexer import BaseIndexer, Choice, indexer_loss
from fathom.layers.linear import Linear
from fathom.layers.norms import RMSNorm, rms_normalize
from fathom.layers.options import ComputeOptions
from fathom.layers.param import constant, param
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies
from fathom.mesh import constrain
from fathom.models.deepseek_v4.compressors import Compressor
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.indexer_kl import Teacher
from fathom.ops.quantization import hadamard, simulate_fp4, simulate_fp8
from fathom.ops.selection import VisibleRange
from fathom.ops.sparse_mqa import banded_sparse_mqa

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


class Indexer(BaseIndexer):
    """V4's: keys from an overlapping compressor of its own, RoPE on the last channels, entries that have closed."""

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV4Config, ratio: int, options: ComputeOptions):
        stddev = config.initializer_range
        super().__init__(
            rngs,
            hidden_size=config.hidden_size,
            q_lora_rank=config.q_lora_rank,
            num_heads=config.index_num_heads,
            head_dim=config.index_head_dim,
            top_k=config.index_top_k,
            stddev=stddev,
            options=options,
        )
        self.compressor = Compressor(
            rngs,
            hidden_size=config.hidden_size,
            width=config.index_head_dim,
            ratio=ratio,
            overlap=True,
            eps=config.rms_norm_eps,
            stddev=stddev,
            dtype=options.param_dtype,
        )

    def visible(self, inputs: LayerInputs) -> tuple[VisibleRange, int]:
        windows = inputs.windows[self.compressor.ratio]
        return VisibleRange(windows.begin_BS, windows.end_BS), windows.num_entries

    def rotate_queries(self, q_BSNH: jax.Array, inputs: LayerInputs) -> jax.Array:
        cos, sin = inputs.rope["compress"]
        return apply_rope(q_BSNH, (cos[:, :, None], sin[:, :, None]))

    def keys(self, x_BSD: jax.Array, inputs: LayerInputs) -> jax.Array:
        ratio = self.compressor.ratio
        return apply_rope(self.compressor(x_BSD, inputs.windows[ratio]), inputs.entry_rope[ratio])

    def simulate(self, x: jax.Array) -> jax.Array:
        return simulate_fp4(hadamard(x), INDEX_QUANT_BLOCK)


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

    def __call__(self, x_BSD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> [B, S, D], 0 for a padding token; and the indexer's loss, a float32 sum over queries."""
        c = self.config
        rope = inputs.rope["main" if self.kind == "sliding" else "compress"]
        head_rope = (rope[0][:, :, None], rope[1][:, :, None])
        qr = self.q_norm(self.wq_a.contract("bsd,dr->bsr", x_BSD))
        q = self.wq_b.contract("bsr,rnh->bsnh", qr)
        q = apply_rope(rms_normalize(q, c.rms_norm_eps), head_rope)
        q = constrain(q, ("act_batch", "act_sequence", "act_heads", None))
        kv = apply_rope(self.kv_norm(self.wkv.contract("bsd,dh->bsh", x_BSD)), rope)
        entries, choice = self._compressed(x_BSD, qr, inputs)
        scale = c.head_dim**-0.5
        out, lse = banded_sparse_mqa(
            q,
            self._simulate_kv(kv),
            self.sink[...],
            inputs.documents.band(c.sliding_window),
            entries,
            choice.selection,
            scale=scale,
            window=c.sliding_window,
            implementation=self.options.attention,
            query_chunk=self.options.query_chunk,
            return_lse=True,
        )
        loss = indexer_loss(choice, Teacher(q, entries, lse, scale), self.options.query_chunk)
        out = apply_rope(checkpoint_name(out, "attention"), head_rope, inverse=True)
        groups = out.reshape(*out.shape[:2], c.o_groups, -1)
        return self.wo_b.contract("bsgo,god->bsd", self._project_groups(groups)), loss

    def _project_groups(self, groups_BSGK: jax.Array) -> jax.Array:
        """Each group of heads through its own matrix: [B, S, G, O]."""
        if groups_BSGK.dtype == jnp.float32:
            return self.wo_a.contract("bsgk,gko->bsgo", groups_BSGK)
        # Groups first: XLA's CPU has no bfloat16 product whose batch dimension stands elsewhere.
        latent = self.wo_a.contract("gbsk,gko->gbso", jnp.moveaxis(groups_BSGK, 2, 0))
        return jnp.moveaxis(latent, 0, 2)

    def _compressed(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array | None, Choice]:
        """The layer's compressed entries and which of them each query sees."""
        if self.kind == "sliding":
            return None, Choice(None, None)
        windows = inputs.windows[self.ratio]
        if windows.num_entries == 0:
            return None, Choice(None, None)
        entries = apply_rope(self.compressor(x_BSD, windows), inputs.entry_rope[self.ratio])
        entries = self._simulate_kv(entries)
        if self.kind == "hca":
            return entries, Choice(VisibleRange(windows.begin_BS, windows.end_BS), None)
        return entries, self.indexer(x_BSD, qr_BSR, inputs)

    def _simulate_kv(self, kv: jax.Array) -> jax.Array:
        """FP8 rounding of the channels without RoPE, as the released cache stores them."""
        if not self.options.simulate_quant:
            return kv
        plain = self.config.head_dim - self.config.rope_head_dim
        rounded = simulate_fp8(kv[..., :plain], KV_QUANT_BLOCK)
        return jnp.concatenate([rounded, kv[..., plain:]], axis=-1)
