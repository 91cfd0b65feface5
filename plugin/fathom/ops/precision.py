"""What a matrix product of float32 means: float32, on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """The precision to contract `x` with: the highest for float32, the platform's own below.

    By default a TPU rounds float32 operands to bfloat16 and a GPU to TF32, which no comparison with a float32
    reference survives.
    """
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
