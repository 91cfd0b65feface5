"""Recipes: what is read, and that all that is wrong is told at once, with key path and fix."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml

from fathom import zoo
from fathom.cli import main
from fathom.mesh import AXES
from fathom.recipe import (
    Recipe,
    compare_for_resume,
    load_recipe,
)
from fathom.recipe_blocks import MESH_AXES
from fathom.recipe_files import recipe_names
from fathom.step_folder import CheckpointError, read_payload
from fathom.train.loop import train
from tests.train.runs import make_recipe, write_text
from tests.train.small_recipe import SMALL, SPEC, changed, problems_of, recipe_with, write_recipe
from tests.train.toy_model import TOY


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)


# --- Reading -------------------------------------------------------------------------------------


def test_values_over_defaults(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, SMALL))
    assert recipe.name == "small"  # the file's
    assert recipe.optimizer.b2 == 0.95 and recipe.optimizer.eps == 1e-20
    assert recipe.mesh.shape == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1, "context": 1}
    assert recipe.run_dir == Path("runs/small")
    assert recipe.checkpoint_dir == "runs/small/checkpoints"
    assert recipe.data.pattern == "**/*.txt"
    assert MESH_AXES == AXES


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "r.yaml"
    text = write_recipe(tmp_path, SMALL).read_text().replace("0.001", "3e-4")
    assert "3e-4" in text
    path.write_text(text)
    assert load_recipe(path).optimizer.learning_rate == 3e-4
    recipe = load_recipe(path, ["model.config.dropout=1e-1", "train.steps=20"])
    assert recipe.model.config["dropout"] == 0.1 and recipe.train.steps == 20
    recipe = load_recipe(path, ["train.steps=1_000", "train.max_runtime=60", "data.exclude=[a, b]"])
    assert (recipe.train.steps, recipe.train.max_runtime) == (1000, 60.0)
    assert recipe.data.exclude == ("a", "b")


def test_numbers_that_reach_us_as_text():
    """PyYAML's own loader reads 3e-4 as text; templates put numbers in quotes."""
    read = yaml.safe_load("{learning_rate: 3e-4, warmup_steps: '1_0', clip_norm: 5e-1}")
    assert read["learning_rate"] == "3e-4"
    block = recipe_with(optimizer=read).optimizer
    assert (block.learning_rate, block.warmup_steps, block.clip_norm) == (3e-4, 10, 0.5)


def test_precedence_base_recipe_overrides(tmp_path):
    write_recipe(tmp_path, SMALL, "base")
    own = {"extends": "base.yaml", "train": {"steps": 20}, "optimizer": {"learning_rate": 0.5}}
    path = write_recipe(tmp_path, own, "derived")
    recipe = load_recipe(path, ["optimizer.learning_rate=0.25", "metrics.directory=/x"])
    assert (recipe.name, recipe.train.steps, recipe.data.batch_size) == ("derived", 20, 8)
    assert recipe.optimizer.learning_rate == 0.25 and recipe.checkpoint_dir == "/x/checkpoints"


def test_extends_goes_as_deep_as_wanted(tmp_path):
    write_recipe(tmp_path, {**SMALL, "name": "lowest"}, "base")
    (tmp_path / "folder").mkdir()
    write_recipe(tmp_path / "folder", {"extends": "../base.yaml", "train": {"steps": 20, "seed": 3}}, "middle")
    path = write_recipe(tmp_path, {"extends": "folder/middle.yaml", "train": {"steps": 30}}, "top")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.train.steps, recipe.train.seed, recipe.data.batch_size) == ("top", 30, 3, 8)
    own = load_recipe(write_recipe(tmp_path, {"extends": "v4-flash-64k-v5p", "model": {"init": "gs://b/c"}}, "own"))
    assert (own.name, own.data.sequence_length, own.optimizer.name) == ("own", 65536, "muon")


def test_extends_in_a_circle_and_to_nowhere(tmp_path):
    write_recipe(tmp_path, {"extends": "second.yaml"}, "first")
    path = write_recipe(tmp_path, {"extends": "./first.yaml"}, "second")
    assert problems_of(load_recipe, path)["extends"].found == "a circle, second -> first -> second"
    path = write_recipe(tmp_path, {"extends": "itself.yaml"}, "itself")
    assert problems_of(load_recipe, path)["extends"].found == "a circle, itself -> itself"
    path = write_recipe(tmp_path, {"extends": "nowhere"}, "lost")
    assert "nowhere" in problems_of(load_recipe, path)["extends"].found


IN_STAGES = {
    **SMALL,
    "stages": [{"name": "short", "until": 4}, {"until": 6}, {"name": "v1.5", "until": 10, "mesh": {"data": 8}}],
}


