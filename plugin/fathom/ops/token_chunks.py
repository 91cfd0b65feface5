"""A function of weights and of tokens that stand alone, a chunk of tokens at a time.

What such a function makes on its way is held for one chunk only: the backward makes it again, chunk by chunk, and sums
the gradients of the weights in float32. Equal to the function of all tokens at once, but for the order of those sums.

Letters: T tokens, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


ALIGNED = 128
"""Chunks of at least as many tokens are a multiple of it long: cutting an array elsewhere than between a TPU's tiles
moves every row, in code as long as the array (5 of the 10 minutes in which a step of V4-Flash compiled)."""


def chunk_length(tokens: int, most: int) -> int:
    """C: at most `most`, but for alignment; chunks without fillers, or as few of one length as there can be."""
    count = -(-tokens // max(most, 1))
    for more in range(count, 2 * count):
        if tokens % (more * ALIGNED) == 0:
            return tokens // more
    length = -(-tokens // count)
    return length if length < ALIGNED else -(-length // ALIGNED) * ALIGNED


def in_token_chunks(
    function: Callable[..., jax.Array],
    chunk: int,
    weights: Tree,
    floats: tuple[jax.Array, ...],
    integers: tuple[jax.Array, ...],
    varying: tuple[str, ...] = (),
    pull: Callable[..., Any] | None = None,
) -> jax.Array:
    """`function(weights, *floats, *integers)` in chunks of tokens.

    Args:
      function: maps weights and arrays [C, ...] to [C, ...]; it must treat each token alone and close over no array
        that is traced. Inside a shard_map it may communicate: all devices have as many chunks.
      chunk: C.
      weights: floating-point arrays, differentiated.
      floats, integers: arrays [T, ...], of which the former are differentiated. Tokens that fill the last chunk up
        are 0 and -1 in them.
      varying: the mesh axes over which a shard_map types the weights as different.
      pull: the function's gradients where JAX is not to derive them: `pull(total, weights, floats, integers, dy)`
        gives (float32 total plus the gradients of the weights, those of the floats).
    """
    tokens = floats[0].shape[0]
    if tokens <= chunk and pull is None:
        return function(weights, *floats, *integers)
    chunk = min(chunk, tokens)
    floats = tuple(_cut(x, chunk, 0) for x in floats)
    integers = tuple(_cut(x, chunk, -1) for x in integers)
    pull = pull or functools.partial(_derived_pull, function)
    y = _chunked((function, pull, varying), weights, floats, integers)
    return y.reshape(-1, *y.shape[2:])[:tokens]


def _cut(x: jax.Array, chunk: int, filler: int) -> jax.Array:
    """[T, ...] -> [T / C, C, ...]."""
    missing = -x.shape[0] % chunk
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=filler)
    return x.reshape(-1, chunk, *x.shape[1:])


def _derived_pull(function, total, weights, floats, integers, dy):
    _, pull = jax.vjp(lambda weights, floats: function(weights, *floats, *integers), weights, floats)
    dweights, dfloats = pull(dy)
    return jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, dweights), dfloats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, weights, floats, integers):
    function, _, _ = static
    return jax.lax.map(lambda parts: function(weights, *parts[0], *parts[1]), (floats, integers))


def _chunked_forward(static, *args):
    return _chunked(static, *args), args


def _chunked_backward(static, args, dy):
    _, pull, varying = static
    weights, floats, integers = args

    def step(total, xs):
        floats, integers, dy = xs
        return pull(total, weights, floats, integers, dy)

    zero = jax.lax.pcast(jnp.float32(0), varying, to="varying") if varying else jnp.float32(0)
    # Zeros that depend on what changes: XLA would make them before a loop around, and keep them beside their sums.
    zero, _ = jax.lax.optimization_barrier((zero, dy.ravel()[0]))
    zeros = jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), weights)
    total, dfloats = jax.lax.scan(step, zeros, (floats, integers, dy))
    dweights = jax.tree.map(lambda t, w: t.astype(w.dtype), total, weights)
    return dweights, dfloats, tuple(np.zeros(x.shape, jax.dtypes.float0) for x in integers)


_chunked.defvjp(_chunked_forward, _chunked_backward)
