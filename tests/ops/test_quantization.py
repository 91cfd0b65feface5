"""Simulated FP8 and FP4 against ml_dtypes' own rounding, at ties and block borders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fathom.ops.quantization import hadamard, simulate_fp4, simulate_fp8


def by_hand(x, block, largest, floor, dtype):
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, block)
    amax = np.maximum(np.abs(blocks).max(-1, keepdims=True), floor)
    scale = 2.0 ** np.ceil(np.log2(amax / largest))
    return ((blocks / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale).reshape(
        x.shape
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
def test_fp8_blocks(seed, spread):
    x = np.random.default_rng(seed).normal(size=(5, 192)).astype(np.float32) * spread
    expected = by_hand(x, 64, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(simulate_fp8(jnp.asarray(x), 64), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [1e-3, 1.0, 40.0])
def test_fp4_blocks(seed, spread):
    x = np.random.default_rng(seed).normal(size=(5, 96)).astype(np.float32) * spread
    expected = by_hand(x, 32, 6.0, 6 * 2.0**-126, ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(simulate_fp4(jnp.asarray(x), 32), expected)


def test_fp4_ties_go_to_even():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -2.5, -5.0, 6.0]
    x = jnp.array([ties + [0.0] * (32 - len(ties))])
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -2.0, -4.0, 6.0]
    np.testing.assert_array_equal(simulate_fp4(x, 32)[0, : len(ties)], even)


def test_zero_blocks_stay_zero_and_scales_are_exact_at_powers_of_two():
    assert not np.any(simulate_fp8(jnp.zeros((2, 64)), 64))
    assert not np.any(simulate_fp4(jnp.zeros((2, 32)), 32))
    x = jnp.full((1, 64), 448.0)
    np.testing.assert_array_equal(simulate_fp8(x, 64), x)  # amax / 448 is exactly 1: no extra step


def test_gradient_passes_straight_through():
    x = jnp.linspace(-3, 3, 64)
    for simulate in (lambda x: simulate_fp8(x, 64), lambda x: simulate_fp4(x, 32)):
        np.testing.assert_array_equal(jax.grad(lambda x, f=simulate: f(x).sum())(x), np.ones(64))


def test_hadamard_is_orthonormal_and_its_own_inverse():
    x = jax.random.normal(jax.random.key(0), (3, 128))
    turned = hadamard(x)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(hadamard(turned), x, atol=1e-5)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(jnp.zeros((1, 96)))
    with pytest.raises(ValueError, match="blocks of 64"):
        simulate_fp8(jnp.zeros((1, 80)), 64)
