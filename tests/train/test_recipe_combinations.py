"""Recipes whose values are each right and do not go together: all of it told at once, with key path and fix."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import jax
import pytest

from fathom import distributed, recipe_combinations, zoo
from fathom.cli import main
from fathom.recipe import (
    load_recipe,
)
from fathom.recipe_blocks import MESH_AXES
from tests.train.small_recipe import SMALL, SPEC, changed, problems_of, recipe_with, write_recipe


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)


def test_a_sound_recipe_passes():
    recipe_with().check(8)
    assert recipe_with().model_spec().config.vocab_size == 264


@pytest.mark.parametrize(
    ("changes", "key", "expected", "fix"),
    [
        ({"mesh__data": 3}, "mesh", "product is 8", "begin with mesh.data=1 mesh.fsdp=8"),
        ({"data__batch_size": 12}, "data.batch_size", "multiple of 8", "data.batch_size=16"),
        (
            {"data__batch_size": 8, "train__accumulation": 2},
            "data.batch_size",
            "multiple of 16: 8 pieces",
            "data.batch_size=16",
        ),
        (
            {"data__batch_size": 8, "train__accumulation": 3},
            "data.batch_size",
            "multiple of 3",
            "data.batch_size=9",
        ),
        (
            {"data__sequence_length": 33, "mesh__context": 2, "mesh__fsdp": 1},
            "data.sequence_length",
            "multiple of 2",
            "data.sequence_length=34",
        ),
        (
            {"optimizer__warmup_steps": 6, "optimizer__decay_steps": 5},
            "optimizer.warmup_steps + optimizer.decay_steps",
            "at most train.steps, 10",
            "shorten",
        ),
        ({"train__eval_every": 5}, "train.eval_every", "held out", "data.holdout"),
        (
            {"model__param_dtype": "bfloat16"},
            "model.param_dtype",
            "the only copy, and in bfloat16 an update below about a thousandth of a weight is rounded away",
            "set model.param_dtype=float32",
        ),
        ({"model__name": "toy-for-recipe"}, "model.name", SPEC.name, SPEC.name),
        ({"mesh__preset": "defualt"}, "mesh.preset", "default", "did you mean 'default'?"),
        ({"data__path": "/no/such"}, "data.path", "exists", "data.path"),
        ({"data__tokenizer": "byte"}, "data.tokenizer", "tokenizer.json", "'bytes'"),
        (
            {"model__config": {"vocab_size": 200}},
            "data.tokenizer",
            "at most 200, the model's vocab_size",
            "model.config.vocab_size=",
        ),
        (
            {"model__config": {"vocab_size": 264, "hidden_size": "wide"}},
            "model.config.hidden_size",
            "type int",
            "model.config.hidden_size",
        ),
        (
            {"model__config": {"vocab_size": 264, "hidden_size": 15}},
            "mesh",
            "divide every weight",
            "mesh axis",
        ),
    ],
)
def test_combinations_that_cannot_work(changes, key, expected, fix):
    found = problems_of(recipe_with(**changes).check, 8)
    assert key in found, found
    assert expected in found[key].expected and fix in found[key].fix


def test_weights_in_bfloat16_are_for_loading_not_for_training():
    recipe = recipe_with(model__param_dtype="bfloat16")  # reading it back from a checkpoint is no training
    assert recipe.compute_options().param_dtype == "bfloat16"
    assert jax.numpy.bfloat16(1) - jax.numpy.bfloat16(2.7e-4) == 1  # the reason given
    recipe_with(model__dtype="bfloat16").check(8)


def install_broken(folder: Path) -> None:
    """Lays out `folder` like an installed package: a module that cannot be imported, and one without a model."""
    (folder / "broken_models.py").write_text("import no_such_module\n")
    (folder / "numbers_only.py").write_text("def make():\n    return 3\n")
    info = folder / "broken_pkg-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pkg\nVersion: 0.1\n")
    points = "[fathom.models]\nbroken = broken_models:make\nnumber = numbers_only:make\n"
    (info / "entry_points.txt").write_text(points)


def test_a_model_whose_package_is_broken(tmp_path, monkeypatch, capsys):
    install_broken(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert {"broken", "number"} <= set(zoo.names()) and "broken_models" not in sys.modules
    with pytest.raises(zoo.BrokenEntryPointError, match=r"entry point 'broken_models:make' of package broken-pkg") as e:
        zoo.get("broken")
    assert "failed with ModuleNotFoundError: No module named 'no_such_module'" in str(e.value)
    with pytest.raises(ValueError, match=r"'numbers_only:make' of package broken-pkg gave a int, expected a ModelSpec"):
        zoo.get("number")
    specs, broken = zoo.all_specs()
    assert "deepseek-v4-tiny" in specs and len(broken) == 2 and list(specs) == sorted(specs)
    found = problems_of(recipe_with(model__name="broken").check, 8)["model.name"]
    assert "no_such_module" in found.found and found.fix.startswith("repair or uninstall broken-pkg")
    path = write_recipe(tmp_path, changed(SMALL, {"model.name": "broken"}))
    assert main(["train", str(path)]) == 2
    text = capsys.readouterr().err
    assert "model.name: found 'broken'" in text and "uninstall broken-pkg" in text and "Traceback" not in text


def test_a_tokenizer_file_against_the_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    vocabulary = {f"t{i}": i for i in range(269)} | {"<|endoftext|>": 269}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(path))
    found = problems_of(recipe_with(data__tokenizer=str(path)).check, 8)["data.tokenizer"]
    assert "270 tokens" in found.found and found.fix.startswith("set model.config.vocab_size=270")
    config = {"vocab_size": 272}
    recipe_with(data__tokenizer=str(path), model__config=config).check(8)
    path.write_text("{}")
    found = problems_of(recipe_with(data__tokenizer=str(path)).check, 8)["data.tokenizer"]
    assert found.expected == "a readable tokenizer"


@pytest.mark.parametrize(
    ("own", "devices", "slices", "expected"),
    [
        ({"fsdp": 64, "expert": 8}, 256, 1, "mesh.fsdp=32"),
        ({"fsdp": 16, "expert": 8, "context": 4}, 256, 1, "mesh.fsdp=8"),
        ({"data": 4, "fsdp": 8, "expert": 16}, 1024, 1, "mesh.fsdp=16"),
        ({"data": 4, "fsdp": 8, "expert": 16}, 32, 1, "mesh.data=1 mesh.fsdp=2"),
        ({"fsdp": 16, "expert": 16}, 512, 2, "mesh.data=2"),
        ({"expert": 16}, 24, 1, "mesh.fsdp=3 mesh.expert=8"),
    ],
)
def test_a_mesh_scaled_to_other_devices(own, devices, slices, expected):
    shape = {axis: own.get(axis, 1) for axis in MESH_AXES}
    text = recipe_combinations._axes_for(shape, devices, slices)
    assert text == f"begin with {expected}"
    scaled = shape | {k.removeprefix("mesh."): int(v) for k, v in (c.split("=") for c in expected.split())}
    assert math.prod(scaled.values()) == devices


def test_one_problem_for_stages_that_have_it_for_one_cause():
    mesh, own = {"data": 2, "fsdp": 4, "topology": "v5p:2x2x2"}, {"mesh": {"data": 1, "fsdp": 2, "context": 4}}
    stages = [{"name": "a", "until": 2}, {"until": 4, **own}, {"until": 6}, {"name": "d", "until": 10, **own}]
    recipe = recipe_with(mesh=mesh, stages=stages)
    recipe.check(8)
    found = problems_of(recipe.check, 4)
    assert list(found) == ["stages.1,3 (a, without a name): mesh", "stages.2,4 (without a name, d): mesh"]
    launch = "launch it on v5p:2x2x2, `fathom launch RECIPE --on jobset`, `xpk` or `tpu-vm`"
    assert [problem.fix for problem in found.values()] == [
        f"{launch}, or change the mesh axes: begin with mesh.fsdp=2",
        f"{launch}, or change the mesh axes: begin with stages.2.mesh.fsdp=1 stages.4.mesh.fsdp=1",
    ]
    assert {problem.fix for problem in problems_of(recipe.check, 1).values()} == {launch}
    other = recipe_with(mesh=mesh | {"topology": "v5p:2x2x1"}, stages=stages)  # and no second problem of each mesh
    found = problems_of(other.check, 4)
    assert [key.rpartition(": ")[2] for key in found] == ["mesh.topology"] * 2
    assert [problem.fix.partition(", or begin with ")[2] for problem in found.values()] == [
        "mesh.fsdp=2",
        "stages.2.mesh.fsdp=1 stages.4.mesh.fsdp=1",
    ]


def test_what_is_wrong_in_all_stages_is_the_recipes_problem():
    stages = [{"name": "a", "until": 2}, {"name": "b", "until": 10, "data": {"batch_size": 16}}]
    found = problems_of(recipe_with(data__path="/no", data__sequence_length=33, mesh__fsdp=1, mesh__context=2,
                                    stages=stages).check, 8)  # fmt: skip
    assert set(found) == {"data.path", "data.sequence_length"}
    found = problems_of(recipe_with(train__accumulation=3, stages=stages).check, 8)
    fixes = {key: problem.fix.partition(",")[0] for key, problem in found.items()}
    assert fixes == {
        "stages.1 (a): data.batch_size": "set data.batch_size=9",
        "stages.2 (b): data.batch_size": "set stages.2.data.batch_size=18",
    }


def test_combinations_are_told_together():
    recipe = recipe_with(mesh__data=3, data__batch_size=7, train__eval_every=1, data__path="/no")
    assert set(problems_of(recipe.check, 8)) >= {
        "mesh",
        "data.batch_size",
        "train.eval_every",
        "data.path",
    }


def test_the_sequence_against_the_compression():
    ratio = max(load_recipe("tiny-v4-cpu").model_spec().config.compress_ratios)
    load_recipe("tiny-v4-cpu", [f"data.sequence_length={ratio}"]).check(8)
    short = load_recipe("tiny-v4-cpu", [f"data.sequence_length={ratio - 1}"])
    found = problems_of(short.check, 8)["data.sequence_length"]
    assert f"at least {ratio}" in found.expected
    longest = short.model_spec().config.max_position_embeddings
    long = load_recipe("tiny-v4-cpu", [f"data.sequence_length={longest + 8}"])
    assert f"at most {longest}" in problems_of(long.check, 8)["data.sequence_length"].expected


def test_the_architecture_judges_its_overrides():
    recipe = load_recipe(
        "tiny-v4-cpu",
        ["model.config.num_expert=3", "model.config.rope_scaling={factor: many}"],
    )
    found = problems_of(recipe.check, 8)
    assert found["model.config.num_expert"].fix == "did you mean 'num_experts'?"
    assert found["model.config.rope_scaling.factor"].found == "'many'"
    # Each field is right by itself, the architecture is not.
    recipe = load_recipe("tiny-v4-cpu", ["model.config.num_experts_per_tok=10000"])
    assert "num_experts_per_tok" in problems_of(recipe.check, 8)["model.config"].found


def test_lists_and_mappings_become_the_dataclass_types():
    config = recipe_with(model__config={"vocab_size": 264, "taps": [1, 3], "dropout": 0})
    assert config.model_spec().config.taps == (1, 3)
    assert config.model_spec().config.dropout == 0.0
    recipe = load_recipe("tiny-v4-cpu", ["model.config.rope_scaling.factor=2"])
    scaling = recipe.model_spec().config.rope_scaling
    assert scaling.factor == 2.0 and scaling.beta_fast == 32.0


def test_simulated_devices():
    recipe = recipe_with(mesh__simulated_devices=8)
    recipe.use_simulated_devices()
    assert jax.device_count() == 8
    four = recipe_with(mesh__data=2, mesh__simulated_devices=4)
    found = problems_of(four.use_simulated_devices)["mesh.simulated_devices"].found
    assert found.startswith("4 simulated CPU devices asked for, and jax already runs with 8 cpu devices")


def test_streams_of_data_divide_a_batch():
    problem = problems_of(recipe_with(data__shards=6, data__batch_size=8).check, 8)["data.shards"]
    assert problem.found == "6, with data.batch_size 8" and problem.fix.startswith("set data.shards=2, or change")


def test_processes_share_simulated_devices(monkeypatch):
    """Each has its part: here, where jax has 8, this process is one of two of a mesh of 16."""
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    recipe_with(mesh__data=8, mesh__simulated_devices=16).use_simulated_devices()
    monkeypatch.setattr(distributed, "process_count", lambda: 3)
    problem = problems_of(recipe_with(mesh__simulated_devices=8).use_simulated_devices)["mesh.simulated_devices"]
    assert problem.found == "8 devices for 3 processes" and "a multiple of 3" in problem.expected
