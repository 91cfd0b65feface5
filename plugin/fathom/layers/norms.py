"""Root-mean-square normalisation, in float32 whatever the compute dtype."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.param import constant, param


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension: float32 inside, x's dtype outside."""
    return _keeping_x(lambda x: _normalized(x, eps).astype(x.dtype), x)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    """float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _keeping_x(norm: Callable[..., jax.Array], x: jax.Array, *weights: jax.Array) -> jax.Array:
    """norm(x, *weights), whose gradient is computed from x rather than from a float32 copy, twice the size."""
    return (norm if x.dtype == jnp.float32 else jax.checkpoint(norm))(x, *weights)


class RMSNorm(nnx.Module):
    """weight * x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype at the end.

    Attributes:
      weight: [size], starts at one.
    """

    def __init__(self, rngs: nnx.Rngs, size: int, *, eps: float, dtype: str = "float32"):
        self.eps = eps
        self.weight = param(rngs.params(), (size,), constant(1.0), axes=("norm",), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
            return (weight.astype(jnp.float32) * _normalized(x, self.eps)).astype(x.dtype)

        return _keeping_x(norm, x, self.weight[...])
