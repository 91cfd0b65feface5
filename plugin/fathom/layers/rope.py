"""Rotary position embedding: interleaved pairs on the trailing dimensions, and YaRN frequencies.

V4 turns pairs (2i, 2i+1) of the last `rope_head_dim` channels (models/deepseek_v4/README.md "RoPE"). YaRN enters
through the frequencies alone: V4 applies no mscale anywhere.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(dim: int, theta: float) -> np.ndarray:
    """theta^(-2i/dim) for i in [0, dim/2), float32 [dim/2] (radians per position)."""
    # Every step rounds to float32 as the references do: at position 1,048,575 one ulp of a frequency is up to
    # 0.06 radians, so the last bit matters.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def yarn_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
) -> np.ndarray:
    """YaRN: frequencies divided by `factor` where a pair turns fewer than beta_slow times, ramped between.

    Args:
      dim: rotary dimensions. theta: base. factor: length extension.
      original_length: positions the base frequencies were trained on.
      beta_fast, beta_slow: turns over `original_length` at which the ramp begins and ends.

    Returns:
      float32 [dim/2], radians per position.
    """
    base = rope_frequencies(dim, theta)

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a width
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    ramp = ramp.astype(np.float32)
    keep = np.float32(1.0) - ramp
    return base / np.float32(factor) * (np.float32(1.0) - keep) + base * keep


def rope_tables(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position x frequency, float32 [..., dim/2] for integer positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: jax.Array, tables: tuple[jax.Array, jax.Array], *, inverse: bool = False
) -> jax.Array:
    """Turns the interleaved pairs of x's last 2 * tables.shape[-1] channels.

    Args:
      x: [..., H]. The leading channels pass unchanged.
      tables: (cos, sin), each broadcastable to [..., rope_dim/2]; they receive no gradient.
      inverse: turn by the negative angle (V4 does so to the attention output, whose values carry RoPE).

    Returns:
      x's shape and dtype; the rotation is done in float32.
    """
    return _turn(inverse, x, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(inverse: bool, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = tables
    if inverse:
        sin = -sin
    dim = 2 * cos.shape[-1]
    rest, turned = x[..., :-dim], x[..., -dim:].astype(jnp.float32)
    pairs = turned.reshape(*turned.shape[:-1], dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([rest, out.reshape(turned.shape).astype(x.dtype)], axis=-1)


def _turn_forward(inverse, x, tables):
    return _turn(inverse, x, tables), tables


def _turn_backward(inverse, tables, dout):
    # A rotation's transpose is the rotation back. Derived, it is a sum of padded halves, each as large as x.
    return _turn(not inverse, dout, tables), jax.tree.map(jnp.zeros_like, tables)


_turn.defvjp(_turn_forward, _turn_backward)
