"""Manifold-constrained hyper-connections (mHC): n residual streams mixed by doubly stochastic matrices.

Formulas: models/deepseek_v4/README.md "mHC"; the report's B is the transpose of the matrix C here. All of it is
float32; streams are stored in the compute dtype. Letters: n streams, D hidden, M = (2 + n) n mixing outputs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.param import Matrix, constant, normal, param

GATE_INIT = 0.01
"""Initial gating factor: mixing starts nearly static and learns to depend on the token."""

COMB_DIAGONAL_INIT = 4.0
"""Initial bias on the diagonal of the mixing logits: after Sinkhorn each stream keeps about 95% of itself."""


class Mixing(NamedTuple):
    """How one sublayer reads and writes the streams, float32, tokens last (Sinkhorn vectorises over them).

    pre: [n, B, S] weights that collapse the streams; post: [n, B, S] weights of the sublayer's output;
    comb: [n, n, B, S], comb[i, j] carries old stream i into new stream j.
    """

    pre_nBS: jax.Array
    post_nBS: jax.Array
    comb_nnBS: jax.Array


def sinkhorn(logits_nnBS: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Softmax over columns j plus eps, then alternating column and row normalisation.

    Args:
      logits_nnBS: float32 [n, n, B, S], indexed [i, j].
      iterations: total rounds; the first is the softmax followed by one normalisation over i.
      eps: added after the softmax and to every denominator.

    Returns:
      float32 [n, n, B, S], nearly doubly stochastic, last normalised over i.
    """
    comb = _normalise(_softmax(logits_nnBS) + eps, 0, eps)

    def round_(comb: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _normalise(_normalise(comb, 1, eps), 0, eps), None

    return jax.lax.scan(round_, comb, None, length=iterations - 1)[0]


# The gradient of a normalisation ignores the part of the cotangent that is constant along the normalised axis. Where
# streams are equal, as before the first layer, that part is nearly all of it, and the usual form cancels it by
# rounding alone: what is left is noise. Below it is taken out first, exactly.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalise(comb: jax.Array, axis: int, eps: float) -> jax.Array:
    """comb / (sum of comb along an axis + eps)."""
    return comb / (jnp.sum(comb, axis=axis, keepdims=True) + eps)


def _normalise_forward(comb, axis, eps):
    total = jnp.sum(comb, axis=axis, keepdims=True) + eps
    out = comb / total
    return out, (out, total)


def _normalise_backward(axis, eps, saved, cotangent):
    out, total = saved
    level = jnp.mean(cotangent, axis=axis, keepdims=True)
    rest = cotangent - level
    # 1 - sum(out) = eps / total, which the subtraction itself could not tell from rounding.
    return ((rest - jnp.sum(rest * out, axis=axis, keepdims=True) + level * (eps / total)) / total,)


_normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def _softmax(logits_nnBS: jax.Array) -> jax.Array:
    """Softmax over the columns j."""
    return jax.nn.softmax(logits_nnBS, axis=1)


def _softmax_forward(logits_nnBS):
    out = _softmax(logits_nnBS)
    return out, out


def _softmax_backward(out, cotangent):
    rest = cotangent - jnp.mean(cotangent, axis=1, keepdims=True)
    return (out * (rest - jnp.sum(rest * out, axis=1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def collapse(pre_nBS: jax.Array, streams_BSnD: jax.Array) -> jax.Array:
    """sum_i pre_i x_i in float32, cast to the streams' dtype: [B, S, D]."""
    return jnp.sum(_per_stream(pre_nBS) * streams_BSnD.astype(jnp.float32), axis=2).astype(streams_BSnD.dtype)


def expand(mixing: Mixing, output_BSD: jax.Array, streams_BSnD: jax.Array) -> jax.Array:
    """New stream j = post_j * output + sum_i comb[i, j] * old stream i; float32 inside."""
    return _expand(mixing.post_nBS, mixing.comb_nnBS, output_BSD, streams_BSnD)


@jax.custom_vjp
def _expand(post_nBS, comb_nnBS, output_BSD, streams_BSnD):
    out = _per_stream(post_nBS) * output_BSD[:, :, None, :].astype(jnp.float32)
    return _mix(out, comb_nnBS, streams_BSnD.astype(jnp.float32)).astype(streams_BSnD.dtype)


def _per_stream(weights_nBS: jax.Array) -> jax.Array:
    """[n, B, S] -> [B, S, n, 1]."""
    return jnp.moveaxis(weights_nBS, 0, -1)[..., None]


def _mix(out_BSnD: jax.Array | float, comb_nnBS: jax.Array, streams_BSnD: jax.Array) -> jax.Array:
    """out_j + sum_i comb[i, j] * stream i.

    A sum of n broadcast products fuses into one pass over the streams; an einsum with a 4 x 4 matrix per token would
    become tiny batched matrix products.
    """
    for i in range(streams_BSnD.shape[2]):
        out_BSnD = out_BSnD + _per_stream(comb_nnBS[i]) * streams_BSnD[:, :, i : i + 1, :]
    return out_BSnD


# Derived, the gradient of a stream's slice is an array of all streams with zeros in the others, once per stream, and
# the float32 streams are kept for it. Written out, it is the same mixing with the transposed matrix, and keeps the
# arguments alone.


def _expand_forward(*args):
    return _expand(*args), args


def _expand_backward(args, cotangent_BSnD):
    post_nBS, comb_nnBS, output_BSD, streams_BSnD = args
    grad, output = cotangent_BSnD.astype(jnp.float32), output_BSD.astype(jnp.float32)
    streams = streams_BSnD.astype(jnp.float32)
    dpost = jnp.sum(output[:, :, None, :] * grad, axis=-1)
    rows = [jnp.sum(streams[:, :, i : i + 1, :] * grad, axis=-1) for i in range(streams.shape[2])]
    doutput = jnp.sum(_per_stream(post_nBS) * grad, axis=2)
    dstreams = _mix(0.0, comb_nnBS.swapaxes(0, 1), grad)
    return (
        jnp.moveaxis(dpost, -1, 0),
        jnp.moveaxis(jnp.stack(rows), -1, 1),
        doutput.astype(output_BSD.dtype),
        dstreams.astype(streams_BSnD.dtype),
    )


_expand.defvjp(_expand_forward, _expand_backward)


def _mix_logits(streams_BSnD: jax.Array, fn_MnD: jax.Array, eps: float) -> jax.Array:
    """(flattened streams @ fn) scaled by the reciprocal root mean square, float32 [M, B, S]."""
    x = streams_BSnD.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=(2, 3))
    logits = jnp.einsum(
        "bsnd,mnd->mbs", x, fn_MnD, precision=jax.lax.Precision.HIGHEST
    )
    return logits * jax.lax.rsqrt(mean_square + eps)


class HyperConnection(nnx.Module):
    """Computes a sublayer's `Mixing` from the streams.

    Attributes (all float32 whatever the parameter dtype):
      fn: [(2 + n) n, n, D]; base: [(2 + n) n]; scale: [3], one factor each for pre, post and comb.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        num_streams: int,
        hidden_size: int,
        iterations: int,
        eps: float,
        norm_eps: float,
        stddev: float,
    ):
        n = num_streams
        self.iterations, self.eps, self.norm_eps = iterations, eps, norm_eps
        size = (2 + n) * n
        self.fn = param(
            rngs.params(),
            (size, n, hidden_size),
            normal(stddev),
            axes=(None, None, "embed"),
            dtype="float32",
            matrix=Matrix(inputs=(-2, -1), outputs=(-3,), parts=(n, n, n * n)),
        )
        self.base = param(
            rngs.params(), (size,), _base_init(n), axes=(None,), dtype="float32"
        )
        self.scale = param(
            rngs.params(), (3,), constant(GATE_INIT), axes=(None,), dtype="float32"
        )

    def __call__(self, streams_BSnD: jax.Array) -> Mixing:
        n = streams_BSnD.shape[2]
        logits = _mix_logits(streams_BSnD, self.fn[...], self.norm_eps)
        # One factor per output: the gradient of a factor then sums over the tokens first, which keeps more of it.
        scale = jnp.repeat(self.scale[...], np.array([n, n, n * n]), total_repeat_length=(2 + n) * n)
        logits = logits * scale[:, None, None] + self.base[...][:, None, None]
        pre = jax.nn.sigmoid(logits[:n]) + self.eps
        post = 2 * jax.nn.sigmoid(logits[n : 2 * n])
        comb = logits[2 * n :]
        comb = comb.reshape(n, n, *comb.shape[1:])
        # The forty intermediate matrices of Sinkhorn are recomputed in the backward, never stored.
        normalise = jax.checkpoint(lambda c: sinkhorn(c, self.iterations, self.eps))
        return Mixing(pre, post, normalise(comb))


def _even_share_logit(n: int) -> float:
    """The logit at which n sigmoids sum to one (nearly so for a single stream)."""
    return -math.log(n - 1) if n > 1 else 10.0


def _base_init(n: int):
    """pre sums to one over the streams, post is one, comb is near the identity."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        pre = jnp.full((n,), _even_share_logit(n))
        comb = jnp.eye(n) * COMB_DIAGONAL_INIT
        return jnp.concatenate([pre, jnp.zeros((n,)), comb.reshape(-1)]).astype(dtype)

    return init


class HyperHead(nnx.Module):
    """Collapses the streams after the last block: sum_i (sigmoid(logit_i * scale + base_i) + eps) x_i.

    Attributes (float32): fn [n, n, D], base [n], scale [1].
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        num_streams: int,
        hidden_size: int,
        eps: float,
        norm_eps: float,
        stddev: float,
    ):
        n = num_streams
        self.eps, self.norm_eps = eps, norm_eps
        self.fn = param(
            rngs.params(),
            (n, n, hidden_size),
            normal(stddev),
            axes=(None, None, "embed"),
            dtype="float32",
            matrix=Matrix(inputs=(-2, -1), outputs=(-3,)),
        )
        start = constant(_even_share_logit(n))
        self.base = param(rngs.params(), (n,), start, axes=(None,), dtype="float32")
        self.scale = param(
            rngs.params(), (1,), constant(GATE_INIT), axes=(None,), dtype="float32"
        )

    def __call__(self, streams_BSnD: jax.Array) -> jax.Array:
        logits = _mix_logits(streams_BSnD, self.fn[...], self.norm_eps)
        pre = jax.nn.sigmoid(logits * self.scale[...] + self.base[...][:, None, None]) + self.eps
        return collapse(pre, streams_BSnD)
