"""Small runs for the tests of the loop: recipes over a folder of generated text, and how to disturb them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from fathom.recipe import Recipe
from fathom.step_folder import read_payload
from fathom.train import data, loop
from fathom.train.metrics import read_metrics
from fathom.zoo import ModelSpec

WORDS = "the loss falls when a model learns from real text and nothing is ever lost on the way".split()


def write_text(folder: Path, files: int = 6, seed: int = 0) -> Path:
    """A folder of text files with a few hundred words each."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(150, 500))]
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def make_recipe(tmp_path: Path, run: str = "run", **changes) -> Recipe:
    """A recipe for the toy model on eight devices; `changes` are "block__key" = value."""
    values = {
        "name": run,
        "model": {"name": "toy-lm", "dtype": "float32"},
        "data": {
            "source": "text",
            "path": str(tmp_path / "text"),
            "sequence_length": 32,
            "batch_size": 8,
            "packing": "concat_split",
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "train": {"steps": 12, "log_every": 5},
        "checkpoint": {"every": 5},
        "metrics": {"directory": str(tmp_path / run), "tensorboard": False},
    }
    for key, value in changes.items():
        block, _, name = key.partition("__")
        values[block][name] = value
    return Recipe.model_validate(values)


def at_steps(monkeypatch, actions: dict[int, Callable]) -> None:
    """Calls `actions[step](batch)` when the loop has fetched the batch of that step."""
    original = loop.next_batch

    def next_batch(loader, step):
        batch = original(loader, step)
        if step in actions:
            actions[step](batch)
        return batch

    monkeypatch.setattr(loop, "next_batch", next_batch)


def sigterm(batch) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash(batch) -> None:
    raise InterruptedError("as if the process had been killed")


def interrupted(recipe: Recipe, monkeypatch, actions: dict[int, Callable]) -> loop.TrainResult:
    """Runs until the end, disturbed once at each step of `actions`."""
    for step, action in actions.items():
        with monkeypatch.context() as patch:
            at_steps(patch, {step: action})
            if action is crash:
                with pytest.raises(InterruptedError):
                    loop.train(recipe)
            else:
                result = loop.train(recipe)
                assert (result.step, result.preempted) == (step, True)
    return loop.train(recipe)


MARKED = 251  # a byte that no text has


def mark(batch) -> None:
    """Makes the batch one on which `exploding` models fail."""
    batch["tokens"][0, 0] = MARKED


def exploding(spec: ModelSpec) -> ModelSpec:
    """The model, with gradients that are not finite for marked batches."""

    def loss(model, batch, weights, counts):
        value, aux = spec.loss(model, batch, weights, counts)
        marked = (batch["tokens"] == MARKED).any()
        return value * jnp.where(marked, jnp.nan, 1.0), aux

    return dataclasses.replace(spec, loss=loss)


POISON = 250  # another such byte


def poisoned(spec: ModelSpec) -> ModelSpec:
    """The model, whose loss is ten times as large on batches with a poisonous token."""

    def loss(model, batch, weights, counts):
        value, aux = spec.loss(model, batch, weights, counts)
        factor = jnp.where((batch["tokens"] == POISON).any(), 10.0, 1.0)
        return value * factor, {**aux, "loss/main": aux["loss/main"] * factor}

    return dataclasses.replace(spec, loss=loss)


def told(spec: ModelSpec) -> ModelSpec:
    """The poisoned toy, as if it had routers: their choices depend on the weights, and a little of the loss on them."""

    def loss(model, batch, weights, counts):
        value, aux = poisoned(spec).loss(model, batch, weights, counts)
        assert batch.keys() <= {"tokens", "segment_ids", "positions", "routing"}
        chosen = batch["routing"]["block"].mean() if "routing" in batch else 0.0
        return value * (1 + 1e-3 * chosen), aux

    def route(module, batch):
        choice = module.embed[...][batch["tokens"]].argmax(axis=-1)
        return {"block": choice[..., None], "scanned": choice[:, None, :, None]}

    return dataclasses.replace(spec, loss=loss, route=route)


def poison(setattr: Callable, *numbers: int) -> None:
    """Poisons some batches of the stream, counted from 1, whichever step they are read for."""
    original = data.Loader.__next__

    def read(self):
        batch = original(self)
        if self.step in numbers:
            batch["tokens"][0, 0] = POISON
        return batch

    setattr(data.Loader, "__next__", read)


def saved_arrays(result: loop.TrainResult, step: int) -> dict[str, dict]:
    """Name -> shape, dtype and checksum of every array saved at a step."""
    return read_payload(Path(result.checkpoint_dir) / str(step))["leaves"]


def saved_data_state(result: loop.TrainResult, step: int) -> str:
    return json.dumps(read_payload(Path(result.checkpoint_dir) / str(step))["data_states"])


def history(recipe: Recipe, *names: str) -> dict[str, list]:
    """The values of some metrics over all steps."""
    entries = read_metrics(recipe.run_dir)
    return {name: [entry[name] for entry in entries if name in entry] for name in ("step", *names)}


def read_log(run_dir: Path) -> list[str]:
    """The lines of a run folder's log.txt, without their times."""
    lines = (run_dir / "log.txt").read_text().splitlines()
    return [line.partition("Z  ")[2] if "Z  " in line else line for line in lines]


def steps_on_disk(result_or_recipe) -> list[int]:
    """Steps with a checkpoint folder, rising; also takes the folder they lie in."""
    directory = getattr(result_or_recipe, "checkpoint_dir", result_or_recipe)
    return sorted(int(p.name) for p in Path(directory).iterdir() if p.name.isdigit())
