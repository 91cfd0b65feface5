"""A run that starts from a converted checkpoint: its weights, on the run's mesh, with a fresh optimizer."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from checkpoints_tools.convert import Request, convert
from checkpoints_tools.hub_source import HubSource
from fathom.mesh import make_mesh
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from fathom.recipe import RecipeError
from fathom.step_folder import CheckpointError
from fathom.train.checkpoint_model import start_from
from fathom.train.loop import check_init
from fathom.train.state import named_leaves
from fathom.train.step import make_program
from tests.checkpoints.folders import native_folder
from tests.train.runs import make_recipe

SMALL = {
    "attention_kinds": ["csa", "hca"],
    "compress_ratios": [4, 16],
    "router_kinds": ["hash", "learned"],
    "hidden_size": 64,
    "q_lora_rank": 32,
    "moe_intermediate_size": 96,
}


def recipe_of(tmp_path, **changes):
    common = dict(
        model__name="deepseek-v4-tiny",
        model__config=SMALL,
        model__init=str(tmp_path / "step"),
        mesh__data=1,
        mesh__fsdp=2,
        mesh__tensor=2,
        mesh__expert=2,
    )
    return make_recipe(tmp_path, **{**common, **changes})


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    config = recipe_of(folder).model_spec().config
    native_folder(folder / "hub", dataclasses.replace(config, expert_dtype="fp4"))
    return folder / "hub", config


@pytest.mark.parametrize("dtype", ["native", "bf16"])
def test_the_weights_of_the_folder_on_the_mesh_of_the_run(tmp_path, native, dtype):
    hub, config = native
    assert convert(Request(hub, tmp_path / "step", "orbax", dtype)).complete
    recipe = recipe_of(tmp_path)
    check_init(recipe)
    program = make_program(recipe, make_mesh(recipe.mesh.shape))
    state = start_from(program, recipe.model.init, 0)
    found = named_leaves(state.params) | named_leaves(state.model_state)
    source = HubSource(hub)
    for tensor in hub_tensors(config):
        leaf = found["/".join(map(str, tensor.path))]
        wanted = source.read(tensor).astype(leaf.dtype)
        np.testing.assert_array_equal(np.asarray(leaf)[tensor.index], wanted, err_msg=tensor.name)
    shardings = {name: leaf.sharding for name, leaf in named_leaves(program.state.params).items()}
    assert all(found[name].sharding == sharding for name, sharding in shardings.items())
    assert int(state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_what_is_no_checkpoint_is_refused_with_the_command_to_make_one(tmp_path, native):
    with pytest.raises(RecipeError, match=r"model.init.*fathom convert --to orbax"):
        check_init(recipe_of(tmp_path, model__init=str(native[0])))


def test_another_architecture_is_refused_naming_what_differs(tmp_path, native):
    assert convert(Request(native[0], tmp_path / "step", "orbax")).complete
    recipe = recipe_of(tmp_path, model__config={**SMALL, "num_experts_per_tok": 3})
    program = make_program(recipe, make_mesh(recipe.mesh.shape))
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok: 2 in the checkpoint, 3"):
        start_from(program, recipe.model.init, 0)
