"""scripts/quickstart.sh: the real script with a model that trains in seconds, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from fathom.recipe import load_recipe
from fathom.train.chat import ChatTokenizer
from fathom.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "quickstart.sh"

SMALLER = (
    "train.steps=4 train.log_every=1 train.eval_every=0 optimizer.warmup_steps=1 optimizer.decay_steps=1 "
    "mesh.data=1 mesh.expert=1 mesh.simulated_devices=2 metrics.tensorboard=false "
    "data.sequence_length=32 data.batch_size=8 data.max_bytes=300000 data.holdout=0 "
    "model.config.attention_kinds=[sliding] model.config.compress_ratios=[0] "
    "model.config.router_kinds=[learned] model.config.num_mtp_layers=0"
).split()


def quickstart(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the script in this test's environment, so that nothing is installed."""
    return subprocess.run(
        [str(SCRIPT), *overrides],
        env={**os.environ, "FATHOM_VENV": sys.prefix, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


def test_the_script_trains_stops_resumes_and_samples(tmp_path):
    # The script would install what it does not find, from a registry, into the environment of the tests.
    assert Path(sys.prefix, "bin", "fathom").exists(), "no console script `fathom` here: run scripts/test.sh"
    run = tmp_path / "a run"
    run.mkdir()
    (run / "notes.txt").write_text("kept")
    done = quickstart(f"metrics.directory={run}", *SMALLER)
    assert done.returncode == 0, done.stderr
    assert "== Training to step 2, then stopping ==" in done.stdout and "done at step 2," in done.stdout
    assert "resuming after step 2" in done.stderr and "done at step 4," in done.stdout
    entries = read_metrics(run)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    first, last = entries[0]["loss/main"], entries[-1]["loss/main"]
    # A run shorter than the recipe's says its loss and is not held to the limit.
    assert last > 2.2 and f"loss/main: first {first:.3f}, last {last:.3f} nats per byte after 4 steps; " in done.stdout
    sample = done.stdout.partition("== A sample from the trained model ==\n")[2].partition("\nLoss curve: ")[0]
    assert sample.startswith("def ") and len(sample) > 100
    assert (run / "loss.png").stat().st_size > 1000
    # Nothing of this machine is in the recipe, and an earlier run is set aside with a word.
    assert load_recipe(run / "recipe.yaml").to_dict()["data"]["path"] == "stdlib:"
    (old,) = tmp_path.glob("a run.old-*")
    assert (old / "notes.txt").read_text() == "kept"
    assert f"The earlier run in {run} is now in {old}" in done.stdout


def test_a_bad_override_is_told_before_anything_is_moved(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    done = quickstart(f"metrics.directory={run}", "train.stepz=4")
    assert done.returncode == 2
    assert "did you mean train.steps?" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [run]


# --- With a stand-in for the training -------------------------------------------------------------

FATHOM = """#!/bin/sh
# `fathom train`, but the losses are given and nothing is computed.
for argument in "$@"; do case $argument in metrics.directory=*) run=${argument#*=};; esac; done
mkdir -p "$run" && echo "$@" >> "$run/calls" && cp "$LOSSES" "$run/metrics.jsonl"
"""
PYTHON = """#!/bin/sh
case "$1" in *sample.py) echo "sampled from $2";; *) exec {python} "$@";; esac
"""


@pytest.fixture
def stand_in(tmp_path):
    """An environment whose `fathom` and sampling do nothing; gives a function (losses, *overrides) -> result."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in (("fathom", FATHOM), ("python", PYTHON.format(python=sys.executable))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def call(losses, *overrides):
        lines = [json.dumps({"step": i, "loss": 9.0, "loss/main": x}) for i, x in enumerate(losses, 1)]
        lines.append(json.dumps({"step": len(losses), "eval/loss/main": 0.5}))
        (tmp_path / "losses").write_text("\n".join(lines) + "\n")
        where = f"metrics.directory={tmp_path / 'run'}"
        return quickstart(where, *overrides, FATHOM_VENV=str(folder.parent), LOSSES=str(tmp_path / "losses"))

    return call


@pytest.mark.parametrize("last", [2.2, 2.5, float("nan")])
def test_a_full_run_must_learn(stand_in, last):
    done = stand_in([5.8, last])
    assert done.returncode == 1
    assert f"loss/main: first 5.800, last {last:.3f} nats per byte" in done.stdout
    assert f"the last loss/main is {last:.3f}, expected below 2.2" in done.stderr


def test_steps_and_folders_follow_the_overrides(stand_in, tmp_path):
    steps = load_recipe("tiny-v4-cpu").train.steps
    done = stand_in([5.8, 2.1])
    assert done.returncode == 0, done.stderr
    assert f"Training to step {steps // 2}, then" in done.stdout
    assert f"sampled from {tmp_path / 'run' / 'checkpoints'}" in done.stdout
    first, second = (tmp_path / "run" / "calls").read_text().splitlines()
    assert first.endswith(f" train.stop_at={steps // 2}") and "stop_at" not in second
    longer = stand_in([5.8, 2.5], "train.steps=600", f"checkpoint.directory={tmp_path / 'elsewhere'}")
    assert longer.returncode == 1 and "Training to step 300, then" in longer.stdout
    assert f"sampled from {tmp_path / 'elsewhere'}" in longer.stdout
    short = ("optimizer.warmup_steps=0", "optimizer.decay_steps=0")
    assert stand_in([5.8], "train.steps=1", *short).stdout.count("Training to step 1, then") == 1


# --- Pythons that will not do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sys.version_info = (3, 10, 14)", "is Python 3.10, Fathom needs 3.11 or newer"),
        ("sys.modules['venv'] = None", "has no venv module; install it"),
        (None, "does not run; install Python 3.11 or newer"),
    ],
    ids=["too old", "without venv", "not there"],
)
def test_a_python_that_will_not_do_gets_one_clear_line(tmp_path, change, words):
    path = tmp_path / "python3"
    if change is not None:  # this Python, spoilt before it runs what follows -c
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; {change}; $2"\n')
        path.chmod(0o755)
    done = quickstart(FATHOM_VENV=str(tmp_path / "venv"), PYTHON=str(path))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"quickstart: {path}") and words in line
    assert not (tmp_path / "venv").exists()


# --- sample.py ------------------------------------------------------------------------------------


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("sample", ROOT / "scripts" / "examples" / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting(nnx.Module):
    """After token n comes n + 1."""

    def __call__(self, tokens):
        return SimpleNamespace(logits=jax.nn.one_hot(tokens + 1, 264))


def test_sampling_continues_and_stops(module):
    assert bytes(module.sample(Counting(), b"ab", 3, 0, 0)) == b"abcde"
    assert module.sample(Counting(), [255], 2, 0, 0) == [255, 0, 1]  # only bytes are drawn
    assert module.sample(Counting(), [254], 9, 0, 0, 262, 257) == [254, 255, 256, 257]
    assert module.question(ChatTokenizer("bytes"), "ab") == [256, 258, ord("a"), ord("b"), 259, 261]


def test_sampling_at_temperature_0_is_greedy(module):
    logits = np.array([0.0, 3.0, 1.0, 2.5])
    assert {module.pick(logits, 0, np.random.default_rng(seed)) for seed in range(20)} == {1}
    assert {module.pick(logits, 1e-3, np.random.default_rng(seed)) for seed in range(20)} == {1}
    draws = [module.pick(logits, 1.0, np.random.default_rng(seed)) for seed in range(300)]
    assert set(draws) == {0, 1, 2, 3} and np.bincount(draws).argmax() == 1
