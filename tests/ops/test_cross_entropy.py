"""The chunked cross-entropy equals the plain one, and never holds the whole batch's logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops.cross_entropy import linear_cross_entropy


def plain(hidden, head, targets, weights):
    logp = jax.nn.log_softmax(hidden @ head, axis=-1)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights)


@pytest.mark.parametrize("chunk", [1, 7, 19, 64])
def test_equals_the_plain_form_with_gradients(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 19, 8))
    head = jax.random.normal(keys[1], (8, 31))
    targets = jax.random.randint(keys[2], (3, 19), 0, 31)
    weights = (jax.random.uniform(keys[3], (3, 19)) > 0.3).astype(jnp.float32)
    ours = jax.value_and_grad(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, chunk=chunk), argnums=(0, 1)
    )(hidden, head)
    expected = jax.value_and_grad(lambda h, w: plain(h, w, targets, weights), argnums=(0, 1))(
        hidden, head
    )
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_masked_tokens_cannot_leak():
    hidden = jnp.ones((1, 4, 8)).at[0, 2].set(jnp.nan)
    weights = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    loss = linear_cross_entropy(hidden, jnp.ones((8, 5)), jnp.zeros((1, 4), int), weights)
    np.testing.assert_allclose(loss, 3 * np.log(5), rtol=1e-6)


def test_memory_does_not_hold_all_logits():
    batch, length, hidden, vocab = 1, 4096, 16, 4096

    def run(h, w):
        targets = jnp.zeros((batch, length), jnp.int32)
        return linear_cross_entropy(h, w, targets, jnp.ones((batch, length)), chunk=128)

    shapes = (
        jax.ShapeDtypeStruct((batch, length, hidden), jnp.float32),
        jax.ShapeDtypeStruct((hidden, vocab), jnp.float32),
    )
    compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 4
