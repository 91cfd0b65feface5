"""Embedding lookup whose gradient is accumulated in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def embedding_lookup(
    table_VD: jax.Array,
    tokens_BS: jax.Array,
    dtype: str,
    spread: Callable[[jax.Array], jax.Array] = lambda table: table,
) -> jax.Array:
    """Rows of a table.

    A token that occurs n times in a batch adds up n gradients; in bfloat16 the sum stops growing at 256 equal ones.

    Args:
      table_VD: the parameter, in its storage dtype. tokens_BS: integer ids in [0, V).
      dtype: of the result; the table is cast before it is read, so that a gather between devices moves no more.
      spread: lays out the cast table over devices.

    Returns:
      [B, S, D]. An id outside of the table gives NaN, which stops a run, rather than another token's row.
    """
    # Negative ids would count from the end.
    tokens_BS = jnp.where(tokens_BS < 0, table_VD.shape[0], tokens_BS)
    return _lookup(spread, dtype, table_VD, tokens_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(spread: Callable, dtype: str, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    table = spread(table_VD.astype(dtype))
    return table.at[tokens_BS].get(mode="fill", fill_value=jnp.nan)


def _forward(spread, dtype, table_VD, tokens_BS):
    # An empty slice carries the table's shape and dtype to the backward, and no data.
    return _lookup(spread, dtype, table_VD, tokens_BS), (tokens_BS, table_VD[:, :0])


def _backward(spread, dtype, saved, gradient_BSD):
    tokens_BS, like = saved
    zeros = jnp.zeros((like.shape[0], gradient_BSD.shape[-1]), jnp.float32)
    total = zeros.at[tokens_BS].add(gradient_BSD.astype(jnp.float32), mode="drop")
    return spread(total).astype(like.dtype), None


_lookup.defvjp(_forward, _backward)
