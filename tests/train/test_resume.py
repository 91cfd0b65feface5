"""A run that was interrupted equals one that was not: bit for bit, on eight devices."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fathom import zoo
from fathom.train import loop
from fathom.train.loop import train
from tests.train import runs, toy_model
from tests.train.runs import at_steps, history, interrupted, make_recipe, saved_arrays, saved_data_state

CURVES = ("loss", "grad_norm", "learning_rate", "batch_hash")
SAME_EVERY_TIME = ("model/", "train/")


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    runs.write_text(tmp_path / "text")


def assert_equal_runs(one, other, recipe, other_recipe, step):
    assert one.step == other.step == step
    assert history(recipe, *CURVES) == history(other_recipe, *CURVES)
    arrays = saved_arrays(one, step)
    assert arrays == saved_arrays(other, step)  # checksums of all bits
    assert {name.split("/")[0] + "/" for name in arrays} == set(SAME_EVERY_TIME)
    assert saved_data_state(one, step) == saved_data_state(other, step)


MUON = {"optimizer__name": "muon", "optimizer__momentum_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("packing", "changes"), [("concat_split", {}), ("first_fit", MUON)], ids=["concat_split-adamw", "first_fit-muon"]
)
def test_toy_resumes_bit_exact(tmp_path, monkeypatch, packing, changes):
    common = dict(
        **changes,
        model__config={"dropout": 0.2},
        data__packing=packing,
        train__steps=20,
        train__accumulation=2,
        checkpoint__every=4,
    )
    straight = make_recipe(tmp_path, "straight", **common)
    broken = make_recipe(tmp_path, "broken", **common)
    result = train(straight)
    # Preempted at 10 and at 11; killed at 15, three steps after a save, which are then done again.
    actions = {10: runs.sigterm, 11: runs.sigterm, 15: runs.crash}
    again = interrupted(broken, monkeypatch, actions)
    assert_equal_runs(result, again, straight, broken, 20)


def test_deepseek_v4_tiny_resumes_bit_exact(tmp_path, monkeypatch):
    common = dict(
        model__name="deepseek-v4-tiny",
        # Every kind of layer and router once, and MTP: half of the tiny model is half of the compiling.
        model__config={
            "attention_kinds": ["sliding", "csa", "hca"],
            "compress_ratios": [0, 4, 16],
            "router_kinds": ["hash", "learned", "learned"],
        },
        mesh__expert=2,
        mesh__tensor=1,
        data__sequence_length=64,
        train__steps=20,
        checkpoint__every=20,
    )
    straight = make_recipe(tmp_path, "straight", **common)
    broken = make_recipe(tmp_path, "broken", **common)
    # Three runs of one program, which is traced and compiled once: it holds no state.
    original, made = loop.make_program, []

    def make_program(*given):
        made.extend([] if made else [original(*given)])
        return made[0]

    monkeypatch.setattr(loop, "make_program", make_program)
    result = train(straight)
    again = interrupted(broken, monkeypatch, {10: runs.sigterm})
    assert_equal_runs(result, again, straight, broken, 20)


@pytest.mark.parametrize("changes", [{}, MUON], ids=["adamw", "muon"])
def test_resume_on_another_mesh_goes_on_with_the_same_data(tmp_path, monkeypatch, changes):
    straight = make_recipe(tmp_path, "straight", mesh__tensor=2, **changes)
    broken = make_recipe(tmp_path, "broken", mesh__tensor=2, **changes)
    train(straight)
    with monkeypatch.context() as patch:
        at_steps(patch, {6: runs.sigterm})
        train(broken)
    moved = make_recipe(tmp_path, "broken", mesh__fsdp=4, mesh__tensor=1, **changes)
    assert train(moved).step == 12
    one, other = history(straight, *CURVES), history(moved, *CURVES)
    assert one["batch_hash"] == other["batch_hash"]
    assert one["learning_rate"] == other["learning_rate"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_somebody_elses_loop_trains_deepseek_v4():
    """scripts/examples/own_loop.py: under 60 lines, nothing of fathom.train."""
    file = Path(__file__).parents[2] / "scripts" / "examples" / "own_loop.py"
    source = file.read_text()
    assert len(source.splitlines()) < 60
    assert "from fathom.train" not in source and "import fathom.train" not in source
    spec = importlib.util.spec_from_file_location("own_loop", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = module.main(steps=5, rows=8, length=32)
    assert losses[-1] < losses[0] - 0.5
