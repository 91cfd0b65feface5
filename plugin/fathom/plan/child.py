"""The process that compiles: `python -m fathom.plan.child FOLDER`, started by `fathom.plan.compiler`.

FOLDER holds recipe.json and topology.txt. Written there: facts.json, as soon as the step is traced; done.json, when it
is compiled to the end; error.json, when that failed. Each appears whole.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from fathom.layers.remat import forward_passes
from fathom.mesh import active_rules, axis_size, make_mesh, sharding_scope
from fathom.plan.flops import count_jaxpr
from fathom.plan.parameters import parameter_rows
from fathom.recipe import Recipe
from fathom.topology import parse_topology
from fathom.train import optimizer
from fathom.train.muon import muon_flops
from fathom.train.step import Program, make_program
from fathom.train.streams import rows_read
from fathom.zoo import StepShape

EXPERT_LOOP = "add_block"
"""Body of the loop over a device's blocks of expert rows; how often it runs depends on the routing."""


def main(folder: Path) -> None:
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    recipe = Recipe.model_validate(json.loads((folder / "recipe.json").read_text()))
    name = (folder / "topology.txt").read_text().strip()
    try:
        compile_recipe(folder, recipe, name)
    except Exception as error:
        write_whole(folder / "error.json", {"kind": type(error).__name__, "text": str(error)})
        raise


def end_with_parent(parent: int) -> None:
    """Ends this process, which may compile for long and hold gigabytes, once nobody waits for it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def compile_recipe(folder: Path, recipe: Recipe, topology: str) -> None:
    """Traces and compiles the step, and writes what is known as soon as it is."""
    program = make_program(recipe, make_mesh(recipe.mesh.shape, devices_of(recipe, topology)))
    batch = program.abstract_batch(recipe.data.batch_size, recipe.data.sequence_length)
    with sharding_scope(program.mesh, program.rules):
        traced = program.step.trace(program.state, batch)
        lowered = traced.lower()
    # The compiler leaves one of two cores free, and this process's lock too.
    counting = threading.Thread(target=_write_facts, args=(folder, program, batch, traced.jaxpr, recipe))
    counting.start()
    try:
        compiled = lowered.compile()
    finally:
        counting.join()
    memory = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
    if topology == "cpu":  # a TPU's program lies in the folder already
        module = compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
        (folder / "module.pb").write_bytes(module)
    write_whole(folder / "done.json", sizes)


def devices_of(recipe: Recipe, topology: str) -> list[Any]:
    """The devices of a slice that is not there, or this machine's CPU cut into those of the recipe."""
    if topology == "cpu":
        from fathom.mesh import simulate_devices

        simulate_devices(math.prod(recipe.mesh.shape.values()))
        return jax.devices("cpu")
    from jax.experimental import topologies

    parsed = parse_topology(topology)
    extra = {} if parsed.generation.chip_config is None else {"chip_config_name": parsed.generation.chip_config}
    if parsed.slices > 1:
        extra["num_slices"] = parsed.slices
    return list(
        topologies.get_topology_desc(platform="tpu", topology_name=parsed.slice_name, **extra).devices
    )


def _write_facts(folder: Path, program: Program, batch: Any, jaxpr: Any, recipe: Recipe) -> None:
    """facts.json: what is known without the compiler."""
    try:
        with sharding_scope(program.mesh, program.rules):
            facts = step_facts(program, batch, jaxpr, recipe)
    except Exception as error:
        facts = {"problem": f"{type(error).__name__}: {error}"}
    write_whole(folder / "facts.json", facts)


def step_facts(program: Program, batch: Any, jaxpr: Any, recipe: Recipe) -> dict[str, Any]:
    """Sizes, shapes and operations of a step, from its trace; bytes are of one device."""
    from fathom.layers.expert_rows import SLACK

    spec, state = program.spec, program.state
    weights = jax.tree.leaves(state.params)
    tokens = recipe.data.batch_size * recipe.data.sequence_length
    return {
        "weights": device_bytes(state.params),
        "model_state": device_bytes(state.model_state),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
        "weight_shapes": sorted({tuple(x.sharding.shard_shape(x.shape)) for x in weights}),
        "parameters": sum(math.prod(x.shape) for x in weights) + _counted_state(state.model_state),
        "formula_parameters": spec.num_params(spec.config).total,
        "tokens": tokens,
        "read_tokens": rows_read(recipe, program.batch_sharding) * recipe.data.sequence_length,
        "flops": count_jaxpr(jaxpr, platform="tpu", loops={EXPERT_LOOP: 1 / SLACK}),
        "formula_flops": spec.flops_per_token(spec.config, recipe.data.sequence_length) * tokens,
        "expected_flops": expected_flops(program, recipe),
        "rows": parameter_rows(program, recipe),
        "mesh": {axis: int(size) for axis, size in program.mesh.shape.items()},
    }


def expected_flops(program: Program, recipe: Recipe) -> dict[str, float] | None:
    """What the formulas say that a step multiplies, by purpose; None for models and policies without one.

    Raises:
      ValueError: outside of the program's `sharding_scope`.
    """
    if active_rules() is None:
        raise ValueError("expected_flops: how a row lies on devices is known inside a sharding_scope only")
    spec, length = program.spec, recipe.data.sequence_length
    passes = forward_passes(recipe.model.remat, _in_units(spec.config))
    if spec.step_flops is None or passes is None or recipe.model.remat == "none":
        return None
    shape = StepShape(
        length, recipe.train.stage, passes, length // axis_size("act_sequence"), axis_size("heads"),
        recipe.model.stretch, recipe.model.dtype,
    )  # fmt: skip
    parts = spec.step_flops(spec.config, shape)
    found = {name: value * length * recipe.data.batch_size for name, value in parts.items() if value}
    if recipe.optimizer.name == "muon":
        trainable, _ = optimizer.split_frozen(spec, program.state.params, recipe.train.parameter_stage)
        found["Muon"] = muon_flops(trainable)
    return found


def _in_units(config: Any) -> float:
    """The share of blocks that the policy "unit" has made again with their unit."""
    plan = getattr(config, "plan", None)
    if plan is None or not plan.repeats:
        return 0.0
    return plan.repeats * (plan.unit - 1) / (config.num_layers + getattr(config, "num_mtp_layers", 0))


def _counted_state(model_state: Any) -> int:
    """Floating-point elements of what is no nnx.Param: the routers' biases, which the formulas count."""
    leaves = jax.tree.leaves(model_state)
    return sum(math.prod(x.shape) for x in leaves if jax.numpy.issubdtype(x.dtype, jax.numpy.floating))


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays that carry shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def write_whole(path: Path, value: Any) -> None:
    """Writes JSON so that it is either absent or complete."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
