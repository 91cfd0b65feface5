"""What changes with the steps beside the learning rate: the MTP loss's weight, and the rows of a batch."""

from __future__ import annotations

import dataclasses

import pytest

from fathom import zoo
from fathom.recipe import Recipe, load_recipe
from fathom.recipe_checks import RecipeError
from fathom.recipe_stages import stage_recipes
from fathom.train import loop
from fathom.train.loop import train
from tests.train import runs, toy_model
from tests.train.runs import history, interrupted, make_recipe, saved_arrays, steps_on_disk, write_text
from tests.train.small_recipe import write_recipe


def all_mtp(spec):
    """The model with its loss in the place of the MTP loss."""

    def loss(model, batch, weights, counts):
        value, aux = spec.loss(model, batch, weights, counts)
        return weights.mtp * value, {**aux, "loss/mtp": value}

    return dataclasses.replace(spec, loss=loss)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    write_text(tmp_path / "text")


def decaying(tmp_path, run, **changes):
    common = {
        "optimizer__warmup_steps": 1, "optimizer__decay_steps": 3, "optimizer__clip_norm": None, "train__steps": 7,
        "train__mtp_weight": 0.5, "checkpoint__every": 5, "data__holdout": 0.4, "train__eval_every": 3,
    }  # fmt: skip
    return make_recipe(tmp_path, run, **{**common, **changes})


def test_the_mtp_weight_falls_where_the_decay_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", all_mtp(toy_model.TOY))
    programs, original = [], loop.make_program
    monkeypatch.setattr(loop, "make_program", lambda *a: programs.append(original(*a)) or programs[-1])
    curves = {}
    for accumulation in (1, 2):
        recipe = decaying(tmp_path, f"a{accumulation}", train__mtp_weight_final=0.25, train__accumulation=accumulation)
        if accumulation == 1:
            train(recipe)
        else:
            interrupted(recipe, monkeypatch, {6: runs.sigterm})  # inside the decay
        curves[accumulation] = history(recipe, "loss", "loss/mtp", "grad_norm", "eval/loss", "eval/loss/mtp")
    assert all(program.step._cache_size() == 1 for program in programs)
    one, two = curves.values()
    for curve in (one, two):
        ratios = [loss / mtp for loss, mtp in zip(curve["loss"], curve["loss/mtp"], strict=True)]
        assert ratios == pytest.approx([0.5] * 4 + [0.25] * 3, rel=1e-6)
        ratios = [loss / mtp for loss, mtp in zip(curve["eval/loss"], curve["eval/loss/mtp"], strict=True)]
        assert ratios == pytest.approx([0.5, 0.25], rel=1e-6)  # after steps 3 and 6
    for name in ("loss", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)

    # The gradients have the weight too: those of the first update of the decay are half of what they would be.
    constant = decaying(tmp_path, "constant")
    train(constant)
    norms = history(constant, "grad_norm")["grad_norm"]
    assert norms[:4] == one["grad_norm"][:4] and one["grad_norm"][4] == pytest.approx(norms[4] / 2, rel=1e-6)


def test_a_final_mtp_weight_needs_a_decay(tmp_path):
    recipe = decaying(tmp_path, "run", optimizer__decay_steps=0, train__mtp_weight_final=0.1)
    with pytest.raises(RecipeError, match=r"train.mtp_weight_final: found 0.1, with optimizer.decay_steps 0"):
        recipe.check(8)


RAMP = [{"until": 4, "batch_size": 8}, {"until": 8, "batch_size": 16}]
STAGES = [
    {"until": 4, "data": {"batch_size": 8}},
    {"until": 8, "data": {"batch_size": 16}},
    {"until": 12, "data": {"batch_size": 24}},
]


def ramped(tmp_path, run, **changes):
    common = {"data__batch_size": 24, "checkpoint__every": 3, "checkpoint__keep": 20, "train__batch_ramp": RAMP}
    return make_recipe(tmp_path, run, **{**common, **changes})


def test_a_ramp_is_the_stages_that_it_stands_for(tmp_path, monkeypatch):
    ramp = ramped(tmp_path, "ramp")
    written = ramped(tmp_path, "written", train__batch_ramp=[])
    written = Recipe.model_validate({**written.to_dict(), "stages": STAGES})
    for one, other in zip(stage_recipes(ramp), stage_recipes(written), strict=True):
        assert one.data == other.data and one.train.stop_at == other.train.stop_at
    # Cut inside the ramp, at a border of it, and after it.
    result = interrupted(ramp, monkeypatch, {2: runs.sigterm, 4: runs.sigterm, 6: runs.crash, 11: runs.crash})
    other = train(written)
    assert result.step == other.step == 12
    assert history(ramp, "loss", "batch_hash") == history(written, "loss", "batch_hash")
    assert saved_arrays(result, 12) == saved_arrays(other, 12)
    assert set(steps_on_disk(other)) == {3, 4, 6, 8, 9, 12}


def test_a_wrong_key_in_a_ramp_is_named(tmp_path):
    values = ramped(tmp_path, "run").to_dict()
    values["train"]["batch_ramp"] = [{"until": 4, "batch_sise": 8}]
    values["stages"] = [{"untill": 4}]
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tmp_path, values))
    told = {problem.key: problem.fix for problem in error.value.problems}
    assert told["train.batch_ramp.1.batch_sise"] == "did you mean train.batch_ramp.1.batch_size?"
    assert told["stages.1: untill"] == "did you mean stages.1.until?"


@pytest.mark.parametrize(
    ("ramp", "stages", "said"),
    [
        (RAMP, STAGES, r"train.batch_ramp: found a ramp of 2 beside 3 stages; expected one of the two; fix: leave the"),
        (RAMP[::-1], [], r"train.batch_ramp.2.until: found 4; expected a step after 8 and before 12"),
        ([{"until": 12, "batch_size": 8}], [], r"train.batch_ramp.1.until: found 12; .* before 12, train.steps"),
        ([{"until": 4, "batch_size": 6}], [], r"stages.1 \(batches of 6\): data.batch_size: found 6; expected a"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(tmp_path, ramp, stages, said):
    recipe = ramped(tmp_path, "run", train__batch_ramp=ramp)
    recipe = Recipe.model_validate({**recipe.to_dict(), "stages": stages})
    with pytest.raises(RecipeError, match=said):
        recipe.check(8)
