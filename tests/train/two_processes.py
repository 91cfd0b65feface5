"""One process of a toy run: of two where the environment says so (see fathom.distributed), else alone.

    python -m tests.train.two_processes RESULT FOLDER OPTIONS

Writes what came out to RESULT, as JSON; "unguarded" of it are programs compiled outside of `compile_together`. OPTIONS
is JSON: "devices" of this process; "recipe", changes for `tests.train.runs.make_recipe`; "term_step", at which SIGTERM
reaches the second process; "term_border": True for SIGTERM to it while the end of a stage is saved; "stages" of the
recipe; "late", seconds that its compiling takes longer; "long_step": seconds from which on a step
is a long one; "poisoned": the process that reads a poisoned batch for step 8; "hinder": True for what only one process
meets, see `hindered`.
"""

import json
import sys
import time
from pathlib import Path

import jax

from fathom import zoo
from fathom.distributed import initialize_distributed
from fathom.recipe import Recipe
from fathom.train import checkpoint_format, loop, stopping
from fathom.train.checkpoint import Checkpoints
from tests.train import runs, toy_model


def main(result_file: Path, folder: Path, options: dict) -> None:
    several = initialize_distributed()
    assert initialize_distributed() is several
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options["devices"])
    zoo.register(runs.told(toy_model.TOY))
    if jax.process_index() == options.get("poisoned"):
        runs.poison(setattr, 8)
    recipe = runs.make_recipe(folder, **options.get("recipe", {}))
    recipe = Recipe.model_validate({**recipe.to_dict(), "stages": options.get("stages", [])})
    if options.get("term_border") and jax.process_index() == 1:
        wait = Checkpoints.wait
        Checkpoints.wait = lambda self: (runs.sigterm(None), wait(self))[1]
    if options.get("late") and jax.process_index() == 1:
        compile_together = loop.compile_together
        loop.compile_together = lambda *given: (time.sleep(options["late"]), compile_together(*given))
    stopping.LONG_STEP = options.get("long_step", stopping.LONG_STEP)
    values = hindered(folder, recipe) if options.get("hinder") else run(recipe, options.get("term_step", 0))
    result_file.write_text(json.dumps({"processes": jax.process_count(), **values}))


def run(recipe, term_step: int) -> dict:
    original = loop.next_batch

    def next_batch(loader, step):
        if jax.process_index() == 1 and step == term_step:
            runs.sigterm(None)
        return original(loader, step)

    loop.next_batch = next_batch
    unguarded = compiled_unguarded()
    result = loop.train(recipe)
    values = {"step": result.step, "preempted": result.preempted, "loss": result.metrics["loss"]}
    return {**values, "unguarded": sorted(unguarded)}


def compiled_unguarded() -> set[str]:
    """To be filled with the names of programs that are compiled where no process waits for the others."""
    together, names, guarded = loop.compile_together, set(), []

    def compile_together(*given):
        guarded.append(True)
        together(*given)
        guarded.clear()

    def compiled(event, duration, fun_name=None, **rest):
        if event == "/jax/core/compile/backend_compile_duration" and not guarded:
            names.add(fun_name)

    loop.compile_together = compile_together
    jax.monitoring.register_event_duration_secs_listener(compiled)
    return names


def hindered(folder: Path, recipe) -> dict:
    """The errors of runs in which the first process cannot write metrics, then the second cannot read a step."""
    (folder / "file").write_text("")
    elsewhere = recipe.metrics.model_copy(update={"directory": str(folder / "file" / "run")})
    checkpoint = recipe.checkpoint.model_copy(update={"directory": recipe.checkpoint_dir})
    errors = [error_of(recipe.model_copy(update={"metrics": elsewhere, "checkpoint": checkpoint}))]
    loop.train(recipe)
    original = checkpoint_format.ocp.load_checkpointables

    def load(path, items):
        if jax.process_index() == 1:
            raise KeyError("handlers") from ValueError("PERMISSION_DENIED: Failed to open")
        return original(path, items)

    checkpoint_format.ocp.load_checkpointables = load
    return {"errors": [*errors, error_of(recipe)]}


def error_of(recipe) -> list[str]:
    try:
        loop.train(recipe)
    except ValueError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
