"""Multi-head latent attention in one meaning, two forms and several speeds (README.md "Attention").

A token's keys and values come from one latent c (width R) and one rotary key r (width P) that all heads share:
key_n = [c W_k,n ; r], value_n = c W_v,n. Two forms of the same product:
  expanded  makes every head's keys and values; H + P + V multiplications per head, query and key.
  absorbed  moves W_k to the query and W_v to the output, so that all heads attend to the tokens' [c ; r] themselves;
            2R + P multiplications, and nothing per head is kept of a key.
"auto" takes the absorbed form where the selected tokens alone are read and that costs less than all tokens' keys and
values: K (2R + P) < S (H + P + V), which is from 6,964 tokens on for the released model's K = 2,048. Else the expanded.

Versions:
  reference  the meaning, over all queries x keys.
  fused      all queries at once; for rows that are one document a plain softmax under a constant causal mask.
  masked     `query_chunk` queries at a time against all keys, under a mask [C, S]; recomputed in the backward.
  gathered   each query against its own K tokens, by `ops.sparse_mqa`; absorbed. A range is never gathered, for it has
             no list: rows in which everything is selected take the masked version.
"auto" takes fused up to 256 tokens; beyond, gathered with the absorbed form and masked else.

Letters: B batch, S queries, C queries of a chunk, T keys, K selected keys, N heads; widths: R latent, P rotary, H
without RoPE, V value.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.precision import precision_of
from fathom.ops.selection import MASKED, Selected, Selection, entry_mask
from fathom.ops.sparse_mqa import sparse_mqa

logger = logging.getLogger(__name__)

FUSED_LENGTH = 256
QUERY_CHUNK = 128
"""Queries at a time where the options do not say."""
IMPLEMENTATIONS = ("reference", "fused", "masked", "gathered")
FORMS = ("expanded", "absorbed")


class Latents(NamedTuple):
    """What the attention reads.

    Attributes:
      q_nope_BSNH, q_rope_BSNP: queries, the second part rotated.
      c_BTR: normalised latents. k_rope_BTP: rotated keys that all heads share.
      w_k_RNH, w_v_RNV: the kernels from latents to keys and values, in the compute dtype.
    """

    q_nope_BSNH: jax.Array
    q_rope_BSNP: jax.Array
    c_BTR: jax.Array
    k_rope_BTP: jax.Array
    w_k_RNH: jax.Array
    w_v_RNV: jax.Array


def contract(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32, in `a`'s dtype."""
    out = jnp.einsum(equation, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)
    return out.astype(a.dtype)


def expanded(latents: Latents) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, S, N, H + P], keys [B, T, N, H + P] and values [B, T, N, V] of every head."""
    q_nope, q_rope, c, k_rope, w_k, w_v = latents
    keys = contract("btr,rnh->btnh", c, w_k)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*keys.shape[:-1], k_rope.shape[-1]))
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    return query, jnp.concatenate([keys, k_rope], axis=-1), contract("btr,rnv->btnv", c, w_v)


def absorbed_queries(q_nope_BSNH: jax.Array, q_rope_BSNP: jax.Array, w_k_RNH: jax.Array) -> jax.Array:
    """Queries [B, S, N, R + P] against the latents themselves."""
    return jnp.concatenate([contract("bsnh,rnh->bsnr", q_nope_BSNH, w_k_RNH), q_rope_BSNP], axis=-1)


def absorbed(latents: Latents) -> tuple[jax.Array, jax.Array]:
    """Queries [B, S, N, R + P] and the keys [B, T, R + P] of all heads, whose first R channels are the values."""
    query = absorbed_queries(latents.q_nope_BSNH, latents.q_rope_BSNP, latents.w_k_RNH)
    return query, jnp.concatenate([latents.c_BTR, latents.k_rope_BTP], axis=-1)


# (scores, output) contractions: keys per head, and shared.
_PER_HEAD = ("bcnh,btnh->bcnt", "bcnt,btnv->bcnv")
_SHARED = ("bcnh,bth->bcnt", "bcnt,btv->bcnv")


def _scores(equation: str, query: jax.Array, keys: jax.Array, mask_BCT: jax.Array, scale: float) -> jax.Array:
    """float32 [B, C, N, T], MASKED where a key is not attended."""
    scores = jnp.einsum(equation, query, keys, precision=precision_of(query), preferred_element_type=jnp.float32)
    return jnp.where(mask_BCT[:, :, None], scores * scale, MASKED)


def _attend(equations, query, keys, values, mask_BCT: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Softmax attention in float32 and its log-sum-exp [B, C, N]; a query that sees nothing gets 0 and -inf."""
    scores = _scores(equations[0], query, keys, mask_BCT, scale)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask_BCT[:, :, None], jnp.exp(scores - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    seen = total > 0
    out = jnp.einsum(
        equations[1],
        weights.astype(query.dtype),
        values,
        precision=precision_of(query),
        preferred_element_type=jnp.float32,
    )
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)[..., 0]
    return (out / safe).astype(query.dtype), jax.lax.stop_gradient(lse)


