"""Experts that are given: a model routes by them, weighs by its own scores, and learns to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.router import GroupLimitedRouter, LearnedRouter
from fathom.models.deepseek_v4.model import make_moe
from tests.models.small import FAST_COMPILE, FP32, fill, packed_rows, small_config, small_spec


def specs():
    v32 = zoo.get("deepseek-v3.2-tiny")
    # A hash router, two scanned learned ones, and that of MTP; attention is beside the point, and slow to compile.
    v4 = small_spec(small_config(("sliding",) * 3))
    return {"v4": v4, "v3.2": v32.with_config(dataclasses.replace(v32.config, num_mtp_layers=0))}


@pytest.fixture(scope="module", params=["v4", "v3.2"])
def case(request):
    """The spec, its functions of (params, rest, batch), two sets of parameters, and a packed batch."""
    spec = specs()[request.param]
    abstract = nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), FP32))
    graphdef, old, rest = fill(abstract)
    _, new, _ = fill(abstract, seed=1)
    batch = packed_rows([(50, 46), (90,)], 96, spec.config.vocab_size)

    def route(params, rest, batch):
        return spec.route(nnx.merge(graphdef, params, rest), batch)

    def loss(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        return spec.loss(model, batch, LossWeights(mtp=0.3, balance=1e-2), count_targets(batch))

    compiled = jax.jit(route, compiler_options=FAST_COMPILE)
    train = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)
    return spec, compiled, train, old, new, rest, {name: jnp.asarray(x) for name, x in batch.items()}


def test_a_models_own_choice_changes_nothing(case):
    _, route, train, old, _, rest, batch = case
    chosen = route(old, rest, batch)
    (loss, aux), grads = train(old, rest, batch)
    (given_loss, given_aux), given_grads = train(old, rest, {**batch, "routing": chosen})
    assert loss == given_loss
    assert set(chosen) <= set(aux["expert_load"])
    for one, other in zip(jax.tree.leaves((aux, grads)), jax.tree.leaves((given_aux, given_grads)), strict=True):
        # Another program may add up in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(np.abs(one).max(), 1e-9))


def test_experts_of_other_parameters_are_used_and_weighed_by_the_current_ones(case):
    spec, route, train, old, new, rest, batch = case
    chosen = route(old, rest, batch)
    (_, aux), own_grads = train(new, rest, batch)
    (loss, given_aux), grads = train(new, rest, {**batch, "routing": chosen})
    assert np.isfinite(loss)
    valid = np.asarray(batch["segment_ids"]) > 0
    for name, indices in chosen.items():
        indices = np.asarray(indices)
        by_layer = indices[:, None] if indices.ndim == 3 else indices
        num_experts = given_aux["expert_load"][name].shape[-1]
        load = [np.bincount(by_layer[:, r][valid].ravel(), minlength=num_experts) for r in range(by_layer.shape[1])]
        np.testing.assert_array_equal(np.reshape(given_aux["expert_load"][name], (-1, num_experts)), load)
        assert not np.array_equal(given_aux["expert_load"][name], aux["expert_load"][name])
    gates = [(p, g.get_value()) for p, g in nnx.to_flat_state(grads) if p[-2:] == ("router", "weight")]
    assert gates and all(np.abs(g).max() > 0 for _, g in gates)
    own = dict(nnx.to_flat_state(own_grads))
    assert any(not np.allclose(g, own[p].get_value()) for p, g in gates)


def test_experts_for_a_block_that_is_not_there_are_refused(case):
    _, route, train, old, _, rest, batch = case
    indices = jax.ShapeDtypeStruct((2, 96, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"given for \['repeated/9'\], expected some of the blocks \['"):
        train.lower(old, rest, {**batch, "routing": {"repeated/9": indices}})


@pytest.mark.parametrize("kind", [LearnedRouter, GroupLimitedRouter])
def test_a_router_weighs_given_experts_by_its_scores(kind):
    groups = {"num_groups": 4, "groups_per_token": 2} if kind is GroupLimitedRouter else {}
    router = kind(nnx.Rngs(0), hidden_size=16, num_experts=8, top_k=2, scale=1.5, init_std=1.0, **groups)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    tokens = jnp.zeros((2, 5), jnp.int32)
    own = router(x, tokens)
    given = jnp.stack([(own.indices_BSK[..., 0] + 1) % 8, own.indices_BSK[..., 0]], axis=-1)
    routing = router(x, tokens, given)
    np.testing.assert_array_equal(routing.indices_BSK, given)
    scores = np.take_along_axis(np.asarray(own.scores_BSE), np.asarray(given), axis=-1)
    np.testing.assert_allclose(routing.weights_BSK, 1.5 * scores / scores.sum(-1, keepdims=True), rtol=1e-6)


def test_a_hash_router_takes_no_experts():
    config = small_config()
    moe = make_moe(nnx.Rngs(0), config, "hash", "float32")
    x, tokens = jnp.zeros((1, 4, config.hidden_size)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="given to a hash router"):
        moe(x, tokens, None, jnp.zeros((1, 4, 2), jnp.int32))
