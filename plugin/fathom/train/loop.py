"""The training loop: build, restore, step, log, save."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fathom.mesh import make_mesh, sharding_scope
from fathom.recipe import Recipe, compare_for_resume
from fathom.recipe_checks import Problem, RecipeError
from fathom.recipe_stages import stage_blocks, stage_recipes
from fathom.step_folder import CheckpointError, find_step
from fathom.train.anticipation import Feeder, Schedule
from fathom.train.checkpoint import Checkpoints
from fathom.train.checkpoint_format import agree
from fathom.train.checkpoint_model import start_from
from fathom.train.curriculum import OtherStageError, Stage, stage_at, stages_of
from fathom.train.data import DataError
from fathom.train.manifest import config_differences, describe_run
from fathom.train.metrics import probe_metrics
from fathom.train.report import NonFiniteError, RunReport
from fathom.train.session import Session
from fathom.train.spike import SpikeError
from fathom.train.state import TrainState
from fathom.train.step import Program, init_state, make_program
from fathom.train.stopping import StopSignal, Termination
from fathom.train.streams import RowStreams, row_parts
from fathom.train.together import compile_together

__all__ = ["NonFiniteError", "TrainResult", "train"]

logger = logging.getLogger(__name__)

SAME_DATA = ("source", "path", "pattern", "exclude", "field", "max_bytes", "tokenizer")
"""Where two stages have these alike, the data must be what it was when the run crosses from one to the other."""

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
    """Trains from a recipe, through all of its stages, or resumes where its newest checkpoint is.

    Raises:
      RecipeError: when the recipe is impossible here; before anything is compiled.
      CheckpointError: when checkpoints cannot be written, read, or belong to another model or data.
      NonFiniteError: when loss or gradients stop being finite, without `train.spike.factor`; the newest checkpoint is
        from before.
      SpikeLimitError: when the loss spikes more often than `train.spike` lets the run go back.
    """
    recipe.use_simulated_devices()
    recipe.check(jax.device_count())
    probe_run_folder(recipe)
    stages = stages_of(stage_recipes(recipe), [s.until for s in stage_blocks(recipe)] or [recipe.train.steps])
    with Termination(recipe.train.max_runtime) as termination, Session(recipe) as session:
        checkpoints = open_checkpoints(recipe, session.saved)
        stage = stage_at(stages, max(checkpoints.steps(), default=0))
        while True:
            try:
                result = train_stage(recipe, stage, stages, checkpoints, termination, session)
            except OtherStageError as other:  # the newest steps were damaged
                stage = stages[other.number]
                continue
            if result.preempted or result.step < stage.last or stage is stages[-1]:
                session.finish(result.step, result.preempted)
                return result
            stage = stages[stage.number + 1]


@dataclasses.dataclass(frozen=True)
class StageRun:
    """What the steps of a stage need, and need again after a rollback.

    Attributes:
      whole: the recipe with all stages. stage: this one, among `stages`. program: its compiled functions.
      loader, holdout: its data, for training and for evaluation (None without one). description: what its checkpoints
        say of the run (`describe_run`). checkpoints, session: the run's. stop: when to stop early.
    """

    whole: Recipe
    stage: Stage
    stages: list[Stage]
    program: Program
    loader: RowStreams
    holdout: RowStreams | None
    description: Mapping[str, Any]
    checkpoints: Checkpoints
    session: Session
    stop: StopSignal


def train_stage(
    whole: Recipe,
    stage: Stage,
    stages: list[Stage],
    checkpoints: Checkpoints,
    termination: Termination,
    session: Session,
) -> TrainResult:
    """The rest of a stage, from the newest checkpoint; OtherStageError when that lies in another one."""
    recipe = stage.recipe
    spec, mesh = recipe.model_spec(), make_mesh(recipe.mesh.shape)
    program = make_program(recipe, mesh)
    loader = open_loader(recipe, program)
    holdout = open_loader(recipe, program, "holdout") if recipe.train.eval_every else None
    description = describe_run(recipe.to_dict(), spec, mesh, loader.fingerprint)
    stop, spike = StopSignal(mesh, termination), None
    run = StageRun(whole, stage, stages, program, loader, holdout, description, checkpoints, session, stop)

    with sharding_scope(mesh, program.rules):
        while True:
            try:
                with checkpoints:
                    return run_steps(run, *begin_steps(run, spike))
            except SpikeError as error:
                spike = error.with_traceback(None)  # whose frames hold the state that is given up
                session.spikes.roll_back(spike)
                loader.restart()


def begin_steps(run: StageRun, spike: SpikeError | None) -> tuple[TrainState, int, int]:
    """(state, steps done, batches skipped so far in the stage) to go on from: the newest checkpoint's.

    After a spike the data goes on behind it: what was read since that checkpoint is not read again.
    """
    session, loader, stage = run.session, run.loader, run.stage
    with session.clock.during("restore"):
        state, start = restore_or_init(run, resumes=spike is None)
    if run.holdout is not None:
        run.holdout.use(loader.count)
    lost = 0
    if spike is not None:
        lost = max(spike.step - start, 0)
        with session.clock.during("restore"):  # as long as it takes: no step is due
            while loader.step < spike.batches:
                next_batch(loader, start + 1)
        logger.warning(
            "%s; back to step %d, and on with the data after the spike, %d batches later; rollback %d of %d",
            spike, start, lost, session.spikes.rollbacks, stage.recipe.train.spike.max_rollbacks,
        )  # fmt: skip
        after = stage.recipe.train.anticipatory_routing.after_spike
        session.spikes.calm_at = max(start, spike.step) + after if after else 0
    schedule = Schedule.of(stage.recipe.train.anticipatory_routing, session.spikes.calm_at)
    with session.clock.during("compile"):  # after a rollback what is compiled is not compiled again
        compile_together(run.program, stage.recipe, schedule.ways(start + 1, stage.last))
    session.begin(start, lost)
    return state, start, loader.step - (start - stage.first)


def run_steps(run: StageRun, state: TrainState, start: int, skipped: int) -> TrainResult:
    """The steps after `start`, to the stage's end or an early stop.

    Raises:
      SpikeError: when the run is to go back.
    """
    recipe, program, loader, session = run.stage.recipe, run.program, run.loader, run.session
    clock, checkpoints = session.clock, run.checkpoints
    done, stopping, compiled = start, False, set()
    last = min(recipe.train.steps, recipe.train.stop_at or recipe.train.steps)
    headline = _headline(run.stage, len(run.stages), program, start)
    hashes: dict[int, str] = {}

    def read(step: int) -> dict[str, np.ndarray]:
        batch = next_batch(loader, step)
        hashes[step] = loader.batch_hash
        return batch

    feeder = Feeder(
        read=read,
        place=lambda batch: to_devices(batch, program, recipe),
        data_state=loader.states_to_save,
        route=program.route,
        schedule=Schedule.of(recipe.train.anticipatory_routing, session.spikes.calm_at),
        last=last,
    )

    def prepare(step: int) -> None:
        """Reads a batch while the devices compute; what they had to wait for it is time for data."""
        clock.enter("data")
        feeder.prepare(step)
        clock.enter("step", was="step" if report.busy() else None)

    def batches(step: int) -> int:
        return step - run.stage.first + skipped

    def watch(step: int, loss: float) -> None:
        session.spikes.observe(step, loss, batches(step))

    def refuse(error: NonFiniteError, step: int) -> None:
        session.spikes.refuse(error, step, batches(step))

    # Whatever ends these steps, saves under way are then waited for outside of their phases.
    with RunReport(recipe, headline, start, run.whole, session, watch, refuse) as report, clock.during("data"):
        for done in range(start + 1, last + 1):
            clock.enter("compile" if done == start + 1 else "data")
            fed = feeder.take(done, state)
            first = ("routing" in fed.inputs) not in compiled
            clock.enter("compile" if first else "step", was="step" if report.busy() else None)
            session.profiler.before(done, report.flush)
            state, metrics = program.step(state, fed.inputs)
            if first:
                compiled.add("routing" in fed.inputs)
                jax.block_until_ready(metrics)  # once: what it takes is compilation, and no throughput
                clock.enter("step")
            report.push(done, metrics, hashes.pop(done))
            if session.profiler.ends_with(done):
                report.flush()
                with clock.during("other"):
                    report.message(f"traced steps up to {done} in {session.profiler.close()}")
                report.restart_clock()
            checkpoints.poll()
            stopping = run.stop.requested(meanwhile=functools.partial(prepare, done + 1))
            if run.holdout is not None and done % recipe.train.eval_every == 0:
                report.flush()
                with clock.during("evaluation"):
                    report.evaluation(done, evaluate(recipe, program, state, run.holdout))
            if done % recipe.checkpoint.every == 0 or done == last or stopping:
                report.flush()  # raises rather than save after a bad step
                with clock.during("save"):
                    save(run, state, fed.data_state(), skipped)
                report.restart_clock()
            if stopping:
                break
        with clock.during("save"):
            checkpoints.wait()
            stopping = stopping or run.stop.agreed()  # told since: the next stage is not begun
        if done > start:
            report.message(f"time: {clock.summary()}")

    preempted = stopping and done < recipe.train.steps
    return TrainResult(done, report.last, str(checkpoints.directory), preempted)


def save(run: StageRun, state: TrainState, data_state: Any, skipped: int) -> None:
    """Starts to save the state, with where its data is and what spikes are judged by."""
    description = {**run.description, "skipped_batches": skipped, "spikes": run.session.spikes.state()}
    run.checkpoints.save(state, data_state, description)


def probe_run_folder(recipe: Recipe) -> None:
    """Proves, on the first process, that metrics can be written; ValueError on all when they cannot."""

    def probe() -> None:
        if jax.process_index() == 0:
            probe_metrics(recipe.run_dir, recipe.metrics.wandb)

    agree(probe)


def open_checkpoints(recipe: Recipe, on_saved: Callable[[int], None]) -> Checkpoints:
    """The run's checkpoint folder, proven writable; `on_saved` is called with every step that was saved."""
    block = recipe.checkpoint
    checkpoints = Checkpoints(
        recipe.checkpoint_dir,
        keep=block.keep,
        keep_every=block.keep_every,
        async_save=block.async_save,
        on_saved=on_saved,
    )
    checkpoints.probe()
    if not block.resume and checkpoints.steps():
        raise CheckpointError(
            f"{checkpoints.directory} already holds steps {checkpoints.steps()} and "
            "checkpoint.resume is false; resume, or give the new run another metrics.directory"
        )
    return checkpoints


