"""The schedule, decay and freezing of the optimizer, and the guarded, accumulated update of the step."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.mesh import abstract_mesh, make_mesh, sharding_scope
from fathom.recipe import Recipe
from fathom.train import optimizer
from fathom.train.state import named_leaves, split_model
from fathom.train.step import init_state, make_program
from tests.train.toy_model import TOY


def optimizer_block(**changes):
    fields = dict(
        name="adamw", learning_rate=1e-2, warmup_steps=4, decay_steps=5, final_ratio=0.1,
        decay="linear", b1=0.9, b2=0.95, eps=1e-20, weight_decay=0.1, clip_norm=1.0, decay_all=False,
        momentum_dtype="float32", muon_momentum=0.95, muon_rms=0.18, muon_dtype="float32",
    )  # fmt: skip
    return types.SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", TOY)
    return TOY


def toy_recipe(mesh=None, model=None, optimizer=None, **train) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "toy",
            "model": {"name": "toy-lm", "dtype": "float32", **(model or {})},
            "data": {"path": "unused", "sequence_length": 16, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 2, **(optimizer or {})},
            "mesh": mesh or {},
            "train": {"steps": 10, **train},
        }
    )


def toy_batch(seed=0, rows=16, length=16):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)  # rows end in padding of different lengths
    positions = np.arange(length, dtype=np.int32)
    valid = positions < lengths[:, None]
    return {
        "tokens": np.where(valid, rng.integers(0, 50, (rows, length)), 0).astype(np.int32),
        "segment_ids": valid.astype(np.int32),
        "positions": np.where(valid, positions, 0).astype(np.int32),
    }


programs = {}  # compiled once for all tests


def program_of(recipe, devices=1):
    key = (recipe.digest(), zoo.get("toy-lm").loss, devices)
    if key not in programs:
        mesh = make_mesh(recipe.mesh.shape, jax.devices()[:devices])
        programs[key] = make_program(recipe, mesh)
    return programs[key]


def run(recipe, batches, devices=1):
    program = program_of(recipe, devices)
    state = init_state(program, recipe.train.seed)
    metrics = []
    with sharding_scope(program.mesh, program.rules):
        for batch in batches:
            state, values = program.step(state, jax.device_put(batch, program.batch_sharding))
            metrics.append({name: float(x) for name, x in values.items()})
    return state, metrics


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedule_is_warmup_stable_decay(decay):
    schedule = optimizer.make_schedule(optimizer_block(decay=decay), steps=20)
    rates = np.array([float(schedule(step)) for step in range(21)])
    np.testing.assert_allclose(rates[:4], [2.5e-3, 5e-3, 7.5e-3, 1e-2], rtol=1e-6)
    np.testing.assert_allclose(rates[4:16], 1e-2, rtol=1e-6)
    assert (np.diff(rates[15:21]) < 0).all()
    np.testing.assert_allclose(rates[20], 1e-3, rtol=1e-5)
    middle = {"linear": 1e-2 * (1 - 0.9 * 0.4), "cosine": 1e-3 + 9e-3 * (1 + np.cos(0.4 * np.pi)) / 2}
    np.testing.assert_allclose(rates[17], middle[decay], rtol=1e-5)


def test_schedule_without_warmup_or_decay():
    schedule = optimizer.make_schedule(optimizer_block(warmup_steps=0, decay_steps=0), steps=3)
    np.testing.assert_allclose([float(schedule(s)) for s in range(3)], 1e-2, rtol=1e-6)


def test_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps 4 \+ optimizer.decay_steps 5 .* train.steps 8"):
        optimizer.make_schedule(optimizer_block(), steps=8)


def test_only_matrices_decay():
    params = split_model(TOY, ComputeOptions(dtype="float32")).params
    mask = {name: bool(x) for name, x in named_leaves(optimizer.decay_mask(params)).items()}
    assert mask == {"embed": True, "up": True, "down": True, "gain": False, "temperature": False}


def test_with_decay_all_everything_decays():
    params = split_model(TOY, ComputeOptions(dtype="float32")).params
    weights = jax.tree.map(lambda x: jnp.ones(x.shape), nnx.as_pure(params))
    block = optimizer_block(decay_all=True, warmup_steps=0)
    tx = optimizer.make_optimizer(TOY, params, block, 100, "sparse")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
    for name, update in named_leaves(updates).items():
        np.testing.assert_allclose(update, -1e-2 * 0.1, rtol=1e-6, err_msg=name)


def test_deepseek_norms_and_biases_do_not_decay():
    params = split_model(zoo.get("deepseek-v4-tiny"), ComputeOptions(dtype="float32")).params
    mask = named_leaves(optimizer.decay_mask(params))
    for name, decays in mask.items():
        last, parent = name.split("/")[-1], name.split("/")[-2]
        exempt = "norm" in parent or last in ("sink", "ape", "base", "scale", "bias")
        assert bool(decays) != exempt, name


def test_adamw_matches_a_plain_loop(toy):
    recipe = toy_recipe()
    batches = [toy_batch(seed) for seed in range(3)]
    state, metrics = run(recipe, batches)

    spec, block = TOY, recipe.optimizer
    options = recipe.model.compute_options()
    program = program_of(recipe)
    start = init_state(program, 0)
    params = {k: jnp.asarray(v) for k, v in arrays(start.params).items()}
    split = program.model
    mu = {name: jnp.zeros_like(x) for name, x in params.items()}
    nu = {name: jnp.zeros_like(x) for name, x in params.items()}
    from fathom.layers.losses import LossWeights, count_targets

    def loss_fn(params, batch):
        filled = jax.tree.unflatten(
            jax.tree.structure(split.params), [params[n] for n in named_leaves(split.params)]
        )
        model = split.merge((filled,), start.model_state, jax.random.key(0))
        return spec.loss(model, batch, LossWeights(), count_targets(batch))[0]

    assert options.dtype == "float32"
    for i, batch in enumerate(batches):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        np.testing.assert_allclose(metrics[i]["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics[i]["grad_norm"], norm, rtol=1e-5)
        rate = [5e-3, 1e-2, 1e-2][i]
        np.testing.assert_allclose(metrics[i]["learning_rate"], rate, rtol=1e-6)
        for name, g in grads.items():
            g = g * min(1.0, 1.0 / norm)
            mu[name] = 0.9 * mu[name] + 0.1 * g
            nu[name] = 0.95 * nu[name] + 0.05 * g**2
            hat_mu, hat_nu = mu[name] / (1 - 0.9 ** (i + 1)), nu[name] / (1 - 0.95 ** (i + 1))
            # Entries without any gradient (unused tokens) do not move: 0 / (sqrt(0) + eps) is 0.
            update = hat_mu / (jnp.sqrt(hat_nu) + block.eps)
            decay = 0.1 if name in ("embed", "up", "down") else 0.0
            params[name] = params[name] - rate * (update + decay * params[name])
    for name, value in arrays(state.params).items():
        np.testing.assert_allclose(value, params[name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_frozen_parameters_have_no_moments_and_no_update(toy):
    batches = [toy_batch(seed) for seed in range(2)]
    state, _ = run(toy_recipe(stage="dense"), batches)
    assert not [name for name in named_leaves(state.opt_state) if "temperature" in name]
    assert float(state.params["temperature"][...][0]) == 1.0
    trained, _ = run(toy_recipe(stage="sparse"), batches)
    assert float(trained.params["temperature"][...][0]) != 1.0
    assert [name for name in named_leaves(trained.opt_state) if "temperature" in name]


def test_the_indexers_gradients_shorten_nobody_elses_step():
    """Clipping is by global norm, of the indexers and of all else apart."""
    spec = zoo.get("deepseek-v4-tiny")
    params = nnx.State(
        {"attn": {"wkv": nnx.Param(jnp.ones(4)), "indexer": {"wq_b": nnx.Param(jnp.ones(4))}}}
    )
    clip = optimizer._clip(spec, params, 1.0)
    grads = nnx.as_pure(jax.tree.map(lambda x: 0.4 * x, params))  # a norm of 0.8 each
    loud = {"attn": {"wkv": grads["attn"]["wkv"], "indexer": {"wq_b": 100 * grads["attn"]["indexer"]["wq_b"]}}}
    clipped, _ = clip.update(type(grads)(loud), clip.init(grads))
    np.testing.assert_array_equal(clipped["attn"]["wkv"], grads["attn"]["wkv"])
    np.testing.assert_allclose(np.linalg.norm(clipped["attn"]["indexer"]["wq_b"]), 1.0, rtol=1e-6)


def test_a_stage_that_freezes_everything_is_refused(toy, monkeypatch):
    frozen = dataclasses.replace(TOY, frozen=lambda path, stage: True)
    monkeypatch.setitem(zoo._registered, "toy-lm", frozen)
    with pytest.raises(ValueError, match="no trainable parameter in stage 'sparse'"):
        make_program(toy_recipe(), make_mesh({}, jax.devices()[:1]))


def test_accumulation_gives_the_same_step(toy):
    whole, whole_metrics = run(toy_recipe(), [toy_batch(0), toy_batch(1)])
    parts, part_metrics = run(toy_recipe(accumulation=4), [toy_batch(0), toy_batch(1)])
    for a, b in zip(whole_metrics, part_metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    a, b = arrays(whole.model_state), arrays(parts.model_state)
    np.testing.assert_array_equal(a["seen"], b["seen"])  # counts add up exactly
    for name, moment in arrays(whole.opt_state).items():
        np.testing.assert_allclose(
            moment, arrays(parts.opt_state)[name], rtol=1e-4, atol=1e-8, err_msg=name
        )


@pytest.mark.parametrize(
    ("mesh", "name"),
    [({"fsdp": 8}, "adamw"), ({"data": 2, "fsdp": 2, "tensor": 2}, "adamw"), ({"fsdp": 4, "tensor": 2}, "muon")],
    ids=["fsdp8", "data-fsdp-tensor", "muon"],
)
def test_a_mesh_changes_nothing(toy, mesh, name):
    batches, block = [toy_batch(0), toy_batch(1)], {"name": name, "muon_dtype": "float32"}
    alone, alone_metrics = run(toy_recipe(optimizer=block), batches)
    sharded, sharded_metrics = run(toy_recipe(mesh, optimizer=block, accumulation=2), batches, devices=8)
    np.testing.assert_allclose(
        [m["loss"] for m in alone_metrics], [m["loss"] for m in sharded_metrics], rtol=1e-5
    )
    for weight, param in named_leaves(sharded.params).items():
        assert moment_of(sharded.opt_state, name, weight).sharding == param.sharding, weight
    assert sharded.params["up"][...].sharding.spec[1] == "fsdp"


def moment_of(opt_state, name, weight):
    """A weight's first moment in the state of the optimizer of that name."""
    prefix = "1/mu" if name == "adamw" else "1/inner_states/adamw/inner_state/mu"
    if name == "muon" and weight in ("up", "down"):
        prefix = "1/inner_states/muon/inner_state/0/trace"
    return named_leaves(opt_state)[f"{prefix}/{weight}"]


