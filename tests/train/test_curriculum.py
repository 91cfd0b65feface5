"""A run in stages: rows, mesh and what trains change at a border, and the run can be cut there or anywhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from fathom import zoo
from fathom.recipe import Recipe, load_recipe
from fathom.recipe_checks import RecipeError
from fathom.recipe_stages import stage_recipes
from fathom.step_folder import CheckpointError
from fathom.train import curriculum, loop
from fathom.train.checkpoint import Checkpoints
from fathom.train.loop import train
from fathom.train.metrics import read_metrics
from fathom.train.state import named_leaves
from tests.train import runs, toy_model
from tests.train.runs import history, interrupted, make_recipe, saved_arrays, steps_on_disk

STAGES = (
    {"name": "short", "until": 4},
    {"until": 8, "data": {"sequence_length": 64, "batch_size": 4}, "mesh": {"fsdp": 4, "context": 2}},
    {"until": 11, "data": {"sequence_length": 128, "batch_size": 2}, "mesh": {"context": 8}},
)
OPTIMIZERS = ("adamw", "muon")
CSA = {"attention_kinds": ["csa"], "compress_ratios": [4], "router_kinds": ["learned"], "num_mtp_layers": 0}


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    runs.write_text(tmp_path / "text")


def in_stages(tmp_path, run, stages=STAGES, **changes):
    changes = {"train__steps": stages[-1]["until"], "checkpoint__every": 3, "checkpoint__keep": 20, **changes}
    values = make_recipe(tmp_path, run, **changes).to_dict()
    return Recipe.model_validate({**values, "stages": list(stages)})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_in_stages_equals_one_that_was_not(tmp_path, monkeypatch, name):
    """Preempted inside a stage, at a border, right after one; killed in the last stage before its first save."""
    straight, broken = (in_stages(tmp_path, run, optimizer__name=name) for run in ("straight", "broken"))
    result = train(straight)
    assert result.step == 11
    actions = {2: runs.sigterm, 4: runs.sigterm, 5: runs.sigterm, 8: runs.crash, 9: runs.crash}
    again = interrupted(broken, monkeypatch, actions)
    assert again.step == 11
    assert history(straight, "loss", "batch_hash") == history(broken, "loss", "batch_hash")
    assert saved_arrays(result, 11) == saved_arrays(again, 11)
    assert steps_on_disk(result) == [3, 4, 6, 8, 9, 11]
    border, later, last = (json.loads(runs.saved_data_state(result, step))[0] for step in (4, 6, 11))
    assert later["start"] == border["documents"] and last["start"] > later["documents"]
    assert load_recipe(broken.run_dir / "recipe.yaml") == broken


def test_sigterm_while_a_border_is_saved_ends_the_run_there(tmp_path, monkeypatch):
    """And one while the next stage is being made ready is not lost."""
    recipe = in_stages(tmp_path, "run")
    wait, open_loader = Checkpoints.wait, loop.open_loader
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", lambda self: (runs.sigterm(None), wait(self))[1])
        result = train(recipe)
    assert (result.step, result.preempted, steps_on_disk(result)) == (4, True, [3, 4])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_loader", lambda *given: (runs.sigterm(None), open_loader(*given))[1])
        result = train(recipe)
    assert (result.step, result.preempted) == (5, True)


def test_a_stage_has_the_values_of_the_recipe_but_for_those_it_names(tmp_path):
    recipes = stage_recipes(in_stages(tmp_path, "stages"))
    assert [r.data.sequence_length for r in recipes] == [32, 64, 128]
    assert [dict(r.mesh.shape)["context"] for r in recipes] == [1, 2, 8]
    assert [r.mesh.tensor for r in recipes] == [2, 1, 1]
    assert [r.train.stop_at for r in recipes] == [4, 8, 11]
    assert [r.data.seed for r in recipes] == [0, 0, 0]  # one order of documents, in which each reads on
    holds = [r.train.hold_moments for r in stage_recipes(load_recipe("v4-flash-pretrain-v5p"))]
    assert holds == [None] * 4 + [True] + [None] * 2


def test_a_damaged_border_falls_back_into_the_stage_before(tmp_path):
    recipe = in_stages(tmp_path, "run", train__stop_at=8)
    result = train(recipe)
    assert steps_on_disk(result)[-2:] == [6, 8]
    shutil.rmtree(Path(result.checkpoint_dir) / "8" / "train")
    again = train(recipe)
    assert again.step == 8 and steps_on_disk(again)[-2:] == [6, 8]


def test_data_that_has_changed_when_a_border_is_crossed_is_refused(tmp_path):
    train(in_stages(tmp_path, "run", train__stop_at=4))
    (tmp_path / "text" / "new.txt").write_text("more")
    with pytest.raises(CheckpointError, match=r"data_fingerprint.files_hash: .* in the checkpoint, .* now"):
        train(in_stages(tmp_path, "run"))


def test_a_spike_before_the_first_save_of_a_stage_goes_back_to_its_border(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.poisoned(toy_model.TOY))
    runs.poison(monkeypatch.setattr, 6)
    stages = ({"until": 4}, {"until": 12, "data": {"sequence_length": 64}, "mesh": {"fsdp": 8}})
    recipe = in_stages(tmp_path, "run", stages, train__spike={"factor": 20.0, "window": 4}, checkpoint__every=20)
    result = train(recipe)
    assert result.step == 12 and steps_on_disk(result) == [4, 12]
    border, end = (json.loads(runs.saved_data_state(result, step))[0] for step in (4, 12))
    # Back from step 10 with six batches read; eight steps more.
    assert end["start"] == border["documents"] and end["step"] == 14
    assert any("back to step 4" in line for line in runs.read_log(recipe.run_dir))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_on_where_training_goes_on(tmp_path, monkeypatch, name):
    """On another mesh; those of the toy's temperature, which does not train before the second stage, begin at zero."""
    begun = []

    def begin(program, state):
        old = jax.device_get(named_leaves(state.opt_state))  # before its arrays are given up
        state = own_optimizer(program, state)
        begun.append((old, jax.device_get(named_leaves(state.opt_state))))
        return state

    own_optimizer = curriculum._with_own_optimizer
    monkeypatch.setattr(curriculum, "_with_own_optimizer", begin)
    stages = (
        {"until": 3, "train": {"stage": "dense"}},
        {"until": 4, "train": {"stage": "sparse"}, "mesh": {"fsdp": 4, "context": 2}},
    )
    assert train(in_stages(tmp_path, "run", stages, optimizer__name=name)).step == 4
    ((old, new),) = begun
    zeros = {path for path in new if path.endswith("temperature")}
    assert zeros == new.keys() - old.keys() and len(zeros) == 2
    for path, leaf in new.items():
        assert np.array_equal(leaf, np.zeros(1) if path in zeros else old[path]) and (path in zeros or leaf.any()), path


