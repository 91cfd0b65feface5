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

from fathom.layers.documents import Documents, Windows
from fathom.layers.indexer import NO_CHOICE, Asked, BaseIndexer, Choice, TeacherParts
from fathom.layers.linear import Linear, contract
from fathom.layers.norms import RMSNorm, rms_normalize
from fathom.layers.options import ComputeOptions
from fathom.layers.param import HEADS_IN, HEADS_OUT, constant, param
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies
from fathom.layers.shards import (
    KEYS,
    QUERIES,
    START,
    Place,
    Shard,
    mirror_queries,
    per_device,
    some_queries,
)
from fathom.models.deepseek_v4.compressors import Compressor
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.ops.chunked_layer import attend_in_chunks, stretch_length
from fathom.ops.quantization import hadamard, simulate_fp4, simulate_fp8
from fathom.ops.selection import Selection, VisibleRange
from fathom.ops.sparse_mqa import attend_in_blocks, banded_sparse_mqa, is_short

KV_QUANT_BLOCK = 64
INDEX_QUANT_BLOCK = 32
LONG = 8192
"""Tokens of a device beyond which CSA, the kind that holds most, makes its first products again rather than keep them:
1% more products, and of V4-Flash's memory at 32,768 tokens 0.1 GiB less."""
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

    def kinds(self) -> LayerInputs:
        """The same tree with each array's kind, see layers/shards.py."""
        queries = jax.tree.map(lambda _: QUERIES, self)
        windows = {
            ratio: dataclasses.replace(w, closing_BE=KEYS, start_BE=KEYS) for ratio, w in queries.windows.items()
        }
        entry_rope = jax.tree.map(lambda _: KEYS, self.entry_rope)
        return dataclasses.replace(queries, windows=windows, entry_rope=entry_rope)


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

    def tables(self, inputs: LayerInputs) -> Tables:
        return inputs.rope["compress"]

    def rotate(self, x: jax.Array, tables: Tables) -> jax.Array:
        return apply_rope(x, tables)

    def keys(self, x_BSD: jax.Array, inputs: LayerInputs, place: Place = START) -> jax.Array:
        ratio = self.compressor.ratio
        return apply_rope(self.compressor(x_BSD, inputs.windows[ratio], place), inputs.entry_rope[ratio])

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
            rngs, (c.q_lora_rank, c.num_heads, c.head_dim), ("q_lora_in", "heads", None), matrix=HEADS_OUT, **common
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
            rngs, (c.o_groups, c.o_lora_rank, c.hidden_size), ("o_groups", None, "embed"), matrix=HEADS_IN, **common
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
        return per_device(self, Attention.on_device, x_BSD, inputs, inputs.kinds())

    def on_device(self, shard: Shard, x_BSD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        """`__call__` on one device's tokens and heads."""
        c = self.config
        qr, kv = self._project_down(x_BSD)
        kv = self._simulate_kv(apply_rope(kv, self._tables(inputs)))
        place, earlier = self._place(shard, x_BSD, kv, inputs)
        balance = self.options.balance and self.kind != "sliding" and shard.count > 1 and x_BSD.shape[1] > 1
        asked = Asked(x_BSD, qr, inputs)
        if balance:
            # Hidden states for the heads' weights alone: a detached copy, of which HCA makes nothing.
            mirrored = jax.lax.stop_gradient(shard.mirror(x_BSD))
            asked = Asked(mirrored, shard.mirror(qr), mirror_queries(shard, inputs))
        entries, choice = self._compressed(x_BSD, qr, inputs, place, asked)
        attend = self._attend_mirrored if balance else self._attend
        y, lse = attend(asked.qr_BSR, kv, earlier, entries, choice.selection, asked.inputs, place)
        loss = jnp.zeros((), jnp.float32)
        if choice.k_BEH is not None:
            weights = jax.lax.stop_gradient(self.wq_b.weight[...])
            make_queries = functools.partial(_make_queries, c.rms_norm_eps, {"wq_b": weights})
            parts = asked.qr_BSR, self._tables(asked.inputs)
            teacher = TeacherParts(make_queries, parts, entries, lse, c.head_dim**-0.5)
            loss = self.indexer.loss(choice, *asked, teacher, place)
        y = shard.mirror(y) if balance else y
        return shard.sum_heads(y).astype(x_BSD.dtype), shard.sum_tokens(loss)

    def _project_down(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Low-rank queries [B, S, R] and key-values [B, S, H], normalised."""
        if self.kind != "csa" or x_BSD.shape[1] <= LONG:
            qr, kv = self.wq_a.contract("bsd,dr->bsr", x_BSD), self.wkv.contract("bsd,dh->bsh", x_BSD)
            return self.q_norm(qr), self.kv_norm(kv)

        def project(x_BSD):
            down = jnp.concatenate([self.wq_a.weight[...], self.wkv.weight[...]], axis=1)
            qr, kv = jnp.split(contract("bsd,dr->bsr", x_BSD, down), [self.config.q_lora_rank], axis=-1)
            return self.q_norm(qr), self.kv_norm(kv)

        # One product, made again in the backward: neither it nor a second gradient of x is held.
        return jax.checkpoint(project)(x_BSD)

    def _stretch(self, x_BSD: jax.Array) -> int:
        """Tokens whose queries are held at a time."""
        heads, width = self.wq_b.weight.shape[1:]
        return self.options.stretch or stretch_length(heads, width, x_BSD.dtype)

    def _tables(self, inputs: LayerInputs) -> Tables:
        return inputs.rope["main" if self.kind == "sliding" else "compress"]

    def _place(
        self, shard: Shard, x_BSD: jax.Array, kv_BSH: jax.Array, inputs: LayerInputs
    ) -> tuple[Place, jax.Array | None]:
        """Where the tokens stand, with the hidden states before them that compressors pool; and the key-values before
        them that the band reaches, None for a whole row."""
        place = Place(shard, None, self._stretch(x_BSD))
        if shard.count == 1:
            return place, None
        reach = 0
        if self.kind != "sliding":
            reach = self.compressor.reach(x_BSD.shape[1], inputs.windows[self.ratio], place)
        before, earlier = shard.before((x_BSD, kv_BSH), (reach, self.config.sliding_window - 1))
        return place._replace(before_BLD=before), earlier

    def _attend(
        self,
        qr_BSR: jax.Array,
        kv_BSH: jax.Array,
        earlier_BWH: jax.Array | None,
        entries_BEH: jax.Array | None,
        selection: Selection,
        inputs: LayerInputs,
        place: Place,
    ) -> tuple[jax.Array, jax.Array]:
        """The attention's output projected, [B, S, D], and its log-sum-exp; of a long or short sequence in
        pieces."""
        c = self.config
        weights = {name: getattr(self, name).weight[...] for name in ("wq_b", "wo_a", "wo_b")}
        dtype = jnp.float32 if place.shard.heads else qr_BSR.dtype
        queries = functools.partial(_make_queries, c.rms_norm_eps)
        project = functools.partial(_project_output, jnp.dtype(dtype), self.options.simulate_quant)
        parts = qr_BSR, self._tables(inputs)
        band = inputs.documents.band(c.sliding_window)
        sizes = dict(scale=c.head_dim**-0.5, window=c.sliding_window)
        common = dict(
            sizes,
            earlier_BWH=earlier_BWH,
            implementation=self.options.attention,
            query_chunk=self.options.query_chunk,
        )
        attended = kv_BSH, self.sink[...], band, entries_BEH, selection
        if qr_BSR.shape[1] > place.stretch and self.options.attention != "reference":
            return attend_in_chunks(queries, project, weights, parts, *attended, layer_chunk=place.stretch, **common)
        if is_short(self.options.attention, qr_BSR.shape[1], earlier_BWH):
            return attend_in_blocks(queries, project, weights, parts, *attended, **sizes)
        out, lse = banded_sparse_mqa(queries(weights, parts), *attended, return_lse=True, **common)
        return project(weights, parts, out), lse

    def _attend_mirrored(
        self, qr_BSR, kv_BSH, earlier_BWH, entries_BEH, selection, inputs, place
    ) -> tuple[jax.Array, jax.Array]:
        """`_attend` of mirrored queries and what belongs to them; key-values are the device's own."""
        half, reach = kv_BSH.shape[1] // 2, earlier_BWH.shape[1]
        near = jnp.concatenate([earlier_BWH, kv_BSH], axis=1)
        first, second = near[:, : reach + half], place.shard.from_mirror(near[:, half:])
        made = []
        for tokens, keys in ((slice(half), first), (slice(half, None), second)):
            chosen = jax.tree.map(lambda x, tokens=tokens: x[:, tokens], selection)
            kv, earlier = keys[:, reach:], keys[:, :reach]
            some = some_queries(inputs, tokens)
            made.append(self._attend(qr_BSR[:, tokens], kv, earlier, entries_BEH, chosen, some, place))
        return tuple(jnp.concatenate(both, axis=1) for both in zip(*made, strict=True))

    def _compressed(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: LayerInputs, place: Place, asked: Asked
    ) -> tuple[jax.Array | None, Choice]:
        """The row's compressed entries and which of them each query sees."""
        if self.kind == "sliding":
            return None, NO_CHOICE
        windows = inputs.windows[self.ratio]
        if windows.num_entries == 0:
            return None, NO_CHOICE
        entries = apply_rope(self.compressor(x_BSD, windows, place), inputs.entry_rope[self.ratio])
        entries = self._simulate_kv(entries)
        if self.kind == "hca":
            windows = asked.inputs.windows[self.ratio]
            return entries, Choice(VisibleRange(windows.begin_BS, windows.end_BS), None)
        return entries, self.indexer(x_BSD, qr_BSR, inputs, place, asked)

    def _simulate_kv(self, kv: jax.Array) -> jax.Array:
        """FP8 rounding of the channels without RoPE, as the released cache stores them."""
        if not self.options.simulate_quant:
            return kv
        plain = self.config.head_dim - self.config.rope_head_dim
        rounded = simulate_fp8(kv[..., :plain], KV_QUANT_BLOCK)
        return jnp.concatenate([rounded, kv[..., plain:]], axis=-1)


def _make_queries(eps: float, weights: dict[str, jax.Array], parts: tuple[jax.Array, Tables]) -> jax.Array:
    """Queries [B, S, N, H] of a stretch, rotated, from its low-rank queries."""
    qr_BSR, (cos, sin) = parts
    q = contract("bsr,rnh->bsnh", qr_BSR, weights["wq_b"])
    tables = cos[:, :, None], sin[:, :, None]
    if q.dtype != jnp.float32:
        return apply_rope(rms_normalize(q, eps), tables)  # held less on a TPU: 2.49 GiB at 32,768 instead of 2.54
    return _normalize_and_turn(eps, q, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize_and_turn(eps: float, q_BSNH: jax.Array, tables: Tables) -> jax.Array:
    """`apply_rope(rms_normalize(q))` in float32. Its gradient needs the result, which the attention keeps anyway."""
    return apply_rope(rms_normalize(q_BSNH, eps), tables)


def _normalize_and_turn_forward(eps, q_BSNH, tables):
    made = _normalize_and_turn(eps, q_BSNH, tables)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(q_BSNH), axis=-1) + eps)
    # One number per query and head: without the barrier XLA's CPU keeps it spread over the channels.
    return made, (made, jax.lax.optimization_barrier(factor), tables)


def _normalize_and_turn_backward(eps, residuals, dmade):
    # Of y = f q with f = 1 / sqrt(mean(q^2) + eps) it is f (dy - y mean(dy y)), and turning both y and dy leaves the
    # mean as it is.
    made, factor, tables = residuals
    dq = factor[..., None] * (dmade - made * jnp.mean(dmade * made, axis=-1, keepdims=True))
    return apply_rope(dq, tables, inverse=True), jax.tree.map(jnp.zeros_like, tables)


_normalize_and_turn.defvjp(_normalize_and_turn_forward, _normalize_and_turn_backward)


def _project_output(
    dtype: jnp.dtype,
    as_released: bool,
    weights: dict[str, jax.Array],
    parts: tuple[jax.Array, Tables],
    out_BSNH: jax.Array,
) -> jax.Array:
    """The attention's output turned back and through each group's matrix and the common one: [B, S, D].

    `as_released`: summed in the order in which simulated FP8 rounds as the official code does, in float32.
    """
    _, (cos, sin) = parts
    out = apply_rope(out_BSNH, (cos[:, :, None], sin[:, :, None]), inverse=True)
    groups = out.reshape(*out.shape[:2], weights["wo_a"].shape[0], -1)
    if as_released and groups.dtype == jnp.float32:
        latent = contract("bsgk,gko->bsgo", groups, weights["wo_a"])
    else:
        # Groups first: XLA's CPU copies float32 operands whose batch dimension stands elsewhere, and has no product
        # of bfloat16 ones.
        latent = jnp.moveaxis(contract("gbsk,gko->gbso", jnp.moveaxis(groups, 2, 0), weights["wo_a"]), 0, 2)
    return contract("bsgo,god->bsd", latent, weights["wo_b"], dtype)
