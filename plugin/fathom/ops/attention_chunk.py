"""One chunk of queries against a few groups of keys: one softmax with a sink, forward and backward by hand.

The arithmetic under `sparse_mqa` and `banded_sparse_mqa`. A `Part` is a group of keys with a mask of who sees which:
keys shared by the chunk (the band, or all rows under a mask) or keys of each query's own (gathered rows). All
parts go through one softmax, keys are values, and the sink joins the denominator only.

A key that a query does not see has no influence on it, not even as NaN: `masked_part` puts zeros in the place of keys
that are not finite, for 0 * NaN is NaN, and gives the NaN back to the queries that do see such a key.

Letters: B batch, C queries of a chunk, T keys of a part, N heads, H key channels, V value channels (the first V of H).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fathom.ops.precision import precision_of


class Part(NamedTuple):
    """Keys and who sees them.

    keys: [B, T, H], shared by the chunk's queries, or [B, C, T, H], each query's own; finite where not seen.
    seen_BCT: boolean. penalty_BT: float32 added to the scores, NaN at keys that were not finite, or None.
    """

    keys: jax.Array
    seen_BCT: jax.Array
    penalty_BT: jax.Array | None = None


def finite_keys(keys_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys with zeros for those that are not finite, and the penalty [B, T] that makes up for it."""
    finite = jnp.isfinite(keys_BTH).all(axis=-1)
    return jnp.where(finite[..., None], keys_BTH, 0), jnp.where(finite, 0.0, jnp.nan).astype(jnp.float32)


def masked_part(keys_BTH: jax.Array, seen_BCT: jax.Array) -> Part:
    """A part of shared keys, any of which may hold NaN."""
    keys_BTH, penalty_BT = finite_keys(keys_BTH)
    return Part(keys_BTH, seen_BCT, penalty_BT)


def _contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum accumulated in, and returned as, float32."""
    return jnp.einsum(spec, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


def _scores(q_BCNH: jax.Array, keys: jax.Array) -> jax.Array:
    """q . key for every query, head and key: [B, C, N, T]."""
    if keys.ndim == 3:
        return _contract("bcnh,bth->bcnt", q_BCNH, keys)
    # Heads last: a CPU would first copy a query's own keys into another order for the product that has them last.
    return jnp.swapaxes(_contract("bcth,bcnh->bctn", keys, q_BCNH), 2, 3)


def _sum_keys(weight_BCNT: jax.Array, keys: jax.Array) -> jax.Array:
    """Sum over keys of weight x key: [B, C, N, H]."""
    spec = "bcnt,bth->bcnh" if keys.ndim == 3 else "bcnt,bcth->bcnh"
    return _contract(spec, weight_BCNT.astype(keys.dtype), keys)


def _masked_scores(q_BCNH: jax.Array, part: Part, scale: float) -> jax.Array:
    """The scores [B, C, N, T], -inf where a query does not see a key."""
    score = _scores(q_BCNH, part.keys) * scale
    if part.penalty_BT is not None:
        score = score + part.penalty_BT[:, None, None, :]
    return jnp.where(part.seen_BCT[:, :, None, :], score, -jnp.inf)


def _softmax(
    q_BCNH: jax.Array, parts: list[Part], sink_N: jax.Array, scale: float
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Per part exp(score - peak) [B, C, N, T], and for each query and head 1 / total and the log-sum-exp [B, C, N].

    The total holds the sink. It stands for 0 where a query sees nothing at all, and for infinity under a sink of +inf.
    """
    scores = [_masked_scores(q_BCNH, part, scale) for part in parts]
    sink_N = sink_N.astype(jnp.float32)
    start = jnp.broadcast_to(sink_N, q_BCNH.shape[:3])
    peak = functools.reduce(jnp.maximum, [s.max(axis=-1, initial=-jnp.inf) for s in scores], start)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = [jnp.exp(s - peak[..., None]) for s in scores]
    total = sum((w.sum(axis=-1) for w in weights), jnp.exp(sink_N - peak))
    infinite = sink_N == jnp.inf  # then all weights are 0, and the sink's own, exp(inf - inf), NaN
    inverse = jnp.where(infinite | (total == 0), 0.0, 1.0 / jnp.where(total == 0, 1.0, total))
    lse = jnp.where(infinite, jnp.inf, peak + jnp.log(total))
    return weights, inverse, lse


def _values(q_BCNH: jax.Array, weights: list[jax.Array], parts: list[Part], value_dim: int) -> jax.Array:
    """Sum over all parts of weight x value: float32 [B, C, N, V]."""
    out = jnp.zeros((*q_BCNH.shape[:3], value_dim), jnp.float32)
    for weight, part in zip(weights, parts, strict=True):
        out = out + _sum_keys(weight, part.keys[..., :value_dim])
    return out


