"""The training loop: build, restore, step, log, save."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fathom.mesh import make_mesh, sharding_scope
from fathom.recipe import Recipe, compare_for_resume
from fathom.train.checkpoint import Checkpoints
from fathom.train.checkpoint_format import CheckpointError
from fathom.train.data import Loader, batch_hash, make_loader
from fathom.train.manifest import config_differences, describe_run
from fathom.train.metrics import plot_loss
from fathom.train.report import NonFiniteError, RunReport
from fathom.train.state import TrainState
from fathom.train.step import Program, init_state, make_program
from fathom.train.stopping import StopSignal

__all__ = ["NonFiniteError", "TrainResult", "train"]

logger = logging.getLogger(__name__)

EVAL_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: steps done. metrics: those of the last step, floats by name.
      checkpoint_dir: where its step folders lie.
      preempted: True when it stopped early, after a complete save, for SIGTERM or
        train.max_runtime.
    """

    step: int
    metrics: dict[str, Any]
    checkpoint_dir: str
    preempted: bool = False


def train(recipe: Recipe) -> TrainResult:
    """Trains from a recipe, or resumes where its newest checkpoint is.

    Raises:
      RecipeError: when the recipe is impossible here; before anything is compiled.
      CheckpointError: when checkpoints cannot be written, read, or belong to another model or data.
      NonFiniteError: when loss or gradients stop being finite; the newest checkpoint is from
        before.
    """
    recipe.use_simulated_devices()
    recipe.check(jax.device_count())
    spec, mesh = recipe.model_spec(), make_mesh(recipe.mesh.shape)
    checkpoints = open_checkpoints(recipe)
    loader = open_loader(recipe, spec.config.vocab_size)
    holdout = open_loader(recipe, spec.config.vocab_size, "holdout") if recipe.train.eval_every else None
    program = make_program(recipe, mesh)
    description = describe_run(recipe.to_dict(), spec, mesh, loader.fingerprint)

    with (
        sharding_scope(mesh, program.rules),
        StopSignal(mesh, recipe.train.max_runtime) as stop,
        checkpoints,
    ):
        state, start = restore_or_init(recipe, program, checkpoints, description, loader)
        done, stopping = start, False
        last = min(recipe.train.steps, recipe.train.stop_at or recipe.train.steps)
        with RunReport(recipe, _headline(recipe, program, start), start) as report:
            for done in range(start + 1, last + 1):
                batch = next_batch(loader, done)
                state, metrics = program.step(state, to_devices(batch, program, recipe))
                report.push(done, metrics, batch_hash(batch))
                checkpoints.poll()
                stopping = stop.requested()
                if holdout is not None and done % recipe.train.eval_every == 0:
                    report.evaluation(done, evaluate(recipe, program, state, holdout))
                if done % recipe.checkpoint.every == 0 or done == last or stopping:
                    report.flush()  # raises rather than save after a bad step
                    checkpoints.save(state, loader.get_state(), description)
                    report.restart_clock()
                if stopping:
                    break

    # Leaving the context above waited for the last save.
    if jax.process_index() == 0 and done > start:
        plot_loss(recipe.run_dir)
    preempted = stopping and done < recipe.train.steps
    return TrainResult(done, report.last, str(checkpoints.directory), preempted)


def open_checkpoints(recipe: Recipe) -> Checkpoints:
    """The run's checkpoint folder, proven writable."""
    block = recipe.checkpoint
    checkpoints = Checkpoints(
        recipe.checkpoint_dir,
        keep=block.keep,
        keep_every=block.keep_every,
        async_save=block.async_save,
    )
    checkpoints.probe()
    if not block.resume and checkpoints.steps():
        raise CheckpointError(
            f"{checkpoints.directory} already holds steps {checkpoints.steps()} and "
            "checkpoint.resume is false; resume, or give the new run another metrics.directory"
        )
    return checkpoints


def open_loader(recipe: Recipe, vocab_size: int, split: str = "train") -> Loader:
    """The batches of this process."""
    return make_loader(
        recipe.data,
        vocab_size=vocab_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        split=split,
    )


def next_batch(loader: Loader, step: int) -> dict[str, np.ndarray]:
    """The next batch; ValueError, naming the step, when there is none."""
    try:
        return next(loader)
    except StopIteration:
        raise ValueError(f"the data ended before step {step}; add data or lower train.steps") from None


def to_devices(batch: Mapping[str, Any], program: Program, recipe: Recipe) -> dict[str, jax.Array]:
    """This process's rows as part of the global [B, S] arrays."""
    shape = (recipe.data.batch_size, recipe.data.sequence_length)
    sharding = program.batch_sharding
    return {
        name: jax.make_array_from_process_local_data(sharding, array, shape)
        for name, array in batch.items()
    }


def restore_or_init(
    recipe: Recipe,
    program: Program,
    checkpoints: Checkpoints,
    description: Mapping[str, Any],
    loader: Loader,
) -> tuple[TrainState, int]:
    """(state, steps done), from the newest sound checkpoint or fresh; puts the loader at that step.

    Raises:
      CheckpointError: when the checkpoint is of another run, or its parts are of different steps.
    """

    def check(payload: dict[str, Any]) -> None:
        problems = compare_for_resume(payload["recipe"], recipe)
        problems += [p for p in config_differences(payload, program.spec) if p not in problems]
        old, new = payload["data_fingerprint"], description["data_fingerprint"]
        problems += [
            f"data_fingerprint.{key}: {_short(old.get(key))} in the checkpoint, {_short(new.get(key))} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if problems:
            raise CheckpointError(
                f"{checkpoints.directory} belongs to another run, {len(problems)} differences:\n  "
                + "\n  ".join(problems)
                + "\nput those values back, or give the new run another metrics.directory"
            )

    restored = checkpoints.restore(program.state, check)
    if restored is None:
        return init_state(program, recipe.train.seed), 0
    loader.set_state(restored.data_state)
    step = int(restored.state.step)
    if loader.step != step:
        raise CheckpointError(
            f"{checkpoints.directory}/{step}: its data iterator is at step {loader.step}, its model at "
            f"step {step}; remove that folder to use the one before it"
        )
    return restored.state, step


def evaluate(
    recipe: Recipe, program: Program, state: TrainState, loader: Loader
) -> dict[str, float]:
    """Mean losses over the first EVAL_BATCHES batches of held-out documents; names begin with
    "eval/".

    The loader is left where it was, so that every evaluation sees the same batches.
    """
    begin = loader.get_state()
    sums: dict[str, float] = {}
    for batch in itertools.islice(loader, EVAL_BATCHES):
        for name, value in program.evaluate(state, to_devices(batch, program, recipe)).items():
            sums[f"eval/{name}"] = sums.get(f"eval/{name}", 0.0) + float(value)
    loader.set_state(begin)
    return {name: value / EVAL_BATCHES for name, value in sums.items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _headline(recipe: Recipe, program: Program, start: int) -> str:
    spec = program.spec
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
    count = spec.num_params(spec.config)
    where = f"resuming after step {start}" if start else "from the beginning"
    return (
        f"{recipe.name}: {spec.name}, {count.total / 1e6:.4g}M parameters ({count.active / 1e6:.4g}M "
        f"active), mesh {axes or 'of one device'}, {where}, run folder {Path(recipe.metrics.directory)}"
    )