def test_what_muon_trains_in_turns(tmp_path):
    """Dense, indexer warm-up, sparse, of V4: the warm-up holds the moments of all that it does not train."""
    warm_up = {"until": 4, "train": {"stage": "indexer-warmup"}, "mesh": {"fsdp": 2, "context": 4}}
    stages = (
        {"until": 2, "train": {"stage": "dense"}},
        {**warm_up, "optimizer": {"learning_rate": 1e-1}},
        {"until": 6, "train": {"stage": "sparse"}},
    )
    recipe = in_stages(
        tmp_path, "run", stages, model__name="deepseek-v4-tiny", model__config=CSA, data__sequence_length=64,
        optimizer__name="muon", optimizer__warmup_steps=0, optimizer__decay_steps=6, optimizer__decay="linear",
    )  # fmt: skip
    result = train(recipe)
    assert result.step == 6
    saved = {step: saved_arrays(result, step) for step in (2, 4, 6)}
    weights = [name for name in saved[2] if name.startswith("model/params/")]
    moments = {name for name in saved[6] if "/indexer/" in name and "opt_state" in name}
    assert {"trace", "mu", "nu"} == {"trace", "mu", "nu"} & {part for name in moments for part in name.split("/")}
    assert {name.replace("opt_state/", "opt_state/own/") for name in moments} < saved[4].keys()
    assert not moments & saved[2].keys()
    kept = [name for name in saved[2] if name.startswith("train/opt_state") and name.endswith("/weight")]
    held = {name.replace("opt_state/", "opt_state/held/"): saved[2][name] for name in kept}
    assert len(held) > 20 and held.items() <= saved[4].items()
    # Adam's counts are those of its moments' updates, the schedule's those of the run.
    adam = "1/inner_states/adamw/inner_state"
    count = lambda step, name: saved[step][f"train/opt_state/{name}/count"]  # noqa: E731
    assert count(2, adam) == count(2, "3") == count(4, f"own/{adam}") == count(4, f"held/{adam}")
    assert count(4, "own/3") == count(6, adam) != count(6, "3")
    for first, second, trains in ((2, 4, lambda n: "indexer" in n), (4, 6, lambda n: True)):
        for name in weights:
            assert (saved[first][name] != saved[second][name]) == trains(name), (second, name)
    # The schedule goes on, in the second stage from another peak.
    rates = [m["learning_rate"] for m in read_metrics(recipe.run_dir) if "learning_rate" in m]
    falls = np.array([1, 0.85, 0.7, 0.55, 0.4, 0.25])
    np.testing.assert_allclose(rates, falls * [1e-2, 1e-2, 1e-1, 1e-1, 1e-2, 1e-2], rtol=1e-5)
    assert np.isfinite(result.metrics["loss"])