@pytest.mark.parametrize(
    ("overrides", "number", "block", "values"),
    [
        (["stages.1.data.batch_size=16"], 1, "data", {"batch_size": 16}),
        (["stages.short.data.batch_size=16", "stages.1.data.seed=2"], 1, "data", {"batch_size": 16, "seed": 2}),
        (["stages.2.train={stage: dense}"], 2, "train", {"stage": "dense"}),
        (["stages.v1.5.mesh.data=4", "stages.3.mesh.fsdp=2"], 3, "mesh", {"data": 4, "fsdp": 2}),
    ],
)
def test_overrides_of_a_stage_by_number_and_by_name(tmp_path, overrides, number, block, values):
    path = write_recipe(tmp_path, IN_STAGES)
    changed_, kept = load_recipe(path, overrides).stages, load_recipe(path).stages
    assert getattr(changed_[number - 1], block) == values
    assert [s for i, s in enumerate(changed_, 1) if i != number] == [s for i, s in enumerate(kept, 1) if i != number]


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("stages.0.until=3", "stages.0.until", "found '0'; expected a number from 1 to 3, or a name: short, v1.5"),
        ("stages.4.until=3", "stages.4.until", "found '4'; expected a number from 1 to 3"),
        ("stages.shor.until=3", "stages.shor.until", "did you mean 'short'?"),
        ("stages.1.untill=3", "stages.1 (short): untill", "did you mean stages.1.until?"),
        ("stages.2.until=x", "stages.2: until", "fix: set stages.2.until to a valid integer"),
        ("stages.1=5", "stages.1", "expected a mapping of keys to values"),
        ("stages.1.data.batch_sise=8", "stages.1 (short): data.batch_sise", "did you mean 'batch_size'?"),
        ("stages.1.name=v1.5", "stages.v1.5.until", "found 'v1.5', a name that several have"),
        ("train.batch_ramp.1.until=3", "train.batch_ramp.1.until", "found no train.batch_ramp; expected a recipe that"),
    ],
)
def test_overrides_of_stages_that_are_not_there(tmp_path, override, key, said):
    overrides = [override, "stages.v1.5.until=10"] if override.endswith("name=v1.5") else [override]
    (problem,) = problems_of(load_recipe, write_recipe(tmp_path, IN_STAGES), overrides).values()
    assert problem.key == key and said in str(problem)


def test_an_override_of_a_ramps_part(tmp_path):
    ramp = [{"until": 2, "batch_size": 8}, {"until": 4, "batch_size": 16}]
    path = write_recipe(tmp_path, changed(SMALL, {"train.batch_ramp": ramp, "data.batch_size": 32}))
    assert [part.until for part in load_recipe(path, ["train.batch_ramp.2.until=5"]).train.batch_ramp] == [2, 5]
    found = problems_of(load_recipe(path, ["train.batch_ramp.2.batch_size=12"]).check, 8)
    (key,) = found
    assert key == "stages.2 (batches of 12): data.batch_size"
    assert found[key].fix.startswith("set train.batch_ramp.2.batch_size=16,")


def test_a_name_finds_the_recipe_and_a_wrong_one_lists_them():
    assert load_recipe("tiny-v4-cpu").name == "tiny-v4-cpu"
    problem = problems_of(load_recipe, "tiny-v4-cpv")["recipe"]
    assert "tiny-v4-cpu" in problem.expected and "tiny-v4-cpu" in problem.fix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("train: {steps: 1, steps: 2}", "'steps' is there twice"),
        ("- a\n- b", "a list at the top"),
        ("", "a NoneType at the top"),
        (b"\xff\xfe\xfa", "codec"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in problems_of(load_recipe, path)["recipe"].found


def test_the_standard_library_as_data():
    recipe = load_recipe("tiny-v4-cpu")
    data, folder = recipe.data, Path(sysconfig.get_paths()["stdlib"])
    assert Path(data.path) == folder and (folder / "argparse.py").is_file()
    # What is stored means the same on every machine and Python.
    assert recipe.to_dict()["data"]["path"] == "stdlib:" and str(folder) not in recipe.to_yaml()
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert data.pattern == "**/*.py" and "site-packages" in data.exclude
    assert load_recipe("tiny-v4-cpu", ["data.path=stdlib:"]).data == data
    other = load_recipe("tiny-v4-cpu", ["data.path=/x", "data.exclude=[]"]).data
    assert other.path == "/x" and other.exclude == ()


def test_a_dump_reads_back_equal(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, SMALL), ["checkpoint.keep_every=7"])
    path = tmp_path / "dump.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(path)
    assert again == recipe and again.digest() == recipe.digest()
    assert Recipe.model_validate(json.loads(json.dumps(recipe.to_dict()))) == recipe
    other = load_recipe(path, ["train.steps=11"])
    assert other.digest() != recipe.digest() and len(recipe.digest()) == 16


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        recipe_with().train.steps = 5


