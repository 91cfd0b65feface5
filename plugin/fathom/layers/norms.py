"""Root-mean-square normalisation, in float32 whatever the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fathom.layers.param import constant, param


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension: float32 inside, x's dtype outside."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """weight * x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype at the end.

    Attributes:
      weight: [size], starts at one.
    """

    def __init__(self, rngs: nnx.Rngs, size: int, *, eps: float, dtype: str = "float32"):
        self.eps = eps
        self.weight = param(rngs.params(), (size,), constant(1.0), axes=("norm",), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (self.weight[...].astype(jnp.float32) * (x32 * scale)).astype(x.dtype)
