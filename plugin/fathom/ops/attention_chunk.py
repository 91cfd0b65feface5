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
    keys_BHT: shared keys once more, channels first, for a CPU, which would copy them so for every product that sums
      over channels; or None.
    """

    keys: jax.Array
    seen_BCT: jax.Array
    penalty_BT: jax.Array | None = None
    keys_BHT: jax.Array | None = None


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


def _scores(q_BCNH: jax.Array, part: Part) -> jax.Array:
    """q . key for every query, head and key, over the channels that q has: [B, C, N, T]."""
    channels = q_BCNH.shape[-1]
    keys = part.keys[..., :channels]
    if part.keys_BHT is not None:
        return _contract("bcnh,bht->bcnt", q_BCNH, part.keys_BHT[:, :channels])
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
    score = _scores(q_BCNH, part) * scale
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


def values(q_BCNH: jax.Array, weights: list[jax.Array], parts: list[Part], value_dim: int) -> jax.Array:
    """Sum over all parts of weight x value: float32 [B, C, N, V]."""
    out = jnp.zeros((*q_BCNH.shape[:3], value_dim), jnp.float32)
    for weight, part in zip(weights, parts, strict=True):
        out = out + _sum_keys(weight, part.keys[..., :value_dim])
    return out


class Made(NamedTuple):
    """What `attend` gives: out [B, C, N, V] (None: to be made again), and log-sum-exp, sink included [B, C, N].

    Float32 both, until they leave the op.
    """

    out: jax.Array | None
    lse: jax.Array


def attend(q_BCNH: jax.Array, parts: list[Part], sink_N: jax.Array, *, scale: float, value_dim: int) -> Made:
    """The chunk's output and its log-sum-exp."""
    weights, inverse, lse = _softmax(q_BCNH, parts, sink_N, scale)
    return Made(values(q_BCNH, weights, parts, value_dim) * inverse[..., None], lse)


def merge(a: Made, b: Made) -> Made:
    """The output of one softmax over the keys of both; at most one of them may hold a sink."""
    lse = jnp.logaddexp(a.lse, b.lse)
    out = jnp.zeros_like(a.out)
    for made in (a, b):
        # Neither a query that sees nothing, -inf, nor one under a sink of +inf has an output.
        share = jnp.where(jnp.isinf(lse), 0.0, jnp.exp(made.lse - lse))
        out = out + made.out * share[..., None]
    return Made(out, lse)


def probabilities(q_BCNH: jax.Array, parts: list[Part], lse_BCN: jax.Array, scale: float) -> list[jax.Array]:
    """exp(score - log-sum-exp) of each part: float32 [B, C, N, T]."""
    # Of a query that sees nothing the log-sum-exp is -inf, as its scores are.
    level = jnp.where(lse_BCN == -jnp.inf, 0.0, lse_BCN)[..., None]
    return [jnp.exp(_masked_scores(q_BCNH, part, scale) - level) for part in parts]


class PartGradients(NamedTuple):
    """dq: float32 [B, C, N, H]. dkeys: float32, as the parts' keys."""

    dq: jax.Array
    dkeys: list[jax.Array]


def part_gradients(
    q_BCNH: jax.Array,
    parts: list[Part],
    weights: list[jax.Array],
    dout_BCNV: jax.Array,
    shift_BCN: jax.Array,
    scale: float,
) -> PartGradients:
    """What parts of known probabilities owe to queries and keys: dS = P (dP + shift), with dP = dout . v."""
    dq, dkeys = jnp.zeros(q_BCNH.shape, jnp.float32), []
    for p, part in zip(weights, parts, strict=True):
        dp = _scores(dout_BCNV, part)
        dscore = p * (dp + shift_BCN[..., None]) * scale
        dq = dq + _sum_keys(dscore, part.keys)
        dkeys.append(_dkeys(p, dscore, q_BCNH, dout_BCNV, shared=part.keys.ndim == 3))
    return PartGradients(dq, dkeys)


def softmax_shift(out_BCNV: jax.Array, dout_BCNV: jax.Array, dlse_BCN: jax.Array | None) -> jax.Array:
    """What a softmax adds to every dP: dlse - delta, with delta = sum P dP = dout . out. Float32 [B, C, N]."""
    delta = (dout_BCNV.astype(jnp.float32) * out_BCNV.astype(jnp.float32)).sum(axis=-1)
    return -delta if dlse_BCN is None else dlse_BCN.astype(jnp.float32) - delta


def sink_gradient(sink_N: jax.Array, lse_BCN: jax.Array, shift_BCN: jax.Array) -> jax.Array:
    """Of the sink, whose value is zero, dsink = P_sink (dlse - delta): float32 [N]."""
    return (_sink_weight(sink_N.astype(jnp.float32), lse_BCN) * shift_BCN).sum(axis=(0, 1))


class ChunkGradients(NamedTuple):
    """out: the chunk's output. dq: in q's dtype, the other gradients float32; dkeys: as the parts' keys."""

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
    """Gradients of `attend`, from what it made."""
    weights = probabilities(q_BCNH, parts, made.lse, scale)
    out = values(q_BCNH, weights, parts, value_dim) if made.out is None else made.out
    dout_BCNV = dout_BCNV.astype(q_BCNH.dtype)
    shift = softmax_shift(out, dout_BCNV, dlse_BCN)
    dq, dkeys = part_gradients(q_BCNH, parts, weights, dout_BCNV, shift, scale)
    return ChunkGradients(out, dq.astype(q_BCNH.dtype), dkeys, sink_gradient(sink_N, made.lse, shift))


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