def test_bfloat16_parameters_have_float32_moments(toy):
    recipe = toy_recipe(model={"param_dtype": "bfloat16"})
    state, _ = run(recipe, [toy_batch(0)])
    assert state.params["up"][...].dtype == jnp.bfloat16
    assert state.params["temperature"][...].dtype == jnp.float32
    dtypes = {str(x.dtype) for name, x in named_leaves(state.opt_state).items() if "/" in name}
    assert dtypes == {"float32", "int32"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_first_moments_in_bfloat16(toy, name):
    """They alone are; the update is the rounded moment's, not rounded itself."""
    block = {"name": name, "muon_dtype": "float32"}
    recipe, short = toy_recipe(optimizer=block), toy_recipe(optimizer={**block, "momentum_dtype": "bfloat16"})
    batches = [toy_batch(i) for i in range(3)]
    (exact, _), (rounded, _) = run(recipe, batches), run(short, batches)
    want, got = named_leaves(exact.opt_state), named_leaves(rounded.opt_state)
    for leaf_name, leaf in got.items():
        first = "/mu/" in leaf_name or "/trace/" in leaf_name
        assert leaf.dtype == (jnp.bfloat16 if first else want[leaf_name].dtype), leaf_name
    for weight_name, weight in named_leaves(rounded.params).items():
        assert weight.dtype == jnp.float32
        change = np.abs(weight - named_leaves(exact.params)[weight_name]).max()
        # Of three steps of at most the learning rate.
        assert 0 < change < 0.03 * 3 * 1e-2, (weight_name, change)


@pytest.mark.parametrize(
    ("name", "weight", "keep", "add"),
    [("adamw", "embed", 0.9, 0.1), ("muon", "embed", 0.9, 0.1), ("muon", "up", 0.95, 1)],
)
def test_first_moments_are_rounded_once_a_step(name, weight, keep, add):
    """And neither the factor that they shrink by nor the product."""
    params = split_model(TOY, ComputeOptions(dtype="float32")).params
    block = optimizer_block(name=name, momentum_dtype="bfloat16", clip_norm=None)
    tx = optimizer.make_optimizer(TOY, params, block, 100, "sparse")
    rng = np.random.default_rng(0)
    params, one, two = (
        jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nnx.as_pure(params)) for _ in range(3)
    )
    update, state = jax.jit(tx.update), tx.init(params)
    for gradients in (one, two):
        _, state = update(gradients, state, params)
    first = jnp.asarray(add * one[weight]).astype(jnp.bfloat16).astype(jnp.float32)
    want = (keep * first + add * two[weight]).astype(jnp.bfloat16)
    got = moment_of(state, name, weight)
    assert got.dtype == jnp.bfloat16 and np.mean(got != want) < 0.01  # a fused sum may round the other way


