"""Every number of the config reaches the layers it is for, and no layer of any schedule is left out."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.hyper_connections import sinkhorn
from fathom.layers.losses import LossWeights, count_targets
from fathom.models.config_parts import YarnScaling
from fathom.models.deepseek_v4.attention import make_layer_inputs
from fathom.models.deepseek_v4.hf_mapping import layer_place
from fathom.train.state import named_leaves
from tests.models.small import (
    FAST_COMPILE,
    FP32,
    packed_rows,
    random_model,
    small_config,
    small_spec,
    value_and_grads,
)

pytestmark = pytest.mark.xdist_group("plan and features")

BLOCKS = ("sliding", "csa", "hca", "mtp")
CONFIG = small_config(("sliding", "csa", "hca"), index_top_k=8)
LENGTH = 100
ORIGINAL = CONFIG.rope_scaling.original_max_position_embeddings


@functools.cache
def outputs(config=CONFIG, options=FP32) -> dict[str, np.ndarray]:
    """What each block makes of the same random streams: block -> [2, LENGTH, n, D]."""
    graphdef, params, rest = random_model(config, options)
    # Position biases have the ratio in their shape; without them all weights are those of CONFIG.
    params = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 if "'ape'" in str(path) else x, params)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, LENGTH)).astype(np.int32)
    streams = rng.standard_normal((2, LENGTH, config.hc_mult, config.hidden_size)).astype(np.float32)

    def run(params, tokens, streams):
        model = nnx.merge(graphdef, params, rest)
        inputs = make_layer_inputs(config, tokens, make_documents(tokens, None, None))
        blocks = [model.layer(i) for i in range(config.num_layers)] + [model.mtp[0].block]
        return {name: block(streams, inputs)[0] for name, block in zip(BLOCKS, blocks, strict=True)}

    return jax.device_get(jax.jit(run, compiler_options=FAST_COMPILE)(params, tokens, streams))


def changes(config=CONFIG, options=FP32, beyond: float = 0.0) -> dict[str, np.ndarray]:
    """Block -> [LENGTH], the positions whose output another config or option changes by more than `beyond`."""
    want, got = outputs(), outputs(config, options)
    assert all(np.all(np.isfinite(x)) for x in got.values())
    return {name: np.any(np.abs(got[name] - want[name]) > beyond, axis=(0, 2, 3)) for name in BLOCKS}


def test_yarn_is_in_the_compressed_layers_and_nowhere_else():
    assert ORIGINAL < LENGTH
    scaling = YarnScaling(4.0, ORIGINAL, 32.0, 1.0)
    assert scaling.factor != CONFIG.rope_scaling.factor
    changed = changes(dataclasses.replace(CONFIG, rope_scaling=scaling))
    assert not changed["sliding"].any() and not changed["mtp"].any()
    for kind in ("csa", "hca"):
        assert changed[kind][ORIGINAL:].all(), kind


def test_each_ratio_is_that_of_its_layers():
    """Before the first window of either ratio closes nothing differs, from then on everything does. Nothing but the
    last bits: another number of entries is another shape of product, which may add in another order."""
    rounding = 1e-5
    fewer = changes(dataclasses.replace(CONFIG, compress_ratios=(0, 8, 16)), beyond=rounding)
    np.testing.assert_array_equal(fewer.pop("csa"), np.arange(LENGTH) >= 3)
    assert not any(changed.any() for changed in fewer.values())
    more = changes(dataclasses.replace(CONFIG, compress_ratios=(0, 4, 8)), beyond=rounding)
    np.testing.assert_array_equal(more.pop("hca"), np.arange(LENGTH) >= 7)
    assert not any(changed.any() for changed in more.values())


def test_the_indexer_selects_from_the_first_token_with_more_entries_than_it_keeps():
    changed = changes(options=dataclasses.replace(FP32, stage="dense"))
    first = (CONFIG.index_top_k + 1) * 4 - 1
    np.testing.assert_array_equal(changed.pop("csa"), np.arange(LENGTH) >= first)
    assert not any(block.any() for block in changed.values())


def test_the_sinkhorn_epsilon_reaches_every_block():
    changed = changes(dataclasses.replace(CONFIG, hc_eps=1e-2))
    assert all(block.all() for block in changed.values())


def _sinkhorn(logits: np.ndarray, added: float, divisors: list[float]) -> np.ndarray:
    """float64; `added` after the softmax, then one epsilon per division in their order."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    comb = exp / exp.sum(axis=1, keepdims=True) + added
    for number, eps in enumerate(divisors):
        comb = comb / (comb.sum(axis=number % 2, keepdims=True) + eps)
    return comb