def _fused(equations, query, keys, values, mask_BCT: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """`_attend` where every query sees something."""
    scores = _scores(equations[0], query, keys, mask_BCT, scale)
    lse = jax.lax.stop_gradient(jax.nn.logsumexp(scores, axis=-1))
    return contract(equations[1], jax.nn.softmax(scores, axis=-1).astype(query.dtype), values), lse


def _chunked(equations, query, keys, values, selection: Selection, scale: float, chunk: int):
    """`_attend` for `chunk` queries at a time. `values` is the values, or how many of the shared keys' channels are."""
    length, dtype = keys.shape[1], query.dtype
    shared = isinstance(values, int)
    # The loop's backward adds up one gradient of all keys per chunk; in bfloat16 the later ones would be lost.
    wide = [x.astype(jnp.float32) for x in ((keys,) if shared else (keys, values))]

    @jax.checkpoint
    def one_chunk(chunk):
        query, *selected = chunk
        selected = type(selection)(*selected)
        keys = wide[0].astype(dtype)
        own_values = keys[..., :values] if shared else wide[1].astype(dtype)
        return _attend(equations, query, keys, own_values, entry_mask(selected, length), scale)

    chunks = tuple(to_chunks(part, chunk) for part in (query, *selection))
    return tuple(from_chunks(part, query.shape[1]) for part in jax.lax.map(one_chunk, chunks))


@functools.cache
def _log_choice(implementation: str, form: str, length: int, why: str) -> None:
    logger.info("latent attention: %s version, %s form for %d tokens (%s)", implementation, form, length, why)


class Sizes(NamedTuple):
    """What the rules look at: T latents; widths R, P, H, V."""

    length: int
    rank: int
    rope: int
    nope: int
    value: int


def sizes_of(latents_BTR: jax.Array, w_kv_RNW: jax.Array, nope: int) -> Sizes:
    """Of latents [c ; r], [B, T, R + P], and their kernels, [R, N, H + V]."""
    rank, _, width = w_kv_RNW.shape
    return Sizes(latents_BTR.shape[1], rank, latents_BTR.shape[2] - rank, nope, width - nope)


class Chosen(NamedTuple):
    implementation: str
    form: str


def choose(sizes: Sizes, selection: Selection, *, implementation: str, form: str) -> Chosen:
    """Implementation and form with "auto" replaced by the rules in this file's header.

    Raises:
      ValueError: for an unknown implementation or form, and for "gathered" in the expanded form.
    """
    listed, asked = isinstance(selection, Selected), f"asked for: {implementation}, {form}"
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"unknown latent attention implementation {implementation!r}; expected 'auto' or one of {IMPLEMENTATIONS}"
        )
    if form not in ("auto", *FORMS) or (implementation == "gathered" and form == "expanded"):
        raise ValueError(
            f"latent attention form {form!r} of implementation {implementation!r}; expected 'auto' or one of {FORMS}, "
            "and not 'expanded' for 'gathered'"
        )
    if implementation == "auto":
        if sizes.length <= FUSED_LENGTH:
            implementation = "fused"
        elif form == "absorbed" or (form == "auto" and listed and _gathering_is_cheaper(sizes, selection)):
            implementation = "gathered"
        else:
            implementation = "masked"
    if form == "auto":
        form = "absorbed" if implementation == "gathered" else "expanded"
    if implementation == "gathered" and not listed:
        implementation = "masked"
    _log_choice(implementation, form, sizes.length, asked)
    return Chosen(implementation, form)


def _gathering_is_cheaper(sizes: Sizes, selection: Selected) -> bool:
    per_token = sizes.nope + sizes.rope + sizes.value
    return selection.indices_BSK.shape[-1] * (2 * sizes.rank + sizes.rope) < sizes.length * per_token


def latent_attention(
    latents: Latents,
    selection: Selection,
    *,
    scale: float,
    single: bool,
    implementation: str = "auto",
    form: str = "auto",
    query_chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Latent attention of each query to the tokens of its selection.

    Args:
      latents: float32 or bfloat16. selection: the tokens each query sees, none twice: a VisibleRange, or Selected.
      scale: multiplies q . k. single: whether every row is one document without padding, whose queries see tokens
        up to their own and at least one.
      implementation: "auto", "reference", "fused", "masked" or "gathered". form: "auto", "expanded" or "absorbed".
      query_chunk: queries per step of the masked and gathered versions.

    Returns:
      [B, S, N, V] in the queries' dtype, softmax in float32, and float32 [B, S, N], the log-sum-exp of the scores, a
      constant. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError: see `choose`.
    """
    rank, length = latents.w_v_RNV.shape[0], latents.c_BTR.shape[1]
    widths = latents.k_rope_BTP.shape[2], latents.w_k_RNH.shape[2], latents.w_v_RNV.shape[2]
    implementation, form = choose(
        Sizes(length, rank, *widths), selection, implementation=implementation, form=form
    )
    if form == "expanded":
        equations, (query, keys, values) = _PER_HEAD, expanded(latents)
    else:
        equations, (query, keys), values = _SHARED, absorbed(latents), rank
    if implementation == "gathered":
        out, lse = sparse_mqa(
            query,
            keys,
            selection.indices_BSK,
            scale=scale,
            value_dim=rank,
            implementation="gathered",
            query_chunk=query_chunk,
            return_lse=True,
        )
        lse = jax.lax.stop_gradient(lse)
    elif implementation == "masked":
        chunk = min(query_chunk or QUERY_CHUNK, length)
        out, lse = _chunked(equations, query, keys, values, selection, scale, chunk)
    else:
        plain = implementation == "fused" and single and not isinstance(selection, Selected)
        if plain:
            mask = jnp.tril(jnp.ones((1, length, length), bool))
        else:
            mask = entry_mask(selection, length)
        attend = _fused if plain else _attend
        values = keys[..., :rank] if form == "absorbed" else values
        out, lse = attend(equations, query, keys, values, mask, scale)
    if implementation != "gathered":  # which names what its backward reads itself
        out, lse = checkpoint_name((out, lse), "attention")
    return (contract("bsnr,rnv->bsnv", out, latents.w_v_RNV) if form == "absorbed" else out), lse