def open_loader(recipe: Recipe, program: Program, split: str = "train") -> RowStreams:
    """The batches of the rows that this process's devices hold; processes that hold the same rows read the same."""
    parts = row_parts(recipe, program.batch_sharding)
    return RowStreams(
        recipe.data,
        vocab_size=program.spec.config.vocab_size,
        rows=parts,
        process=jax.process_index(),
        count=len(set(parts.values())),
        split=split,
    )


def next_batch(loader: RowStreams, step: int) -> dict[str, np.ndarray]:
    """The next batch; ValueError, naming the step, when there is none."""
    try:
        return next(loader)
    except StopIteration:
        raise ValueError(f"the data ended before step {step}; add data or lower train.steps") from None


def to_devices(batch: Mapping[str, Any], program: Program, recipe: Recipe) -> dict[str, jax.Array]:
    """This process's rows, in rising order, as part of the global [B, S] arrays."""
    shape = (recipe.data.batch_size, recipe.data.sequence_length)
    sharding = program.batch_sharding
    return {
        name: jax.make_array_from_process_local_data(sharding, array, shape)
        for name, array in batch.items()
    }


def restore_or_init(run: StageRun, resumes: bool) -> tuple[TrainState, int]:
    """(state, steps done), from the newest sound checkpoint or fresh; puts the loader at that step.

    Args:
      resumes: whether the process has only begun; it then takes from the checkpoint what spikes are judged by.

    Raises:
      CheckpointError: when the checkpoint is of another run, or its parts are of different steps.
      OtherStageError: when it lies in another stage.
    """
    stage, program, checkpoints, loader = run.stage, run.program, run.checkpoints, run.loader
    recipe = stage.recipe
    newest = max(checkpoints.steps(), default=0)
    begins = stage.previous is not None and newest == stage.first

    def check(payload: dict[str, Any]) -> None:
        found = stage_at(run.stages, payload["step"])
        if found is not stage or begins != (stage.previous is not None and payload["step"] == stage.first):
            raise OtherStageError(found.number)  # the newest step was damaged, this is the one before it
        problems = compare_for_resume(payload["recipe"], stage.previous if begins else recipe)
        problems += [p for p in config_differences(payload, program.spec) if p not in problems]
        if not begins:
            problems += _data_differences(payload, run.description, loader)
        elif all(getattr(stage.previous.data, key) == getattr(recipe.data, key) for key in SAME_DATA):
            problems += _fingerprint_differences(payload, run.description, leave_out=("settings",))
        if problems:
            raise CheckpointError(
                f"{checkpoints.directory} belongs to another run, {len(problems)} differences:\n  "
                + "\n  ".join(problems)
                + "\nput those values back, or give the new run another metrics.directory"
            )

    restored = checkpoints.restore((stage.start_program(program) if begins else program).state, check)
    if restored is None and stage.previous is not None:
        raise OtherStageError(0)
    if restored is None:
        loader.use()
    elif begins:
        loader.follow(restored.data_states)
    if restored is None and recipe.model.init is not None:
        check_init(recipe)
        return start_from(program, recipe.model.init, recipe.train.seed), 0
    if restored is None:
        return init_state(program, recipe.train.seed), 0
    step = int(restored.state.step)
    if resumes and "spikes" in restored.payload:
        run.session.spikes.load(restored.payload["spikes"])
    if begins:
        run.session.spikes.forget()  # other rows, or another attention, have other losses
        return stage.begin(program, restored.state), step
    loader.restore(restored.data_states)
    skipped = restored.payload.get("skipped_batches", 0)
    if loader.step != step - stage.first + skipped:
        raise CheckpointError(
            f"{checkpoints.directory}/{step}: its data iterator is at step {loader.step - skipped + stage.first}, its "
            f"model at step {step}; remove that folder to use the one before it"
        )
    return restored.state, step