def test_sinkhorn_adds_epsilon_in_every_division():
    logits = np.random.default_rng(0).standard_normal((4, 4, 2, 3))
    eps, iterations = 0.05, 3
    got = np.asarray(sinkhorn(logits.astype(np.float32), iterations, eps))
    divisions = 2 * iterations - 1
    np.testing.assert_allclose(got, _sinkhorn(logits, eps, [eps] * divisions), rtol=1e-5)
    # Leaving it out anywhere would be seen.
    assert np.abs(got - _sinkhorn(logits, 0.0, [eps] * divisions)).max() > 1e-4
    for place in range(divisions):
        without = [0.0 if number == place else eps for number in range(divisions)]
        assert np.abs(got - _sinkhorn(logits, eps, without)).max() > 1e-4, place


SCHEDULES = {
    "as Flash: unrolled, scanned pairs": (("sliding",) * 2 + ("csa", "hca") * 2 + ("csa",), 3),
    "scan and suffix": (("csa",) * 3 + ("sliding", "hca"), 0),
    "an odd last layer": (("hca", "csa") * 2 + ("hca",), 1),
    "no repetition": (("hca", "csa"), 1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_layer_takes_part_in_its_place(name):
    """Changing a layer's weights changes the streams after it, and none before."""
    kinds, num_hash = SCHEDULES[name]
    config = small_config(kinds, num_hash, num_mtp_layers=0, hc_sinkhorn_iters=2)
    plan = config.plan
    assert len(plan.prefix) + plan.unit * plan.repeats + len(plan.suffix) == len(kinds)
    graphdef, params, rest = random_model(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 20)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params):
        output = nnx.merge(graphdef, params, rest)(tokens, return_streams=True)
        return [*output.streams, output.logits]

    want = run(params)
    assert len(want) == len(kinds) + 1
    for layer in range(len(kinds)):
        path, index = layer_place(config, layer)
        flat = dict(nnx.to_flat_state(params))
        weight = flat[(*path, "attn", "wo_b", "weight")]
        value = weight.get_value()
        flat[(*path, "attn", "wo_b", "weight")] = weight.replace(value.at[index].multiply(1.5))
        got = run(nnx.from_flat_state(flat))
        changed = [bool(np.any(g != w)) for g, w in zip(got, want, strict=True)]
        assert changed == [after >= layer for after in range(len(kinds) + 1)], f"layer {layer}"


def test_simulated_quantisation_rounds_and_still_trains():
    config = small_config(("csa", "hca"), index_top_k=8)
    options = dataclasses.replace(FP32, simulate_quant=True)
    _, params, rest = random_model(config, options)
    batch = packed_rows([(88,), (30, 50)], 88, config.vocab_size)

    def loss(params, rest, batch):
        spec = small_spec(config)
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), FP32)))
        model = nnx.merge(graphdef, params, rest)
        return spec.loss(model, batch, LossWeights(mtp=0.3, balance=1e-2), count_targets(batch))[0]

    exact = float(jax.jit(loss, compiler_options=FAST_COMPILE)(params, rest, batch))
    function = jax.jit(value_and_grads(config, options), compiler_options=FAST_COMPILE)
    (rounded, _), grads = function(params, rest, batch)
    assert 1e-6 < abs(float(rounded) / exact - 1) < 2e-2
    for name, grad in named_leaves(grads).items():
        assert np.all(np.isfinite(grad)), name
        assert np.any(grad) != ("indexer" in name), name
