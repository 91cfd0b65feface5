"""The watchdog: a step that stands still ends the process; what may take its time does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fathom.train.goodput import RunClock
from fathom.train.watchdog import ALLOWANCE, EXIT_HUNG, Watchdog
from tests.train.runs import read_log, steps_on_disk, write_text

HANGING_RUN = """
import dataclasses, sys, threading, time
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from fathom import zoo
from fathom.train import checkpoint, loop
from tests.train import runs, toy_model

zoo.register(toy_model.TOY)
original_save, original_program = checkpoint.Checkpoints.save, loop.make_program

def slow_save(self, *args):
    time.sleep(4)
    original_save(self, *args)

def stand_still():
    threading.Event().wait()

def make_program(recipe, mesh):
    program = original_program(recipe, mesh)
    calls = []
    def step(*args):
        calls.append(0)
        return program.step(*args) if len(calls) < 5 else stand_still()
    return dataclasses.replace(program, step=step)

checkpoint.Checkpoints.save, loop.make_program = slow_save, make_program
loop.train(runs.make_recipe(Path(sys.argv[1]), train__watchdog=3, checkpoint__every=3))
"""


def test_a_step_that_hangs_ends_the_process_and_a_slow_save_does_not(tmp_path):
    write_text(tmp_path / "text")
    command = [sys.executable, "-c", HANGING_RUN, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == EXIT_HUNG == 4, ended.stderr[-3000:]
    assert steps_on_disk(tmp_path / "run" / "checkpoints") == [3]
    traces = (tmp_path / "run" / "hang.0.txt").read_text()
    for text in (traces, ended.stderr):
        assert re.search(r"process 0: no step .* for \d+ s, train.watchdog is 3 s, in phase 'step'", text)
        assert "in stand_still" in text and "in _watch" in text
    assert "no step has completed" in read_log(tmp_path / "run")[-1]


def test_traces_are_written_where_no_run_folder_is_yet(tmp_path):
    """The first process makes it; another may hang before it can."""
    code = (
        "import sys, threading; from pathlib import Path; from fathom.train.goodput import RunClock; "
        "from fathom.train.watchdog import Watchdog; clock = RunClock(); watchdog = Watchdog(0.1, clock, "
        "Path(sys.argv[1])); watchdog.__enter__(); clock.enter('step'); threading.Event().wait()"
    )
    folder = tmp_path / "there" / "run"
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert ended.returncode == EXIT_HUNG, ended.stderr[-3000:]
    assert "in phase 'step'" in (folder / "hang.0.txt").read_text()


def test_phases_have_their_own_limits():
    now = [0.0]
    clock = RunClock(lambda: now[0])
    watchdog = Watchdog(10.0, clock, Path("nowhere"))
    allowed = {phase: watchdog.allowed(phase) for phase in ("step", "data", "compile", "save", "restore", "other")}
    assert allowed.pop("step") == allowed.pop("data") == 10.0
    assert set(allowed.values()) == {10.0 + ALLOWANCE}

    clock.enter("data")
    for now[0], phase in ((4.0, "step"), (6.0, "data"), (8.0, "step")):
        clock.enter(phase)
    assert clock.mark == ("step", 0.0)  # no step was completed since
    clock.step_done()
    assert clock.mark == ("step", 8.0)
    with clock.during("save"):
        assert clock.mark == ("save", 8.0)
        now[0] = 30.0
    assert clock.mark == ("step", 30.0)


def test_no_limit_is_no_thread():
    with Watchdog(None, RunClock(), Path("nowhere")) as watchdog:
        assert not watchdog._thread.is_alive()