def test_the_recipes_in_the_folder_are_sound():
    assert "tiny-v4-cpu" in recipe_names()
    recipe = load_recipe("tiny-v4-cpu")
    assert recipe.mesh.shape | {"data": 2, "fsdp": 2, "expert": 2} == recipe.mesh.shape
    recipe.check(recipe.mesh.simulated_devices)


# --- Schema problems -----------------------------------------------------------------------------


def test_every_problem_at_once_with_its_fix(tmp_path):
    path = write_recipe(tmp_path, SMALL)
    found = problems_of(
        load_recipe,
        path,
        [
            "train.stepz=4",
            "batch_size=2",
            "qwertyuiop=1",
            "optimizer=fast",
            "train.skip_nonfinite=some",
            "train.log_every=0",
            "data.packing=bestfit",
            "model.attention=flash",
            "model.config.vocab_sice=3",
            "data.path=/no/such/folder",
            "mesh.simulated_devices=3",
            "no equals sign",
            "data.seed=[1",
        ],
    )
    assert found["train.stepz"].fix == "did you mean train.steps?"
    assert found["batch_size"].fix == "did you mean data.batch_size?"
    assert found["qwertyuiop"].fix == "remove it"
    assert found["optimizer"].expected == "a mapping of keys to values"
    assert found["train.skip_nonfinite"].fix == "set train.skip_nonfinite to a valid integer"
    assert "greater than or equal to 1" in found["train.log_every"].expected
    assert found["data.packing"].fix == "did you mean 'best_fit'?"
    assert "'reference'" in found["model.attention"].expected
    assert found["model.config.vocab_sice"].fix == "did you mean 'vocab_size'?"
    assert found["data.path"].found == "'/no/such/folder'"
    assert "8, the product" in found["mesh.simulated_devices"].expected
    assert found["override 'no equals sign'"].expected == "key=value"
    assert "YAML" in found["data.seed"].expected
    assert len(found) == 13


def test_what_is_missing_is_told(tmp_path):
    found = problems_of(load_recipe, write_recipe(tmp_path, {"model": {}}))
    assert {"model.name", "data", "optimizer", "train"} <= set(found)
    assert found["data"].fix == "add data to the recipe"