def _data_differences(payload: Mapping[str, Any], description: Mapping[str, Any], loader: RowStreams) -> list[str]:
    """In what a checkpoint's data is not what the loader reads, one text each."""
    problems = _fingerprint_differences(payload, description)
    try:
        loader.check(payload["data_states"])
    except DataError as error:
        problems.append(str(error))
    return problems


def _fingerprint_differences(
    payload: Mapping[str, Any], description: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> list[str]:
    old, new = payload["data_fingerprint"], description["data_fingerprint"]
    return [
        f"data_fingerprint.{key}: {_short(old.get(key))} in the checkpoint, {_short(new.get(key))} now"
        for key in sorted((old.keys() | new.keys()) - set(leave_out))
        if old.get(key) != new.get(key)
    ]


def check_init(recipe: Recipe) -> None:
    """RecipeError when `model.init` is no Fathom checkpoint."""
    if find_step(recipe.model.init) is None:
        problem = Problem(
            "model.init",
            recipe.model.init,
            "a complete Fathom checkpoint: a run folder, a step, or what a conversion wrote",
            "convert a Hub folder first: fathom convert --to orbax HUB_FOLDER DESTINATION",
        )
        raise RecipeError([problem], recipe.name)


def evaluate(
    recipe: Recipe, program: Program, state: TrainState, loader: RowStreams
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


def _headline(stage: Stage, count: int, program: Program, start: int) -> str:
    spec, recipe = program.spec, stage.recipe
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
    params = spec.num_params(spec.config)
    where = f"resuming after step {start}" if start else "from the beginning"
    if count > 1:
        name = stage_blocks(recipe)[stage.number].name
        where = f"stage {stage.number + 1} of {count}{f' ({name})' if name else ''}, {where}"
    return (
        f"{recipe.name}: {spec.name}, {params.total / 1e6:.4g}M parameters ({params.active / 1e6:.4g}M "
        f"active), mesh {axes or 'of one device'}, {where}, run folder {Path(recipe.metrics.directory)}"
    )
