"""Stages of the attention's curriculum: what trains in each, and that the selection's option reaches V4's layers."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fathom
from fathom.layers.documents import make_documents
from fathom.mesh import make_mesh, sharding_scope
from fathom.models.deepseek_v4.attention import Attention, make_layer_inputs
from fathom.train.state import named_leaves
from fathom.train.step import init_state, make_program
from tests.models.small import FP32, packed_rows, small_config

KINDS = {"attention_kinds": ["csa"], "compress_ratios": [4], "router_kinds": ["learned"], "num_mtp_layers": 0}


@pytest.mark.parametrize("stage", ["dense", "indexer-warmup", "sparse"])
def test_a_stage_changes_what_it_trains_and_not_one_bit_of_the_rest(stage):
    """With weight decay, and gradients for everything: the optimizer must not know what is frozen."""
    overrides = [f"model.config.{key}={value}" for key, value in KINDS.items()]
    recipe = fathom.load_recipe("tiny-v4-cpu", [*overrides, f"train.stage={stage}", "optimizer.warmup_steps=0"])
    assert recipe.optimizer.weight_decay > 0
    program = make_program(recipe, make_mesh(recipe.mesh.shape))
    batch = {k: jnp.asarray(v) for k, v in packed_rows([(50, 46), (90,)] * 4, 96, 264).items()}
    state = init_state(program, 0)
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}
    biases = {name: np.asarray(leaf) for name, leaf in named_leaves(state.model_state).items()}
    with sharding_scope(program.mesh, program.rules):
        for _ in range(2):
            state, metrics = program.step(state, batch)
    assert ("loss/indexer" in metrics) == (stage != "dense")
    for name, leaf in named_leaves(state.model_state).items():
        assert np.array_equal(biases[name], np.asarray(leaf)) == (stage == "indexer-warmup"), name
    for name, leaf in named_leaves(state.params).items():
        trains = {"dense": "indexer" not in name, "indexer-warmup": "indexer" in name, "sparse": True}[stage]
        assert np.array_equal(before[name], np.asarray(leaf)) != trains, name


@pytest.mark.parametrize("selection", ["exact", "approx"])
def test_v4_selects_as_it_is_told_and_says_so(selection, caplog):
    config = small_config(("csa",))
    options = dataclasses.replace(FP32, selection=selection, recall_target=0.9)
    layer = nnx.eval_shape(lambda: Attention(nnx.Rngs(0), config, "csa", 4, options))
    graphdef, state = nnx.split(layer)
    tokens = jnp.zeros((1, 96), jnp.int32)
    inputs = make_layer_inputs(config, tokens, make_documents(tokens, None, None))

    def run(state, x):
        return nnx.merge(graphdef, state)(x, inputs)[0]

    with caplog.at_level(logging.INFO):
        program = str(jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((1, 96, config.hidden_size), jnp.float32)))
    assert ("approx_top_k" in program) == (selection == "approx") and ("recall_target=0.9" in program) == (
        selection == "approx"
    )
    assert any(f"indexer: {selection}" in record.message for record in caplog.records)
