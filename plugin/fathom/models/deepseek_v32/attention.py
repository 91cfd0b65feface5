"""V3.2 attention: multi-head latent attention over the tokens that a lightning indexer selects (README.md "Attention").

RoPE turns interleaved pairs in the attention and half-split pairs in the indexer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.documents import Documents
from fathom.layers.indexer import Asked, BaseIndexer, TeacherParts
from fathom.layers.linear import Linear, contract
from fathom.layers.norms import RMSNorm
from fathom.layers.options import ComputeOptions
from fathom.layers.param import HEADS_IN, HEADS_OUT, MATRIX, Matrix, constant, param
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies
from fathom.layers.shards import QUERIES, START, Place, Shard, mirror_queries, per_device
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.mla import Latents, absorbed_queries, choose, latent_attention, sizes_of
from fathom.ops.chunked_layer import attend_in_chunks, stretch_length
from fathom.ops.quantization import hadamard, simulate_fp8
from fathom.ops.selection import Selection, VisibleRange

LATENT_EPS = 1e-6
"""eps of the latents' norms and of the indexer's: the reference has it here whatever the config says elsewhere."""
INDEX_QUANT_BLOCK = 128
Tables = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What every layer reads and no weight changes, computed once per forward pass.

    Attributes:
      tokens_BS: input ids.
      documents: where the documents lie.
      visible: the tokens each query sees: those of its document up to itself; none for padding.
      rope: (cos, sin) at the tokens, [B, S, rope_head_dim / 2].
      row_length: static, tokens of a whole row, of which a device may hold a part.
    """

    tokens_BS: jax.Array
    documents: Documents
    visible: VisibleRange
    rope: Tables
    row_length: int = dataclasses.field(metadata={"static": True})

    def kinds(self) -> LayerInputs:
        """The same tree with each array's kind, see layers/shards.py."""
        return jax.tree.map(lambda _: QUERIES, self)


def main_frequencies(config: DeepseekV32Config):
    """RoPE frequencies, with YaRN where configured: float32 [rope_head_dim / 2]."""
    scaling = config.rope_scaling
    if scaling is None:
        return rope_frequencies(config.rope_head_dim, config.rope_theta)
    return yarn_frequencies(
        config.rope_head_dim,
        config.rope_theta,
        factor=scaling.factor,
        original_length=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
    )


def main_tables(config: DeepseekV32Config, positions: jax.Array) -> Tables:
    """cos and sin of positions [...]: float32 [..., rope_head_dim / 2], with YaRN's amplitude."""
    cos, sin = rope_tables(positions, main_frequencies(config))
    amplitude = config.rope_amplitude
    return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)


def visible_tokens(documents: Documents) -> VisibleRange:
    """The range of token indices each query sees."""
    positions = documents.positions_BS
    index = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
    if documents.single:
        return VisibleRange(jnp.zeros_like(index), index + 1)
    valid = documents.valid_BS
    return VisibleRange(jnp.where(valid, index - positions, 0), jnp.where(valid, index + 1, 0))


def make_layer_inputs(config: DeepseekV32Config, tokens_BS: jax.Array, documents: Documents) -> LayerInputs:
    """The visible ranges and RoPE tables of a batch."""
    rope = main_tables(config, documents.positions_BS)
    return LayerInputs(tokens_BS, documents, visible_tokens(documents), rope, tokens_BS.shape[1])


def apply_rope_halves(x: jax.Array, tables: Tables) -> jax.Array:
    """Turns the pairs (i, i + P/2) of x's first P = 2 * tables.shape[-1] channels; the others pass unchanged.

    Args:
      x: [..., H]. tables: (cos, sin), each broadcastable to [..., P/2].

    Returns:
      x's shape and dtype; the rotation is done in float32.
    """
    cos, sin = tables
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    low, high = turned[..., :half], turned[..., half:]
    out = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return jnp.concatenate([out.astype(x.dtype), rest], axis=-1)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32, cast to x's dtype.

    Attributes:
      weight, bias: float32 [size].
    """

    def __init__(self, rngs: nnx.Rngs, size: int, *, eps: float):
        self.eps = eps
        self.weight = param(rngs.params(), (size,), constant(1.0), axes=("norm",), dtype="float32")
        self.bias = param(rngs.params(), (size,), constant(0.0), axes=("norm",), dtype="float32")

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class Indexer(BaseIndexer):
    """V3.2's: a key per token from a projection and a LayerNorm, RoPE on the first channels, half-split.

    Attributes:
      wk: [D, H]. k_norm: LayerNorm over H. weights_proj is float32, as its product is.
    """

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions):
        super().__init__(
            rngs,
            hidden_size=config.hidden_size,
            q_lora_rank=config.q_lora_rank,
            num_heads=config.index_num_heads,
            head_dim=config.index_head_dim,
            top_k=config.index_top_k,
            stddev=config.initializer_range,
            options=options,
            weights_dtype="float32",
        )
        shape, axes = (config.hidden_size, config.index_head_dim), ("embed", "head_dim")
        self.wk = Linear(rngs, shape, axes, stddev=config.initializer_range, dtype=options.param_dtype)
        self.k_norm = LayerNorm(rngs, config.index_head_dim, eps=LATENT_EPS)

    def visible(self, inputs: LayerInputs) -> tuple[VisibleRange, int]:
        return inputs.visible, inputs.row_length

    def tables(self, inputs: LayerInputs) -> Tables:
        return inputs.rope

    def rotate(self, x: jax.Array, tables: Tables) -> jax.Array:
        return apply_rope_halves(x, tables)

    def keys(self, x_BSD: jax.Array, inputs: LayerInputs, place: Place = START) -> jax.Array:
        keys = apply_rope_halves(self.k_norm(self.wk.contract("bsd,dh->bsh", x_BSD)), inputs.rope)
        return place.shard.gather(keys)

    def simulate(self, x: jax.Array) -> jax.Array:
        return simulate_fp8(hadamard(x), min(INDEX_QUANT_BLOCK, x.shape[-1]))

    def head_weights(self, x_BSD: jax.Array) -> jax.Array:
        return self.weights_proj.contract("bsd,dn->bsn", x_BSD.astype(jnp.float32))


class Projections(NamedTuple):
    """A device's low-rank queries `qr_BSR`, which the indexer reads too, and the latents [c ; r] of the whole row."""

    qr_BSR: jax.Array
    latents_BTR: jax.Array


