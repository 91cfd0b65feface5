"""Embedding lookup whose gradient is accumulated in float32.

Letters: V rows of a table, D columns, N tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def embedding_lookup(table_VD: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of a table.

    A token that occurs n times in a batch adds up n gradients; in bfloat16 the sum stops growing at 256 equal ones.

    Args:
      table_VD: the parameter, in its storage dtype. tokens: integer ids in [0, V), any shape.
      dtype: of the result; the table is cast before it is read.

    Returns:
      [*tokens.shape, D]. An id outside of the table gives NaN, which stops a run, rather than another token's row.
    """
    return _lookup(dtype, table_VD, tokens)


def look_up(table_VD: jax.Array, tokens_N: jax.Array, first: jax.Array | int, vocab: int) -> jax.Array:
    """[N, D]: rows of the stretch of a table of `vocab` rows that begins with row `first`.

    0 for tokens of other stretches, so that those of all stretches add up; NaN for ids outside [0, vocab).
    """
    place = tokens_N - first
    held = (place >= 0) & (place < table_VD.shape[0])
    rows = jnp.where(held[:, None], table_VD.at[place].get(mode="clip"), 0)
    outside = (tokens_N < 0) | (tokens_N >= vocab)
    return jnp.where(outside[:, None], jnp.nan, rows).astype(table_VD.dtype)


def add_gradients(total_VD: jax.Array, place_N: jax.Array, gradient_ND: jax.Array) -> jax.Array:
    """Adds each token's gradient to its row, in float32; places outside of the table are left out."""
    place_N = jnp.where(place_N < 0, total_VD.shape[0], place_N)  # negative ones would count from the end
    return total_VD.at[place_N].add(gradient_ND.astype(jnp.float32), mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: str, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    rows = look_up(table_VD.astype(dtype), tokens.reshape(-1), 0, table_VD.shape[0])
    return rows.reshape(*tokens.shape, -1)


def _forward(dtype, table_VD, tokens):
    # An empty slice carries the table's shape and dtype to the backward, and no data.
    return _lookup(dtype, table_VD, tokens), (tokens, table_VD[:, :0])


def _backward(dtype, saved, gradient):
    tokens, like = saved
    zeros = jnp.zeros((like.shape[0], gradient.shape[-1]), jnp.float32)
    total = add_gradients(zeros, tokens.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
    return total.astype(like.dtype), None


_lookup.defvjp(_forward, _backward)