def attend(
    q_BCNH: jax.Array, parts: list[Part], sink_N: jax.Array, *, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """The chunk's output [B, C, N, V] in q's dtype and its log-sum-exp, sink included, float32 [B, C, N]."""
    weights, inverse, lse = _softmax(q_BCNH, parts, sink_N, scale)
    return (_values(q_BCNH, weights, parts, value_dim) * inverse[..., None]).astype(q_BCNH.dtype), lse


class Made(NamedTuple):
    """What `attend` gave: out [B, C, N, V], or None to make it again, and lse, float32 [B, C, N]."""

    out: jax.Array | None
    lse: jax.Array


class ChunkGradients(NamedTuple):
    """out: the chunk's output, in q's dtype. Gradients: dq in q's dtype, the others float32; dkeys as the parts'."""

    out: jax.Array
    dq: jax.Array
    dkeys: list[jax.Array]
    dsink_N: jax.Array


def attend_backward(
    q_BCNH: jax.Array,
    parts: list[Part],
    sink_N: jax.Array,
    made: Made,
    dout_BCNV: jax.Array,
    dlse_BCN: jax.Array | None,
    *,
    scale: float,
    value_dim: int,
) -> ChunkGradients:
    """Gradients of `attend`, from what it made; the probabilities are exp(score - log-sum-exp).

    With P the softmax, dP = dout . v and delta = sum P dP = dout . out:  dS = P (dP - delta + dlse), and for the sink,
    whose value is zero, dsink = P_sink (dlse - delta).
    """
    out, lse = made
    # Of a query that sees nothing the log-sum-exp is -inf, as its scores are.
    level = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    probabilities = [jnp.exp(_masked_scores(q_BCNH, part, scale) - level) for part in parts]
    if out is None:
        out = _values(q_BCNH, probabilities, parts, value_dim).astype(q_BCNH.dtype)
    dout_BCNV = dout_BCNV.astype(q_BCNH.dtype)
    dprobabilities = [_scores(dout_BCNV, part.keys[..., :value_dim]) for part in parts]
    delta = (dout_BCNV.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    shift = -delta if dlse_BCN is None else dlse_BCN.astype(jnp.float32) - delta
    dq, dkeys = jnp.zeros(q_BCNH.shape, jnp.float32), []
    for p, dp, part in zip(probabilities, dprobabilities, parts, strict=True):
        dscore = p * (dp + shift[..., None]) * scale
        dq = dq + _sum_keys(dscore, part.keys)
        dkeys.append(_dkeys(p, dscore, q_BCNH, dout_BCNV, shared=part.keys.ndim == 3))
    dsink = (_sink_weight(sink_N.astype(jnp.float32), lse) * shift).sum(axis=(0, 1))
    return ChunkGradients(out, dq.astype(q_BCNH.dtype), dkeys, dsink)


def _sink_weight(sink_N: jax.Array, lse_BCN: jax.Array) -> jax.Array:
    """The sink's share of the softmax: 1 at +inf and 0 at -inf, where exp(sink - lse) may be NaN."""
    weight = jnp.exp(jnp.where(jnp.isinf(sink_N), 0.0, sink_N) - lse_BCN)
    return jnp.where(sink_N == jnp.inf, 1.0, jnp.where(sink_N == -jnp.inf, 0.0, weight))


def _dkeys(p: jax.Array, dscore: jax.Array, q: jax.Array, dout: jax.Array, *, shared: bool) -> jax.Array:
    """Gradient of a part's keys, float32: as keys, dscore x q, and as values, P x dout."""
    missing = q.shape[-1] - dout.shape[-1]
    if missing:
        dout = jnp.pad(dout, [(0, 0)] * 3 + [(0, missing)])
    if shared:
        return _sum_queries(dscore, q) + _sum_queries(p, dout)
    # One product over both, the heads of dscore and P side by side: the result, which is large, is written once.
    both = jnp.concatenate([dscore, p], axis=2).astype(q.dtype)
    return _contract("bcnt,bcnh->bcth", both, jnp.concatenate([q, dout], axis=2))


def _sum_queries(weight_BCNT: jax.Array, x_BCNH: jax.Array) -> jax.Array:
    """Sum over queries and heads of weight x value: [B, T, H]."""
    batch, chunk, heads, keys = weight_BCNT.shape
    # Queries and heads as one dimension: of two, a CPU would first copy both operands into another order.
    weight, x = weight_BCNT.reshape(batch, chunk * heads, keys), x_BCNH.reshape(batch, chunk * heads, -1)
    return _contract("bkt,bkh->bth", weight.astype(x.dtype), x)
