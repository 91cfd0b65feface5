"""What a recipe must be to run on the hosts of a cluster: paths that they reach, state that their chips can hold."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fathom.launch.volumes import Volume, volume_of
from fathom.recipe import Recipe
from fathom.recipe_checks import Problem, RecipeError, stage_label
from fathom.recipe_stages import check_elsewhere, check_stages, stage_blocks, stage_recipes
from fathom.topology import Topology

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
PLACEHOLDER = r"[a-z0-9]+://BUCKET(/.*)?"
"""What the recipes of this package have for a bucket of yours."""

OWN_DISK = {
    "jobset": "the container's own disk, gone at a restart",
    "xpk": "the container's own disk, gone at a restart",
    "tpu-vm": "each host's own disk, gone when the host is",
}
SHARED_DISK = {
    "jobset": "a --volume",
    "xpk": "a storage that the cluster mounts (xpk storage attach)",
    "tpu-vm": "a mount that outlives them (--setup)",
}


def check_recipe(recipe: Recipe, slices: Topology, target: str, volumes: Sequence[Volume]) -> None:
    """RecipeError with everything that keeps a recipe from running there."""
    problems = check_elsewhere(recipe, slices.devices)
    wrong_model = any("model" in problem.key for problem in problems)
    if recipe.mesh.simulated_devices is not None:
        found, expected = f"{recipe.mesh.simulated_devices}, for --on {target}", "nothing: the devices are the slice's"
        problems.append(Problem("mesh.simulated_devices", found, expected, "add mesh.simulated_devices=null"))
    problems += _placeholder_problems(recipe, told=["data.path"])  # as any remote text, with BUCKET in the fix
    problems += _data_problems(recipe, target)
    problems += _path_problems(recipe, target, volumes)
    if not wrong_model:
        problems += _state_problems(recipe, slices)
    if problems:
        raise RecipeError(problems, recipe.name)


def check_rehearsal(recipe: Recipe, memory: int | None) -> None:
    """RecipeError with everything that keeps a recipe from running here.

    Args:
      memory: bytes that this machine has, None where it does not tell. Simulated devices have nothing else.
    """
    simulated = recipe.mesh.simulated_devices
    problems = [] if simulated is None else check_stages(recipe, simulated)
    wrong_model = any("model" in problem.key for problem in problems)
    problems += _placeholder_problems(recipe)
    if simulated is not None and memory is not None and not wrong_model:
        problems += _rehearsal_problems(recipe, memory)
    if problems:
        raise RecipeError(problems, recipe.name)


def notes(recipe: Recipe, slices: Topology, target: str, volumes: Sequence[Volume]) -> list[str]:
    """What the user should know of a recipe that may run there, one sentence each."""
    where = "in the image: no --mount or --volume holds it" if target == "jobset" else "on every host"
    found = [
        f"{key} {path} must exist {where}"
        for key, path in {**_data_paths(recipe), **_input_paths(recipe)}.items()
        if path.startswith("/") and not volume_of(path, volumes)
    ]
    if _lost(recipe.metrics.directory, target, volumes):
        found.append(
            f"metrics.directory {recipe.metrics.directory} is on {OWN_DISK[target]}: log.txt, metrics.jsonl, traces "
            f"and hang files are lost then, unless it lies on {SHARED_DISK[target]}"
        )
    cache = recipe.train.compilation_cache
    if cache is not None and _lost(cache, target, volumes):
        found.append(
            f"train.compilation_cache {cache} is on {OWN_DISK[target]}: the next start compiles anew, unless it is "
            f"gs://... or lies on {SHARED_DISK[target]}"
        )
    if recipe.train.max_runtime is not None:
        found.append("train.max_runtime ends with exit code 3, which restarts a run: it limits each start, not the sum")
    if slices.slices > 1 and recipe.mesh.data % slices.slices:
        found.append(
            f"mesh.data {recipe.mesh.data} is no multiple of the {slices.slices} slices: other axes cross the network"
        )
    return found


# --- Paths ---------------------------------------------------------------------------------------


def _lost(path: str, target: str, volumes: Sequence[Volume]) -> bool:
    """Whether what is written there goes with the container or the host, as far as can be known here."""
    if "://" in path or volume_of(path, volumes):
        return False
    return target == "jobset" or not path.startswith("/")


def _stage_labels(recipe: Recipe) -> list[str]:
    """How errors name the stages, of which a recipe without any has one."""
    return [stage_label(number, stage.name) for number, stage in enumerate(stage_blocks(recipe), 1)] or [""]


def _data_paths(recipe: Recipe) -> dict[str, str]:
    """Key -> where text lies, of the recipe and of stages with text of their own."""
    found: dict[str, str] = {}
    recipes = [("data.path", recipe)]
    labels = _stage_labels(recipe)
    recipes += [(f"{labels[number]}: data.path", stage) for number, stage in enumerate(stage_recipes(recipe))]
    for key, part in recipes:
        own = part.data.location == part.data.path  # else it stands for a folder that each host finds itself
        if own and part.data.location not in found.values():
            found[key] = part.data.location
    return found


def _input_paths(recipe: Recipe) -> dict[str, str]:
    """Key -> what is read beside text, at the start."""
    found = {"model.init": recipe.model.init, "data.tokenizer": recipe.data.tokenizer}
    return {key: path for key, path in found.items() if path not in (None, "bytes")}


def _placeholder_problems(recipe: Recipe, told: Sequence[str] = ()) -> Iterator[Problem]:
    """Buckets that nobody has; `told`: keys of which another problem tells."""
    values = recipe.to_dict()
    labels = _stage_labels(recipe)
    parts = {"": values} | {f"{labels[number]}: ": stage for number, stage in enumerate(values.pop("stages"))}
    for prefix, part in parts.items():
        for key, value in _texts(part):
            if re.fullmatch(PLACEHOLDER, value) and key not in told:
                expected, fix = "a bucket of yours for BUCKET", f"replace it in the recipe, or give {key}=..."
                yield Problem(prefix + key, f"{value!r}, a placeholder", expected, fix)


def _texts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of all texts."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value


def _data_problems(recipe: Recipe, target: str) -> Iterator[Problem]:
    for key, path in _data_paths(recipe).items():
        if path.startswith("/"):
            continue
        expected = "the absolute path of a file or folder that every host has: data is read as local files"
        found, fix = f"{path!r}, a relative path", f"give the place on the hosts, {key}=/the/place/there"
        if "://" in path:
            found, fix = f"{path!r}, which is remote", _how_to_mount(key, path, target)
        yield Problem(key, found, expected, fix)


def _how_to_mount(key: str, path: str, target: str) -> str:
    """The fix for text that is remote."""
    if target == "xpk":
        return f"have the cluster mount it (xpk storage attach, --auto-mount=true), and give {key}=/its/mount/point"
    if target == "tpu-vm":
        return f"mount or copy it on the hosts (--setup COMMAND does, on each of them), and give {key}=/the/place/there"
    if not path.startswith("gs://"):
        return f"mount or copy it on the hosts, and give {key}=/the/place/there"
    folder, place = path.rstrip("/"), "/data"
    if posixpath.splitext(folder)[1] and folder.count("/") > 2:  # a file; what is mounted is its folder
        folder, file = posixpath.split(folder)
        place = f"/data/{file}"
    yours = ", with a bucket of yours for BUCKET" if re.fullmatch(PLACEHOLDER, path) else ""
    return f"add --mount {folder}=/data {key}={place}{yours}"


def _path_problems(recipe: Recipe, target: str, volumes: Sequence[Volume]) -> Iterator[Problem]:
    """What all hosts must reach and cannot; what is written and lies where nothing can be."""
    directory = recipe.checkpoint_dir
    shared = "a place that all hosts reach: gs://..., or the absolute path of a shared mount"
    for key, path in {"checkpoint.directory": directory, **_input_paths(recipe)}.items():
        if "://" not in path and not path.startswith("/"):
            found = f"{path!r}, a folder of each host by itself, gone when the host is"
            if key != "checkpoint.directory":
                found = f"{path!r}, a relative path, which is another on each host, and not yours"
            place = "gs://BUCKET/FOLDER" if key == "checkpoint.directory" else "gs://BUCKET/..."
            yield Problem(key, found, shared, f"add {key}={place}")
    if target == "jobset" and directory.startswith("/") and not volume_of(directory, volumes):
        found = f"{directory!r}, on {OWN_DISK[target]}: no --volume holds it"
        fix = f"add checkpoint.directory=gs://BUCKET/FOLDER, or --volume CLAIM={directory}"
        yield Problem("checkpoint.directory", found, "gs://..., or a path on a --volume", fix)
    for key, path in {"checkpoint.directory": directory, "metrics.directory": recipe.metrics.directory}.items():
        volume = volume_of(path, volumes)
        if volume is not None and volume.is_bucket:
            found = f"{path!r}, on --mount {volume.source}={volume.path}, which is read only"
            yield Problem(key, found, "a place to write to", "use a --volume, or gs://... for checkpoints")


# --- Memory --------------------------------------------------------------------------------------


def _state_problems(recipe: Recipe, slices: Topology) -> Iterator[Problem]:
    """Chips that cannot hold the parameters and the optimizer's moments, spread evenly and with nothing beside them."""
    limit = slices.generation.hbm_bytes
    for prefix, needed, what in _states_above(recipe, limit * slices.devices):
        yield Problem(
            f"{prefix}mesh.topology",
            f"{slices}, {slices.devices} devices with {limit / GIB:.1f} GiB each, "
            f"{slices.devices * limit / 1e12:.1f} TB in all",
            f"at least {needed / slices.devices / GIB:.1f} GiB each, {needed / 1e12:.1f} TB in all: {what}",
            "take a larger slice; this lower bound is without gradients and activations, `fathom plan` tells them",
        )


