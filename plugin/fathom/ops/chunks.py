"""A sequence in chunks, for loops over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [S / chunk, B, chunk, ...], zero-padded at the end of S."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `to_chunks`, dropping the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def map_chunks(function: Callable[[Any], Any], tree: Any, chunk: int | None) -> Any:
    """`function` of a tree of arrays [B, S, ...], `chunk` of S at a time, computed again in the backward.

    Args:
      function: of a tree of [B, C, ...] to a tree of [B, C, ...]; it must treat each place alone. It may close over
        arrays; their gradients are summed over the chunks in float32.
      chunk: C; None, or no fewer than S, applies the function once to all, and keeps what its backward wants.
    """
    length = jax.tree.leaves(tree)[0].shape[1]
    if chunk is None or length <= chunk:
        return function(tree)
    chunks = jax.tree.map(lambda x: to_chunks(x, chunk), tree)
    made = jax.lax.map(jax.checkpoint(sums_in_float32(function, jax.tree.map(lambda x: x[0], chunks))), chunks)
    return jax.tree.map(lambda x: from_chunks(x, length), made)


def sums_in_float32(function: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`function` for the body of a loop: what it closes over is read in its own dtype, its gradient summed in float32.

    A loop's backward adds one gradient per step to a sum of the operand's dtype; a sum in bfloat16 stops growing at
    256 equal terms.

    Args:
      function: of a tree of arrays. example: such a tree, of which shapes and dtypes count.
    """
    function, closed = jax.closure_convert(function, example)
    dtypes = [x.dtype for x in closed]
    wide = [x.astype(jnp.float32) for x in closed]

    def narrowed(tree):
        return function(tree, *(x.astype(dtype) for x, dtype in zip(wide, dtypes, strict=True)))

    return narrowed
