"""Models out of Fathom's own checkpoints, to call or to train on."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from fathom.hub import FP4_BLOCK, FP8_BLOCK
from fathom.layers.options import ComputeOptions
from fathom.mesh import sharding_scope, state_shardings
from fathom.step_folder import MODEL, QUANTISED, CheckpointError, find_step, read_payload, saved_spec
from fathom.train.checkpoint_format import compare_leaves, load_items, nest
from fathom.train.dequantise import code_sharding, decode, storage_of
from fathom.train.manifest import architecture_differences, config_differences
from fathom.train.state import TrainState, named_leaves, shardings_of, split_model
from fathom.train.step import Program, make_rng
from fathom.zoo import ModelSpec

logger = logging.getLogger(__name__)


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
      options: how it computes, see `options_of` unless given.
      preset: the model's sharding preset used with `mesh`.
      allow_cast: convert stored dtypes to those that `options` ask for, logging each; else refused.

    Raises:
      CheckpointError: when there is no checkpoint, it is damaged, or it holds other arrays than the
        model.
    """
    folder, payload = open_step(path)
    spec = spec_of(payload, folder)
    split = split_model(spec, options_of(payload) if options is None else options)
    states = {"params": split.params, "model_state": split.model_state}
    shardings = {name: _shardings(state, spec, mesh, preset) for name, state in states.items()}
    filled = read_states(folder, payload, spec, states, shardings, allow_cast=allow_cast)
    return split.merge((filled["params"],), filled["model_state"], jax.random.key(0))


def open_step(path: str | os.PathLike[str]) -> tuple[epath.Path, dict[str, Any]]:
    """The step folder that a path stands for (see `find_step`) and its payload.

    Raises:
      CheckpointError: when there is none, or its payload is damaged.
    """
    folder = find_step(path)
    if folder is None:
        raise CheckpointError(
            f"{path} holds no Fathom checkpoint; expected a run folder, its checkpoints folder, or a step"
        )
    return folder, read_payload(folder)


def options_of(payload: Mapping[str, Any]) -> ComputeOptions:
    """How the saved run computed, its stage of training included; defaults where its recipe does not say.

    A conversion's recipe has no train block: its model computes as in the last stage.
    """
    recipe = payload["recipe"]
    said = {**recipe["model"], **{k: v for k, v in recipe.get("train", {}).items() if k == "stage"}}
    names = [field.name for field in dataclasses.fields(ComputeOptions)]
    return ComputeOptions(**{name: said[name] for name in names if name in said})


def read_states(
    folder: Any,
    payload: Mapping[str, Any],
    spec: ModelSpec,
    states: Mapping[str, nnx.State],
    shardings: Mapping[str, Mapping[str, Any]],
    *,
    allow_cast: bool = False,
) -> dict[str, nnx.State]:
    """The arrays of a model out of a step folder, verified, quantised ones decoded.

    Args:
      folder, payload: the step. spec: the model at the step's size.
      states: "params" and "model_state" -> abstract state; shardings: likewise, leaf name -> sharding.
      allow_cast: convert stored dtypes, logging each; else refused. Quantised weights take the dtype asked for.

    Raises:
      CheckpointError: when the step is damaged or holds other arrays.
    """
    tensors = {}
    if QUANTISED in {leaf.partition("/")[0] for leaf in payload["leaves"]}:
        tensors = {"/".join(map(str, t.path)): t for t in spec.hub_tensors(spec.config)}
    items: dict[str, Any] = {MODEL: {}, QUANTISED: {}}
    for collection, state in states.items():
        leaves, codes = {}, {}
        for name, leaf in named_leaves(state).items():
            sharding = shardings[collection][name]
            about = payload["leaves"].get(f"{QUANTISED}/{collection}/{name}/codes")
            if about is None:
                leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            else:
                scales = payload["leaves"][f"{QUANTISED}/{collection}/{name}/scales"]
                codes |= _abstract_codes(name, tensors[name], about, scales, sharding)
        items[MODEL][collection] = nest(leaves)
        if codes:
            items[QUANTISED][collection] = nest(codes)
    items = {name: item for name, item in items.items() if item}
    compare_leaves(items, payload, folder, allow_cast=allow_cast)
    loaded = load_items(folder, items, payload)
    return {name: _fill(name, states[name], loaded, tensors, shardings[name]) for name in states}


