"""Models out of Fathom's own checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.mesh import state_shardings
from fathom.recipe_checks import apply_config
from fathom.train.checkpoint_format import (
    METADATA_FILE,
    CheckpointError,
    absolute,
    compare_leaves,
    load_items,
    nest,
    read_payload,
    step_folders,
)
from fathom.train.manifest import config_differences
from fathom.train.state import named_leaves, split_model
from fathom.zoo import ModelSpec

logger = logging.getLogger(__name__)


def find_step(path: str | os.PathLike[str]) -> epath.Path | None:
    """The step folder that a path stands for, None when it is no Fathom checkpoint.

    Args:
      path: a step folder, a folder of step folders, or a run folder; of several steps the newest
        complete one.
    """
    path = absolute(path)
    if (path / METADATA_FILE).exists():
        return path
    for directory in (path, path / "checkpoints"):
        for step in reversed(step_folders(directory)):
            if (directory / str(step) / METADATA_FILE).exists():
                return directory / str(step)
            logger.warning("%s is incomplete and skipped", directory / str(step))
    return None


def load_model(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    options: ComputeOptions | None = None,
    *,
    preset: str = "default",
    allow_cast: bool = False,
) -> nnx.Module:
    """The model of a Fathom checkpoint, its arrays verified.

    Args:
      path: see `find_step`. mesh: where the arrays go, one device unless given; any mesh will do.
      options: how it computes, as in the checkpoint's recipe unless given.
      preset: the model's sharding preset used with `mesh`.
      allow_cast: convert stored dtypes to those that `options` ask for, logging each; else refused.

    Raises:
      CheckpointError: when there is no checkpoint, it is damaged, or it holds other arrays than the
        model.
    """
    folder = find_step(path)
    if folder is None:
        raise CheckpointError(
            f"{path} holds no Fathom checkpoint; expected a run folder, its checkpoints folder, or a step"
        )
    payload = read_payload(folder)
    spec = zoo.get(payload["model"]["name"])
    problems: list[Any] = []
    spec = spec.with_config(
        apply_config(spec.config, payload["model"]["config"], "model.config", problems)
    )
    problems += config_differences(payload, spec) if not problems else []
    if problems:
        raise CheckpointError(
            f"{folder}: its model config cannot be read:\n  " + "\n  ".join(map(str, problems))
        )
    if options is None:
        block = payload["recipe"]["model"]
        names = [field.name for field in dataclasses.fields(ComputeOptions)]
        options = ComputeOptions(**{name: block[name] for name in names if name in block})
    split = split_model(spec, options)
    states = {"params": split.params, "model_state": split.model_state}
    items = {"model": {k: nest(_placed(v, spec, mesh, preset)) for k, v in states.items()}}
    compare_leaves(items, payload, folder, allow_cast=allow_cast)
    loaded = load_items(folder, items, payload)
    filled = {name: _cast_like(states[name], loaded["model"][name]) for name in states}
    return split.merge((filled["params"],), filled["model_state"], jax.random.key(0))


def _placed(state: nnx.State, spec: ModelSpec, mesh: Mesh | None, preset: str) -> dict[str, Any]:
    """Leaf name -> ShapeDtypeStruct with the sharding it will have."""
    leaves = named_leaves(state)
    if mesh is None:
        shardings = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = named_leaves(state_shardings(state, mesh, spec.preset(preset)))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in leaves.items()
    }


def _cast_like(state: nnx.State, loaded: Mapping[str, Any]) -> nnx.State:
    arrays = named_leaves(loaded)
    values = []
    for name, leaf in named_leaves(state).items():
        array = arrays[name]
        if array.dtype != leaf.dtype:
            logger.info("%s: cast from %s to %s", name, array.dtype, leaf.dtype)
            array = array.astype(leaf.dtype)
        values.append(array)
    return jax.tree.unflatten(jax.tree.structure(state), values)
