"""Simulated quantisation of the released inference code: FP8 and FP4 block rounding, Hadamard rotation.

Values stay in their dtype and are rounded to what the quantised format can hold
(models/deepseek_v4/README.md "Simulated quantisation").
Gradients pass straight through.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

FP8_MAX = 448.0
FP4_MAX = 6.0


def _power_of_two_scale(amax: jax.Array, largest: float) -> jax.Array:
    """The smallest power of two s with amax <= s * largest, computed on the float32 exponent bits."""
    ratio = amax * jnp.float32(1.0 / largest)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _round_e4m3(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)


def _round_e2m1(x: jax.Array) -> jax.Array:
    """Rounds |x| <= 6 to {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even mantissa."""
    magnitude = jnp.abs(x)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    return jnp.sign(x) * jnp.round(magnitude / step) * step


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded.astype(x.dtype) - x)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} channels cannot be cut into quantisation blocks of {block}")
    return x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)


def simulate_fp8(x: jax.Array, block: int) -> jax.Array:
    """Rounds the last dimension to FP8 e4m3 with one power-of-two scale per `block` channels."""
    blocks = _blocks(x, block)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 1e-4)
    scale = _power_of_two_scale(amax, FP8_MAX)
    rounded = _round_e4m3(jnp.clip(blocks / scale, -FP8_MAX, FP8_MAX)) * scale
    return _straight_through(x, rounded.reshape(x.shape))


def simulate_fp4(x: jax.Array, block: int) -> jax.Array:
    """Rounds the last dimension to FP4 e2m1 with one power-of-two scale per `block` channels."""
    blocks = _blocks(x, block)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), FP4_MAX * 2.0**-126)
    scale = _power_of_two_scale(amax, FP4_MAX)
    rounded = _round_e2m1(jnp.clip(blocks / scale, -FP4_MAX, FP4_MAX)) * scale
    return _straight_through(x, rounded.reshape(x.shape))


@functools.cache
def _hadamard_matrix(size: int) -> np.ndarray:
    if size & (size - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two channels, found {size}")
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard(x: jax.Array) -> jax.Array:
    """Orthonormal Hadamard (Sylvester) rotation of the last dimension, whose size is a power of two."""
    size = x.shape[-1]
    rotated = jnp.einsum(
        "...h,hk->...k",
        x.astype(jnp.float32),
        _hadamard_matrix(size),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (rotated * size**-0.5).astype(x.dtype)