def _abstract_codes(
    name: str, tensor: Any, codes: Mapping[str, Any], scales: Mapping[str, Any], sharding: Any
) -> dict[str, Any]:
    fp8 = storage_of(tuple(codes["shape"]), tensor) == "fp8"
    granules = {
        "codes": (1, 1 if fp8 else 2),
        "scales": (FP8_BLOCK, FP8_BLOCK) if fp8 else (1, FP4_BLOCK),
    }
    found = {}
    for part, about in (("codes", codes), ("scales", scales)):
        shape = tuple(about["shape"])
        place = code_sharding(sharding, tensor, shape, granules[part])
        found[f"{name}/{part}"] = jax.ShapeDtypeStruct(shape, np.dtype(about["dtype"]), sharding=place)
    return found


def _fill(
    collection: str,
    state: nnx.State,
    loaded: Mapping[str, Any],
    tensors: Mapping[str, Any],
    shardings: Mapping[str, Any],
) -> nnx.State:
    arrays = named_leaves(loaded[MODEL].get(collection, {}))
    codes = named_leaves(loaded.get(QUANTISED, {}).get(collection, {}))
    values = []
    for name, leaf in named_leaves(state).items():
        if name in arrays:
            array = arrays[name]
            if array.dtype != leaf.dtype:
                logger.info("%s: cast from %s to %s", name, array.dtype, leaf.dtype)
                array = array.astype(leaf.dtype)
        else:
            parts = codes.pop(f"{name}/codes"), codes.pop(f"{name}/scales")
            array = decode(*parts, tensors[name], leaf.dtype, shardings[name])
        values.append(array)
    return jax.tree.unflatten(jax.tree.structure(state), values)


def start_from(program: Program, path: str | os.PathLike[str], seed: int) -> TrainState:
    """A run's first state with the weights of a checkpoint, laid out over the program's mesh.

    Stored dtypes become those of the recipe. The optimizer starts afresh.

    Args:
      program: of the run. path: a Fathom checkpoint, see `find_step`. seed: of the run's random numbers.

    Raises:
      CheckpointError: when there is none, it is damaged, or its architecture is not the recipe's.
    """
    folder = find_step(path)
    if folder is None:
        raise CheckpointError(f"model.init: {path} holds no complete Fathom checkpoint")
    payload = read_payload(folder)
    differences = architecture_differences(payload, program.spec)
    if differences:
        raise CheckpointError(
            f"model.init: {folder} is another architecture than the recipe's:\n  "
            + "\n  ".join(differences)
            + "\nset model.name and model.config to the checkpoint's"
        )
    wanted = {"params": program.model.params, "model_state": program.model.model_state}
    shardings = {name: named_leaves(shardings_of(getattr(program.state, name))) for name in wanted}
    logger.info("weights from %s", folder)
    filled = read_states(folder, payload, program.spec, wanted, shardings, allow_cast=True)
    with sharding_scope(program.mesh, program.rules):
        return program.start(filled["params"], filled["model_state"], make_rng(program, seed))


def _shardings(
    state: nnx.State, spec: ModelSpec, mesh: Mesh | None, preset: str
) -> dict[str, Any]:
    if mesh is None:
        return dict.fromkeys(named_leaves(state), SingleDeviceSharding(jax.local_devices()[0]))
    return named_leaves(state_shardings(state, mesh, spec.preset(preset)))


def spec_of(payload: Mapping[str, Any], folder: Any) -> ModelSpec:
    """The saved model at its saved size; CheckpointError when its config cannot be read, or reads as another."""
    spec = saved_spec(payload, folder)
    if problems := config_differences(payload, spec):
        raise CheckpointError(
            f"{folder}: its model config cannot be read:\n  " + "\n  ".join(map(str, problems))
        )
    return spec
