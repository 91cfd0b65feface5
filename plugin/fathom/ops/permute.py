"""Rows moved to other places: a gather whose gradient is a gather too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def _take(x_BTX: jax.Array, places_BE: jax.Array) -> jax.Array:
    # Row by row: XLA partitions a gather over its batch dimensions only.
    taken = jax.vmap(lambda row, places: row.at[places].get(mode="clip"))(x_BTX, places_BE)
    exists = (places_BE >= 0).reshape(*places_BE.shape, *[1] * (x_BTX.ndim - 2))
    return jnp.where(exists, taken, 0)


@jax.custom_vjp
def gather_rows(x_BTX: jax.Array, places_BE: jax.Array, inverse_BT: jax.Array) -> jax.Array:
    """Row e of the result is row places[e] of x, zeros where that is negative: [B, E, ...].

    Args:
      places_BE: int32, no row twice. inverse_BT: int32, the e whose place is t, negative where there is none. Given,
        so that the gradient need not scatter, which is slow and in no fixed order on some platforms.
    """
    return _take(x_BTX, places_BE)


def _forward(x, places, inverse):
    return _take(x, places), (places, inverse)


def _backward(residuals, g):
    places, inverse = residuals
    nothing = [np.zeros(x.shape, jax.dtypes.float0) for x in residuals]
    return _take(g, inverse), *nothing


gather_rows.defvjp(_forward, _backward)