@pytest.mark.parametrize(
    ("change", "key", "fix"),
    [
        ({"until": 3}, "stages.2: until", "in order"),
        ({"data": {"sequence_lenght": 64}}, "stages.2: data.sequence_lenght", "sequence_length"),
        ({"model": {"name": "deepseek-v3.2"}}, "stages.2: model.name", "whole run"),
        ({"train": {"stage": "sprase"}}, "stages.2: train.stage", "sparse"),
        ({"mesh": {"context": 3}}, "stages.2: mesh", "devices"),
        ({"data": {"sequence_length": 63}, "mesh": {"context": 8}}, "stages.2: data.sequence_length", "64"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(tmp_path, change, key, fix):
    stages = (STAGES[0], {**STAGES[1], **change}, STAGES[2])
    recipe = in_stages(tmp_path, "run", stages)
    with pytest.raises(RecipeError) as error:
        recipe.check(8)
    told = {problem.key: str(problem) for problem in error.value.problems}
    assert fix in told[key], told
    assert not (tmp_path / "run").exists()


def test_a_stage_with_a_preset_alone_keeps_the_axes(tmp_path):
    _, second = stage_recipes(in_stages(tmp_path, "run", ({"until": 2}, {"until": 4, "mesh": {"preset": "long"}})))
    assert (second.mesh.preset, second.mesh.shape) == ("long", make_recipe(tmp_path, "run").mesh.shape)


def test_the_last_stage_ends_with_the_run(tmp_path):
    recipe = in_stages(tmp_path, "run", train__steps=20)
    with pytest.raises(RecipeError, match="train.steps=11"):
        stage_recipes(recipe)


def test_a_checkpoint_of_another_first_stage_is_refused(tmp_path):
    train(in_stages(tmp_path, "run", train__stop_at=4))
    other = ({**STAGES[0], "data": {"packing": "first_fit"}}, *STAGES[1:])
    with pytest.raises(CheckpointError, match="data.packing"):
        train(in_stages(tmp_path, "run", other))
