"""Anticipatory routing: experts of earlier parameters, for batches read ahead, always or after a rollback."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from fathom import zoo
from fathom.recipe_checks import RecipeError
from fathom.step_folder import read_payload
from fathom.train import loop
from fathom.train.anticipation import Feeder, Schedule
from fathom.train.loop import train
from tests.train import runs, toy_model
from tests.train.runs import history, interrupted, make_recipe, write_text


class Stream:
    """Batches that are numbers."""

    def __init__(self):
        self.read = 0

    def next(self, step):
        self.read += 1
        return {"number": self.read}


def feed(schedule, last, start=1, prepares=False):
    """For each step: its batch, the state its choice was made with, and what a save would say of the data."""
    stream = Stream()
    route = lambda state, inputs: (state, inputs["number"])  # noqa: E731
    feeder = Feeder(stream.next, dict, lambda: stream.read, route, schedule, last)
    for step in range(start, last + 1):
        fed = feeder.take(step, f"state of step {step}")
        if prepares:
            feeder.prepare(step + 1)
        yield fed.batch["number"], fed.inputs.get("routing"), fed.data_state(), stream.read


def test_choices_are_those_of_the_state_some_steps_before():
    fed = list(feed(Schedule(2, math.inf), last=6))
    assert [number for number, *_ in fed] == [1, 2, 3, 4, 5, 6]
    assert [choice for _, choice, *_ in fed] == [(f"state of step {max(n - 2, 1)}", n) for n in range(1, 7)]
    assert [saved for *_, saved, _ in fed] == [1, 2, 3, 4, 5, 6]
    assert [read for *_, read in fed] == [3, 4, 5, 6, 6, 6]  # never beyond the last step


def test_it_ends_where_it_is_told_to():
    fed = list(feed(Schedule(3, 14), last=17, start=11))
    assert [choice and int(choice[0].split()[-1]) for _, choice, *_ in fed] == [11, 11, 11, 11, None, None, None]
    assert [saved for *_, saved, _ in fed] == [1, 2, 3, 4, 5, 6, 7]
    assert [read for *_, read in fed] == [4, 4, 4, 4, 5, 6, 7]


@pytest.mark.parametrize("schedule", [Schedule(2, math.inf), Schedule(3, 4), Schedule(5, 0)], ids=str)
def test_a_batch_that_is_prepared_changes_nothing_but_when_it_is_read(schedule):
    prepared, plain = (list(feed(schedule, last=7, prepares=prepares)) for prepares in (True, False))
    assert [entry[:3] for entry in prepared] == [entry[:3] for entry in plain]
    read = [entry[3] for entry in plain]
    # One more than plain, where the next step reads any.
    assert [entry[3] for entry in prepared] == [min(n + 1, m) for n, m in zip(read, [*read[1:], 7], strict=True)]


def test_without_it_nothing_is_read_ahead():
    fed = list(feed(Schedule(5, 0), last=4))
    assert all(choice is None and read == number for number, choice, _, read in fed)


@pytest.fixture(autouse=True)
def text(tmp_path):
    return write_text(tmp_path / "text")


V4 = {
    "attention_kinds": ["sliding"] * 2, "compress_ratios": [0] * 2, "router_kinds": ["learned"] * 2,
    "num_mtp_layers": 0, "hidden_size": 32, "q_lora_rank": 16, "moe_intermediate_size": 16,
}  # fmt: skip
"""One block to compile, scanned twice; tests/models/test_given_routing.py has the others."""


def test_v4_that_does_not_move_trains_the_same(tmp_path):
    """At a learning rate that changes no bit: packed rows, scanned layers, accumulation, experts over devices."""
    common = dict(
        model__name="deepseek-v4-tiny", model__config=V4, mesh__tensor=1, mesh__expert=2, data__packing="first_fit",
        data__batch_size=16, train__steps=2, train__accumulation=2, train__router_bias_speed=0.0,
        optimizer__learning_rate=1e-30,
    )  # fmt: skip
    plain = make_recipe(tmp_path, "plain", **common)
    ahead = make_recipe(tmp_path, "ahead", train__anticipatory_routing={"delay": 1, "always": True}, **common)
    train(plain)
    train(ahead)
    names = ("batch_hash", "loss", "loss/balance", "expert_load/worst", "grad_norm")
    one, other = history(plain, *names), history(ahead, *names)
    assert one["batch_hash"] == other["batch_hash"] and one["step"] == other["step"] == [1, 2]
    for name in names[1:]:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


@pytest.fixture
def steps_seen(monkeypatch):
    """[(step, the step whose parameters chose, or None)] of all steps that were dispatched."""
    seen, choices = [], {}
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.told(toy_model.TOY))
    original = loop.make_program

    def make_program(recipe, mesh):
        program = original(recipe, mesh)

        def route(state, inputs):
            chosen = program.route(state, inputs)
            choices[id(chosen["block"])] = (int(state.step) + 1, chosen["block"])
            return chosen

        def step(state, inputs):
            by = choices[id(inputs["routing"]["block"])][0] if "routing" in inputs else None
            seen.append((int(state.step) + 1, by))
            return program.step(state, inputs)

        return dataclasses.replace(program, route=route, step=step)

    monkeypatch.setattr(loop, "make_program", make_program)
    return seen


def after_spikes(tmp_path, **changes):
    common = {
        "train__spike": {"factor": 20.0, "window": 4}, "train__steps": 14,
        "train__anticipatory_routing": {"delay": 2, "after_spike": 4},
    }  # fmt: skip
    return make_recipe(tmp_path, **{**common, **changes})


def test_it_is_on_for_some_steps_after_a_rollback(tmp_path, steps_seen, monkeypatch):
    runs.poison(monkeypatch.setattr, 8)
    recipe = after_spikes(tmp_path)
    result = train(recipe)
    before = [(step, None) for step in range(1, 10)]
    assert steps_seen[:9] == before  # step 9 was under way when step 8's loss was read
    assert steps_seen[9:] == [
        (6, 6), (7, 6), (8, 6), (9, 7), (10, 8), (11, 9), (12, 10), (13, None), (14, None)
    ]  # fmt: skip
    assert read_payload(f"{result.checkpoint_dir}/14")["data_states"][0]["step"] == 17


def test_a_run_that_is_cut_in_that_time_goes_on_with_it(tmp_path, steps_seen, monkeypatch):
    runs.poison(monkeypatch.setattr, 7)
    recipe = after_spikes(tmp_path, train__anticipatory_routing={"delay": 2, "after_spike": 6}, checkpoint__every=3)
    interrupted(recipe, monkeypatch, {13: runs.crash})  # which is read before step 11
    # The spike at step 7 led back to step 6; its time lasts for six steps after 7. The crash led back to step 9.
    assert steps_seen[-5:] == [(10, 10), (11, 10), (12, 10), (13, 11), (14, None)]
    payload = read_payload(f"{recipe.checkpoint_dir}/14")
    assert payload["spikes"]["calm_at"] == 13 and payload["data_states"][0]["step"] == 15
    assert len(set(history(recipe, "batch_hash")["batch_hash"])) == 14


def test_always_has_the_delay_that_was_asked_for(tmp_path, steps_seen):
    recipe = make_recipe(tmp_path, train__steps=6, train__anticipatory_routing={"delay": 3, "always": True})
    train(recipe)
    assert steps_seen == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__anticipatory_routing": {"always": True}}, r"cannot be told its experts; .* fix: leave train.anticip"),
        ({"train__anticipatory_routing": {"after_spike": 5}}, r"after_spike: found 5, with train.spike.factor null"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, changes, said):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    with pytest.raises(RecipeError, match=said):
        make_recipe(tmp_path, **changes).check(jax.device_count())