def _rehearsal_problems(recipe: Recipe, memory: int) -> Iterator[Problem]:
    """The same of a machine whose memory is that of all simulated devices."""
    for prefix, needed, what in _states_above(recipe, memory):
        yield Problem(
            f"{prefix}mesh.simulated_devices",
            f"{recipe.mesh.simulated_devices}, which share this machine's {memory / GIB:.1f} GiB",
            f"at least {needed / GIB:.1f} GiB: {what}",
            "take a smaller model (model.name, or less in model.config); this lower bound is without gradients and "
            "activations",
        )


def _states_above(recipe: Recipe, room: int) -> Iterator[tuple[str, int, str]]:
    """Stages whose parameters and moments are more than `room` bytes: the prefix of keys, the bytes, what they are."""
    spec = recipe.model_spec()
    total = spec.num_params(spec.config).total
    each, moments = BYTES[recipe.model.param_dtype], BYTES[recipe.optimizer.momentum_dtype]
    if recipe.optimizer.name == "adamw":
        moments += BYTES["float32"]  # the second ones; Muon has none, but for what it leaves to AdamW
    if total * (each + moments) <= room:
        return  # whatever trains
    told: set[str] = set()
    for number, stage in enumerate(stage_recipes(recipe)):
        kind = stage.train.parameter_stage
        if kind in told:
            continue
        told.add(kind)
        trained = _trained(stage)
        needed = total * each + trained * moments
        if needed > room:
            what = (
                f"{total / 1e9:.1f} billion parameters of {each} bytes, and {moments} bytes of moments for each of the "
                f"{trained / 1e9:.1f} billion that train"
            )
            yield f"{_stage_labels(recipe)[number]}: " if recipe.stages else "", needed, what


def _trained(recipe: Recipe) -> int:
    """How many parameters train; the model is built as shapes only."""
    from flax import nnx

    spec, kind = recipe.model_spec(), recipe.train.parameter_stage
    module = nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), recipe.compute_options()))
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return sum(math.prod(value.get_value().shape) for path, value in params if not spec.frozen(path, kind))