@pytest.mark.parametrize(
    ("override", "found", "fix"),
    [
        ("train.steps=true", "True", "set train.steps to a valid integer"),
        ("optimizer.learning_rate=true", "True", "set optimizer.learning_rate to a valid number"),
        ("optimizer.clip_norm=false", "False", "set optimizer.clip_norm to a valid number"),
        ("train.log_every=yes", "True (YAML reads yes", "set train.log_every to a valid integer"),
        ("checkpoint.keep_every=on", "True", "set checkpoint.keep_every to a valid integer"),
        ("data.shuffle=1", "1", "set data.shuffle=true"),
        ("checkpoint.async_save=0", "0", "set checkpoint.async_save=false"),
        ("metrics.tensorboard='no'", "'no'", "set metrics.tensorboard to a valid boolean"),
        ("mesh.data=2.0", "2.0", "set mesh.data=2, without a point"),
        ("train.steps=1e2", "100.0", "set train.steps=100, without a point"),
        ("train.steps='2.0'", "'2.0'", "set train.steps to a valid integer"),
        ("data.exclude=a", "'a'", "set data.exclude to a valid tuple"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, capsys, override, found, fix):
    path, key = write_recipe(tmp_path, SMALL), override.partition("=")[0]
    (problem,) = problems_of(load_recipe, path, [override]).values()
    assert problem.key == key and problem.found.startswith(found) and problem.fix.startswith(fix)
    assert main(["train", str(path), override]) == 2
    assert fix in capsys.readouterr().err


def test_a_wrong_axis_says_nothing_of_the_others():
    # With the default in its place the product would not be the number of simulated devices.
    assert set(problems_of(load_recipe, "tiny-v4-cpu", ["mesh.data=2.0"])) == {"mesh.data"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", 0),
        ("data.holdout", 1.0),
        ("checkpoint.keep", 0),
        ("train.steps", 2.5),
        ("mesh.tensor", -1),
        ("name", "../escape"),
    ],
)
def test_numbers_out_of_range(tmp_path, key, value):
    path = write_recipe(tmp_path, changed(SMALL, {key: value}))
    assert set(problems_of(load_recipe, path)) == {key}


# --- Resuming ------------------------------------------------------------------------------------


def test_resuming_with_the_same_recipe():
    recipe = recipe_with(model__config={"vocab_size": 264, "taps": [1, 2]})
    assert compare_for_resume(json.loads(json.dumps(recipe.to_dict())), recipe) == []


def test_safe_changes():
    new = recipe_with(
        name="other",
        optimizer__learning_rate=0.5,
        optimizer__warmup_steps=3,
        train__steps=99,
        train__log_every=1,
        train__accumulation=2,
        data__holdout=0.0,
        mesh__data=1,
        mesh__fsdp=8,
        checkpoint__every=5,
        metrics__directory="/elsewhere",
        model__remat="full",
        data__path="/elsewhere",
        train__mtp_weight_final=0.1,
        train__batch_ramp=[{"until": 2, "batch_size": 4}],
        train__spike={"factor": 9.0, "window": 30, "max_rollbacks": 1},
        train__anticipatory_routing={"delay": 3, "always": True, "after_spike": 5},
        train__watchdog=9.0,
        train__grace=9,
        train__compilation_cache="/elsewhere",
    )
    assert compare_for_resume(recipe_with().to_dict(), new) == []


def test_data_may_lie_elsewhere_and_must_be_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", TOY)
    write_text(tmp_path / "text", files=2)
    short = {"train__steps": 2, "checkpoint__every": 2}
    result = train(make_recipe(tmp_path, **short))
    shutil.move(tmp_path / "text", tmp_path / "moved")
    short |= {"train__steps": 3, "data__path": str(tmp_path / "moved")}
    assert train(make_recipe(tmp_path, **short)).step == 3
    assert read_payload(Path(result.checkpoint_dir) / "3")["recipe"]["data"]["path"] == str(tmp_path / "moved")
    (tmp_path / "moved" / "0.txt").write_text("something else")
    with pytest.raises(CheckpointError, match="data_fingerprint.files"):
        train(make_recipe(tmp_path, **short | {"train__steps": 4}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.tokenizer", "t.json"),
        ("data.sequence_length", 64),
        ("data.batch_size", 16),
        ("data.packing", "best_fit"),
        ("data.seed", 1),
        ("data.exclude", ["test"]),
        ("model.name", "deepseek-v4-tiny"),
        ("model.config.vocab_size", 300),
        ("model.config.taps", [1]),
        ("model.param_dtype", "bfloat16"),
        ("train.stage", "dense"),
        ("train.seed", 1),
    ],
)
def test_unsafe_changes_are_named(key, value):
    new = recipe_with(**{key.replace(".", "__"): value})
    (text,) = compare_for_resume(recipe_with().to_dict(), new)
    assert text.startswith(f"{key}: ") and "in the checkpoint" in text and "in the recipe" in text


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default():
    old = recipe_with().to_dict()
    del old["data"]["exclude"], old["train"]["stage"]
    assert compare_for_resume(old, recipe_with()) == []
    assert len(compare_for_resume(old, recipe_with(train__stage="dense"))) == 1
    assert compare_for_resume(old, recipe_with(train__indexer_weight=0.5)) == []
    assert "train.indexer_weight: 0.01 in" in compare_for_resume(old, recipe_with(train__indexer_weight=0.0))[0]
    del old["train"]["indexer_weight"]  # from before the indexer had a loss: it did not train
    assert "train.indexer_weight: 0.0 in" in compare_for_resume(old, recipe_with())[0]
    assert compare_for_resume(old, recipe_with(train__indexer_weight=0.0)) == []
    old["train"]["indexer_weight"] = 0.01
    old["data"]["colour"] = "blue"  # one that this version does not have
    assert compare_for_resume(old, recipe_with())[0].startswith("data.colour: 'blue'")


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("model.recall_target=1.2", "model.recall_target", "less than or equal to 1"),
        ("model.recall_target=0", "model.recall_target", "greater than 0"),
        ("model.selection=fast", "model.selection", "'exact' or 'approx'"),
        ("train.stage=warmup", "train.stage", "'indexer-warmup'"),
        ("train.indexer_weight=-1", "train.indexer_weight", "greater than or equal to 0"),
    ],
)
def test_selections_and_stages_that_are_none(override, key, words):
    problem = problems_of(load_recipe, "tiny-v4-cpu", [override])[key]
    assert words in f"{problem.found} {problem.expected}", problem


def test_selecting_nothing_and_training_nothing():
    recipe = load_recipe("tiny-v4-cpu", ["model.config.index_top_k=0"])
    assert "index_top_k: found 0" in str(list(problems_of(recipe.check, 8).values()))
    only_sliding = [
        'model.config.attention_kinds=["sliding"]',
        "model.config.compress_ratios=[0]",
        'model.config.router_kinds=["hash"]',
    ]
    recipe = load_recipe("tiny-v4-cpu", [*only_sliding, "train.stage=indexer-warmup"])
    assert "no parameter to train" in problems_of(recipe.check, 8)["train.stage"].found
    recipe = load_recipe("tiny-v4-cpu", ["train.stage=indexer-warmup", "train.indexer_weight=0"])
    assert "train.indexer_weight" in problems_of(recipe.check, 8)
    load_recipe("tiny-v4-cpu", ["train.stage=indexer-warmup"]).check(8)