def test_dropout_depends_on_step_and_seed_only(toy):
    recipe = toy_recipe(model={"config": {"dropout": 0.5}})
    first, again = (run(recipe, [toy_batch(0)] * 2)[1] for _ in range(2))
    assert first == again
    plain = run(toy_recipe(), [toy_batch(0)] * 2)[1]
    assert first[0]["loss"] != plain[0]["loss"]


def explode_on(token):
    """The toy loss, infinite for batches whose first token is `token`."""

    def loss(model, batch, weights, counts):
        value, aux = TOY.loss(model, batch, weights, counts)
        bad = batch["tokens"][0, 0] == token
        return value + jnp.where(bad, jnp.inf, 0.0) * model.temperature[...][0], aux

    return loss


def test_a_non_finite_step_changes_nothing_but_the_step_number(toy, monkeypatch):
    spec = dataclasses.replace(TOY, loss=explode_on(77))
    monkeypatch.setitem(zoo._registered, "toy-lm", spec)
    bad = toy_batch(1)
    bad["tokens"][0, 0] = 77
    before, _ = run(toy_recipe({"fsdp": 8}), [toy_batch(0)], devices=8)
    after, metrics = run(toy_recipe({"fsdp": 8}), [toy_batch(0), bad], devices=8)
    assert [m["finite"] for m in metrics] == [1.0, 0.0]
    assert not np.isfinite(metrics[1]["loss"])
    a, b = arrays(before), arrays(after)
    assert (a.pop("step"), b.pop("step")) == (1, 2)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_the_step_lowers_without_devices(toy):
    program = make_program(toy_recipe(), abstract_mesh({"data": 32, "fsdp": 4, "tensor": 4}))
    text = program.lower(256, 16, platforms=("tpu",)).as_text()
    assert "sdy.mesh" in text or "mhlo.sharding" in text


def test_abstract_state_matches_the_real_one(toy):
    recipe = toy_recipe({"fsdp": 2, "tensor": 4})
    program = program_of(recipe, devices=8)
    state = init_state(program, 0)
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    for name, leaf in named_leaves(program.state).items():
        real = named_leaves(state)[name]
        assert (real.shape, real.dtype) == (leaf.shape, leaf.dtype), name
        assert real.sharding.is_equivalent_to(leaf.sharding, real.ndim), name
    assert isinstance(state.params, nnx.State)
    assert optax.tree.norm(nnx.as_pure(state.params)) > 0