class Attention(nnx.Module):
    """One attention sublayer.

    Attributes:
      wq_a [D, Rq], q_norm, wq_b [Rq, N, H + P]: low-rank queries.
      wkv_a [D, R + P], kv_norm, wkv_b [R, N, H + V]: latents with the shared rotary key; keys and values from latents.
      wo: [N, V, D]. indexer: which tokens each query attends to.
    """

    def __init__(self, rngs: nnx.Rngs, config: DeepseekV32Config, options: ComputeOptions):
        self.config, self.options = config, options
        c, heads = config, config.num_heads
        norm = dict(eps=LATENT_EPS, dtype=options.param_dtype)

        def linear(shape: tuple[int, ...], axes: tuple[str | None, ...], matrix: Matrix) -> Linear:
            return Linear(rngs, shape, axes, stddev=c.initializer_range, dtype=options.param_dtype, matrix=matrix)

        self.wq_a = linear((c.hidden_size, c.q_lora_rank), ("embed", "q_lora"), MATRIX)
        self.q_norm = RMSNorm(rngs, c.q_lora_rank, **norm)
        width = c.nope_head_dim + c.rope_head_dim
        # Queries with and without position, latents and the rotary key, keys and values: matrices of their own.
        matrix = HEADS_OUT._replace(parts=(c.nope_head_dim, c.rope_head_dim))
        self.wq_b = linear((c.q_lora_rank, heads, width), ("q_lora_in", "heads", None), matrix)
        parts = (c.kv_lora_rank, c.rope_head_dim)
        self.wkv_a = linear((c.hidden_size, sum(parts)), ("embed", "kv_lora"), Matrix(parts=parts))
        self.kv_norm = RMSNorm(rngs, c.kv_lora_rank, **norm)
        width = c.nope_head_dim + c.value_head_dim
        matrix = HEADS_OUT._replace(parts=(c.nope_head_dim, c.value_head_dim))
        self.wkv_b = linear((c.kv_lora_rank, heads, width), ("kv_lora_in", "heads", None), matrix)
        self.wo = linear((heads, c.value_head_dim, c.hidden_size), ("heads", None, "embed"), HEADS_IN)
        self.indexer = Indexer(rngs, config, options)

    def project(self, x_BSD: jax.Array, inputs: LayerInputs, place: Place = START) -> Projections:
        """Low-rank queries, and latents with the shared rotary keys behind them."""
        rank = self.config.kv_lora_rank
        qr = self.q_norm(self.wq_a.contract("bsd,dr->bsr", x_BSD))
        kv = self.wkv_a.contract("bsd,dr->bsr", x_BSD)
        kv = jnp.concatenate([self.kv_norm(kv[..., :rank]), apply_rope(kv[..., rank:], inputs.rope)], axis=-1)
        return Projections(qr, place.shard.gather(kv))

    def attend(
        self, projections: Projections, selection: Selection, inputs: LayerInputs, place: Place = START
    ) -> tuple[jax.Array, jax.Array]:
        """The attention's output projected, [B, S, D], and the log-sum-exp of the scores, [B, S, N]; of a long sequence
        in the absorbed form in stretches."""
        c, options = self.config, self.options
        weights = {name: getattr(self, name).weight[...] for name in ("wq_b", "wkv_b", "wo")}
        parts = projections.qr_BSR, inputs.rope
        dtype = jnp.dtype(jnp.float32 if place.shard.heads else projections.qr_BSR.dtype)
        project = functools.partial(_project_output, dtype)
        sizes = sizes_of(projections.latents_BTR, weights["wkv_b"], c.nope_head_dim)
        chosen = choose(sizes, selection, implementation=options.attention, form=options.mla_form)
        if place.stretch is not None and parts[0].shape[1] > place.stretch and chosen.form == "absorbed":
            return attend_in_chunks(
                functools.partial(_absorbed_queries, c.nope_head_dim),
                functools.partial(_project_latents, dtype, c.nope_head_dim),
                weights,
                parts,
                None,
                jnp.full(weights["wq_b"].shape[1], -jnp.inf, jnp.float32),
                None,
                projections.latents_BTR,
                selection,
                scale=c.softmax_scale,
                window=0,
                value_dim=c.kv_lora_rank,
                implementation="gathered" if chosen.implementation == "gathered" else "masked",
                query_chunk=options.query_chunk,
                layer_chunk=place.stretch,
            )
        out, lse = latent_attention(
            _latents(c.nope_head_dim, weights, parts, projections.latents_BTR),
            selection,
            scale=c.softmax_scale,
            single=inputs.documents.single and place.shard.count == 1,
            implementation=options.attention,
            form=options.mla_form,
            query_chunk=options.query_chunk,
        )
        return project(weights, out), lse

    def __call__(self, x_BSD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> [B, S, D], 0 for a padding token; and the indexer's loss, a float32 sum over queries."""
        return per_device(self, Attention.on_device, x_BSD, inputs, inputs.kinds())

    def on_device(self, shard: Shard, x_BSD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        """`__call__` on one device's tokens and heads."""
        c = self.config
        width = c.kv_lora_rank + c.rope_head_dim  # of a query in the absorbed form
        stretch = self.options.stretch or stretch_length(self.wq_b.weight.shape[1], width, x_BSD.dtype)
        place = Place(shard, None, stretch)
        projections = self.project(x_BSD, inputs, place)
        asked = Asked(x_BSD, projections.qr_BSR, inputs)
        if self.options.balance:
            asked = Asked(*shard.mirror((x_BSD, projections.qr_BSR)), mirror_queries(shard, inputs))
        choice = self.indexer(x_BSD, projections.qr_BSR, inputs, place, asked)
        projections = projections._replace(qr_BSR=asked.qr_BSR)
        y, lse = self.attend(projections, choice.selection, asked.inputs, place)
        loss = jnp.zeros((), jnp.float32)
        if choice.k_BEH is not None:
            # Absorbed, all heads share the keys, which is what the teacher is made of.
            weights = {name: jax.lax.stop_gradient(getattr(self, name).weight[...]) for name in ("wq_b", "wkv_b")}
            make_queries = functools.partial(_absorbed_queries, c.nope_head_dim, weights)
            parts = asked.qr_BSR, asked.inputs.rope
            teacher = TeacherParts(make_queries, parts, projections.latents_BTR, lse, c.softmax_scale)
            loss = self.indexer.loss(choice, *asked, teacher, place)
        y = shard.mirror(y) if self.options.balance else y
        return shard.sum_heads(y).astype(x_BSD.dtype), shard.sum_tokens(loss)


Weights = dict[str, jax.Array]
Parts = tuple[jax.Array, Tables]


def _queries(nope: int, weights: Weights, parts: Parts) -> tuple[jax.Array, jax.Array]:
    """Every head's query without RoPE [B, S, N, H], and rotated [B, S, N, P], of low-rank queries and tables."""
    qr_BSR, (cos, sin) = parts
    q = contract("bsr,rnh->bsnh", qr_BSR, weights["wq_b"])
    return q[..., :nope], apply_rope(q[..., nope:], (cos[:, :, None], sin[:, :, None]))


def _latents(nope: int, weights: Weights, parts: Parts, latents_BTR: jax.Array) -> Latents:
    """What `latent_attention` reads."""
    w_kv = weights["wkv_b"].astype(latents_BTR.dtype)
    rank = w_kv.shape[0]
    c, k_rope = latents_BTR[..., :rank], latents_BTR[..., rank:]
    return Latents(*_queries(nope, weights, parts), c, k_rope, w_kv[..., :nope], w_kv[..., nope:])


def _absorbed_queries(nope: int, weights: Weights, parts: Parts) -> jax.Array:
    """Queries [B, S, N, R + P] of the absorbed form."""
    q_nope, q_rope = _queries(nope, weights, parts)
    return absorbed_queries(q_nope, q_rope, weights["wkv_b"][..., :nope].astype(q_nope.dtype))


def _project_latents(
    dtype: jnp.dtype, nope: int, weights: Weights, parts: Parts, out_BSNR: jax.Array
) -> jax.Array:
    """The absorbed form's output through each head's value kernel and the output projection: [B, S, D]."""
    out = contract("bsnr,rnv->bsnv", out_BSNR, weights["wkv_b"][..., nope:])
    return _project_output(dtype, weights, out)


def _project_output(dtype: jnp.dtype, weights: Weights, out_BSNV: jax.Array) -> jax.Array:
    return contract("bsnv,nvd->bsd", out_BSNV, weights["wo"], dtype)
