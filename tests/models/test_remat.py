"""Activation checkpointing of scanned units: the same numbers, and how much of the streams is saved."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from fathom.layers.losses import LossWeights, count_targets
from tests.models.small import FAST_COMPILE, FP32, packed_rows, random_model, small_config, small_spec, value_and_grads

CONFIG = small_config(("sliding", "hca") * 2, num_hash=0, num_mtp_layers=0)
LENGTH = 64


def saved_streams(policy, params, rest, batch):
    """How many arrays of streams, one for each trip of the scan, wait for the backward."""
    options = dataclasses.replace(FP32, remat=policy)
    spec = small_spec(CONFIG)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: spec.build(CONFIG, nnx.Rngs(0), options)))

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return spec.loss(model, batch, LossWeights(), count_targets(batch))[0]

    waiting = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    shape = (CONFIG.plan.repeats, 2, LENGTH, CONFIG.hc_mult, CONFIG.hidden_size)
    return sum(leaf.shape == shape for leaf in jax.tree.leaves(waiting))


def test_units():
    assert (CONFIG.plan.unit, CONFIG.plan.repeats) == (2, 2)
    _, params, rest = random_model(CONFIG, FP32)
    batch = packed_rows([(30, 20, 10), (64,)], LENGTH, CONFIG.vocab_size)
    assert [saved_streams(policy, params, rest, batch) for policy in ("unit", "full")] == [1, 2]
    results = []
    for policy in ("none", "unit"):
        function = value_and_grads(CONFIG, dataclasses.replace(FP32, remat=policy))
        results.append(jax.device_get(jax.jit(function, compiler_options=FAST_COMPILE)(params, rest, batch)))
    for want, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(want).max()))
