"""Where the time goes: phases that add up, runs that resume, what a run writes."""

from __future__ import annotations

import json
import time

import pytest

from fathom import zoo
from fathom.train import data
from fathom.train.goodput import PHASES, RunClock
from fathom.train.loop import train
from fathom.train.metrics import read_metrics
from tests.train import runs, toy_model
from tests.train.runs import interrupted, make_recipe, write_text


class Time:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def spend(clock, moment, **seconds):
    for phase, length in seconds.items():
        clock.enter(phase)
        moment.now += length


def test_phases_add_up_to_the_time_that_passed():
    moment = Time()
    clock = RunClock(moment)
    spend(clock, moment, restore=5.0, compile=20.0)
    for _ in range(4):
        spend(clock, moment, data=1.0, step=9.0)
        clock.step_done()
    with clock.during("save"):
        moment.now += 10.0
    clock.enter("data")
    moment.now += 5.0
    clock.enter("step", was="step")  # the batch came while the devices still computed
    values = clock.metrics()
    wanted = {"restore": 5.0, "compile": 20.0, "data": 4.0, "step": 41.0, "save": 10.0}
    assert {name: values[f"time/{name}"] for name in wanted} == wanted
    assert sum(values[f"time/{name}"] for name in PHASES) == 80.0
    assert values["goodput"] == 41.0 / 80.0 and values["time/redone"] == 0
    assert clock.summary() == "80 s in all, goodput 51.2%, compile 25.0%, save 12.5%, restore 6.2%, data 5.0%"


def test_a_process_that_resumes_adds_to_what_was_stored_and_counts_lost_steps(tmp_path):
    moment = Time()
    first = RunClock(moment)
    for step in range(1, 9):
        spend(first, moment, step=10.0)
        first.step_done()
        if step == 8:
            first.store(tmp_path, step)
    second = RunClock(moment)
    second.add_stored(tmp_path, 6)
    spend(second, moment, restore=20.0)
    values = second.metrics()
    assert (values["time/step"], values["time/redone"], values["time/restore"]) == (60.0, 20.0, 20.0)
    second.lose(3)
    assert second.metrics()["time/step"] == 30.0 and second.metrics()["time/redone"] == 50.0


def test_time_between_processes_is_down_time(tmp_path):
    """Also what a killed process did after it last stored its times."""
    moment, date = Time(), Time()
    first = RunClock(moment, date)
    spend(first, moment, step=60.0)
    date.now += 60.0
    first.store(tmp_path, 6)
    date.now += 25.0 + 100.0  # 25 seconds until it is killed
    moment.now = 7.0  # another process's
    second = RunClock(moment, date)
    date.now += 15.0
    spend(second, moment, compile=15.0)
    second.add_stored(tmp_path, 6)
    values = second.metrics()
    assert values["time/down"] == 125.0 and values["goodput"] == 60.0 / 200.0
    second.store(tmp_path, 6)
    date.now -= 50.0  # a host whose clock is late
    third = RunClock(moment, date)
    third.add_stored(tmp_path, 6)
    assert third.metrics()["time/down"] == 125.0


def test_times_that_cannot_be_read_stop_nobody(tmp_path, caplog):
    (tmp_path / "time.json").write_text('{"step": 4, "steps": 4, "sec')
    clock = RunClock(Time())
    clock.add_stored(tmp_path, 4)
    assert clock.metrics()["goodput"] == 0.0
    assert "time.json: not the times of a run" in caplog.text


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    write_text(tmp_path / "text")


def slow_data(monkeypatch, seconds):
    original = data.Loader.__next__

    def late(self):
        time.sleep(seconds)
        return original(self)

    monkeypatch.setattr(data.Loader, "__next__", late)


def test_a_run_tells_its_times_with_the_logged_steps(tmp_path, toy, monkeypatch, capfd):
    recipe = make_recipe(tmp_path, train__eval_every=6, data__holdout=0.4)
    slow_data(monkeypatch, 0.25)
    began = time.monotonic()
    train(recipe)
    passed = time.monotonic() - began
    entries = read_metrics(recipe.run_dir)
    told = {entry["step"]: entry for entry in entries if "goodput" in entry}
    assert list(told) == [5, 10, 12]
    last = told[12]
    total = sum(value for name, value in last.items() if name.startswith("time/"))
    assert 0.3 * passed < total <= passed
    assert last["goodput"] == pytest.approx(last["time/step"] / total)
    # Eleven batches, the first being part of "compile"; the devices hardly ever had anything to do meanwhile.
    assert last["time/data"] > 11 * 0.25 / 2 and last["time/evaluation"] > 0 and last["time/save"] > 0
    shown = capfd.readouterr().err
    assert "goodput" in shown and "time/" not in shown and "time: " in shown


def test_a_resumed_run_goes_on_counting(tmp_path, toy, monkeypatch):
    recipe = make_recipe(tmp_path, train__log_every=2)
    interrupted(recipe, monkeypatch, {9: runs.crash})
    stored = json.loads((recipe.run_dir / "time.json").read_text())
    assert (stored["step"], stored["steps"]) == (12, 12)
    # Times were stored after step 8, of which the run had to go back to 5.
    assert stored["seconds"]["redone"] > 0
    entries = [entry for entry in read_metrics(recipe.run_dir) if "goodput" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12]
    assert entries[-1]["time/compile"] > entries[0]["time/compile"]
