"""`fathom.load`: a Hub-format folder or a Fathom checkpoint as a module ready to call.

The module is built abstractly and filled with the file's arrays, each cut to the pieces that its
devices hold, so that nothing larger than one parameter's shard is copied at a time. On a mesh it also
knows how its activations are laid out, so that a plain call runs sharded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints_tools.hub_source import HubSource
from fathom.hub import HubTensor, group_by_path, stacked_shape
from fathom.layers.options import ComputeOptions
from fathom.mesh import Rules, active_rules, batch_sharding, sharding_scope, state_shardings
from fathom.zoo import ModelSpec

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "fp32",
    *,
    simulate_quant: bool | None = None,
    attention: str = "auto",
) -> nnx.Module:
    """Loads a model with its weights.

    Args:
      path: a Hub-format folder (`config.json` and safetensors, in DeepSeek's names or as
        `transformers` saves them; FP8 and FP4 weights are decoded) or a Fathom checkpoint.
      mesh: lay the weights out over this mesh by the model's default preset, and compute there; one device
        without it.
      dtype: "fp32" or "bf16", of the weights and of the computation. Weights that the reference
        keeps in float32 stay float32, and integer tables int32.
      simulate_quant: reproduce the rounding of the released inference code; unless given, what the run
        of a Fathom checkpoint did, and False for Hub folders.
      attention: which version of the attention op, see `ComputeOptions`.

    Returns:
      The module; call it as `module(tokens, positions=None, segment_ids=None)`. Out of a Fathom
      checkpoint it computes in the stage (`train.stage`) of its run. With a mesh a call outside of
      any `sharding_scope` is compiled and runs sharded; axes of the mesh that do not divide the
      batch or the sequence repeat its work.

    Raises:
      FileNotFoundError: when there is nothing at the path.
      ValueError: for a config that is not understood, and listing at once every missing, left over,
        doubled, wrongly stored or wrongly shaped tensor, and scales that are no numbers.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {sorted(DTYPES)}")
    changes = {"dtype": DTYPES[dtype], "param_dtype": DTYPES[dtype], "attention": attention}
    if simulate_quant is not None:
        changes["simulate_quant"] = simulate_quant
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_file():
        raise ValueError(f"{path}: found a file, expected the folder it lies in")
    model, spec = (_load_hub if is_hub_folder(path) else _load_step)(path, mesh, changes)
    return model if mesh is None else _on_mesh(model, mesh, spec.preset("default"))


def is_hub_folder(path: str | Path) -> bool:
    """Whether a folder is in the Hub's format: it holds `config.json` or safetensors files."""
    path = Path(path)
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def _load_step(
    path: Path, mesh: Mesh | None, changes: Mapping[str, Any]
) -> tuple[nnx.Module, ModelSpec]:
    from fathom.train.checkpoint_model import load_model, open_step, options_of, spec_of

    folder, payload = open_step(path)
    options = dataclasses.replace(options_of(payload), **changes)
    # The caller names the dtype here, so converting to it is asked for; it is logged.
    return load_model(folder, mesh, options, allow_cast=True), spec_of(payload, folder)


def _load_hub(
    path: Path, mesh: Mesh | None, changes: Mapping[str, Any]
) -> tuple[nnx.Module, ModelSpec]:
    source = HubSource(path)
    source.check_values()
    spec, options = source.spec, ComputeOptions(**changes)
    abstract = nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), options))
    graphdef, state = nnx.split(abstract)
    shardings = None
    if mesh is not None:
        shardings = dict(nnx.to_flat_state(state_shardings(state, mesh, spec.preset("default"))))
    by_path = group_by_path(entry.tensor for entry in source.stored.values())
    flat = dict(nnx.to_flat_state(state))
    _check_same_paths(path, flat, by_path)
    for name, variable in flat.items():
        sharding = None if shardings is None else shardings[name].get_value()
        value = _parameter(source, name, by_path[name], variable.get_value(), sharding)
        flat[name] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), spec


def _check_same_paths(path: Path, flat: Mapping[tuple, Any], by_path: Mapping[tuple, Any]) -> None:
    unlike = set(flat) ^ set(by_path)
    if unlike:
        names = sorted("/".join(map(str, name)) for name in unlike)
        raise ValueError(
            f"{path}: the model and its Hub table name different parameters: {', '.join(names)}"
        )


def _parameter(
    source: HubSource,
    name: tuple,
    parts: Mapping[tuple[int, ...], HubTensor],
    abstract: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One parameter, assembled from its Hub tensors."""
    lead, shape = stacked_shape("/".join(map(str, name)), parts)
    if shape != abstract.shape:
        raise ValueError(
            f"parameter {'/'.join(map(str, name))}: its Hub tensors make shape {shape}, the model has "
            f"{abstract.shape}"
        )

    def window(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
        out = np.empty([len(one) for one in ranges], abstract.dtype)
        region = tuple(slice(one.start, one.stop) for one in ranges[len(lead) :])
        outer = ranges[: len(lead)]
        for place in itertools.product(*(range(len(one)) for one in outer)):
            tensor = parts[tuple(one[i] for one, i in zip(outer, place, strict=True))]
            out[place] = source.read(tensor, np.dtype(abstract.dtype), region)
        return out

    if sharding is None:
        return jax.device_put(window((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, window)


# --- Calls on a mesh ------------------------------------------------------------------------------


def _on_mesh(model: nnx.Module, mesh: Mesh, rules: Rules) -> nnx.Module:
    """The same module, whose plain calls run under these rules; isinstance and paths stay as they were."""
    model.__class__ = _class_on_mesh(type(model), mesh, tuple(rules.items()))
    return model


@functools.lru_cache(maxsize=64)
def _class_on_mesh(base: type[nnx.Module], mesh: Mesh, rules: tuple) -> type[nnx.Module]:
    """A subclass of a module's class: what it knows of the mesh is no part of the module's graph."""

    @functools.wraps(base.__call__)
    def call(self: nnx.Module, tokens: jax.Array, *args: Any, **keywords: Any) -> Any:
        if active_rules() is not None:  # the caller has a layout in mind
            return base.__call__(self, tokens, *args, **keywords)
        fitting = _fitting(dict(rules), mesh, np.shape(tokens))
        if not _tracing():
            return _call_compiled(base, self, mesh, fitting, (tokens, *args), keywords)
        # Naming the layout names the devices, which weights that the traced function closes over do not.
        tokens = jax.lax.with_sharding_constraint(tokens, _layout(tokens, mesh, fitting))
        with sharding_scope(mesh.abstract_mesh, fitting):
            return base.__call__(self, tokens, *args, **keywords)

    names = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), {**names, "__doc__": base.__doc__})


def _call_compiled(
    base: type, model: nnx.Module, mesh: Mesh, rules: Rules, args: tuple, keywords: Mapping[str, Any]
) -> Any:
    """A call from outside of any trace; compiled, because op by op a sharded model takes minutes."""
    _check_ids(model, args[0])
    leaves, structure = jax.tree.flatten((args, keywords))
    arrays = [jax.device_put(x, _layout(x, mesh, rules)) if hasattr(x, "shape") else None for x in leaves]
    static = tuple(None if hasattr(x, "shape") else x for x in leaves)
    graphdef, streams, weights = nnx.split(model, nnx.RngState, ...)
    with sharding_scope(mesh, rules):
        about = (base, graphdef, structure, static, tuple(rules.items()))
        out, streams = _compiled(about, arrays, streams, weights)
    nnx.update(model, streams)
    return out


@functools.partial(jax.jit, static_argnums=0)
def _compiled(about: tuple, arrays: list, streams: nnx.State, weights: nnx.State) -> tuple[Any, nnx.State]:
    """The call's result and the random-number streams after it.

    The sharding rules are a part of `about` because jit's cache does not see those of the scope.
    """
    base, graphdef, structure, static, _ = about
    leaves = [other if x is None else x for x, other in zip(arrays, static, strict=True)]
    args, keywords = jax.tree.unflatten(structure, leaves)
    model = nnx.merge(graphdef, streams, weights)
    out = base.__call__(model, *args, **keywords)
    return out, nnx.state(model, nnx.RngState)


def _layout(array: Any, mesh: Mesh, rules: Rules) -> NamedSharding:
    """Of a call's argument: [B, S] is cut as a batch is, anything else is everywhere."""
    if np.ndim(array) == 2:
        return batch_sharding(mesh, rules)
    return NamedSharding(mesh, PartitionSpec())


def _fitting(rules: Rules, mesh: Mesh, shape: tuple[int, ...]) -> dict[str, Any]:
    """The rules, without the mesh axes that do not divide a batch of shape [B, S]."""
    fitting = dict(rules)
    for logical, size in zip(("act_batch", "act_sequence"), shape, strict=False):
        axes, kept = rules.get(logical) or (), []
        for axis in (axes,) if isinstance(axes, str) else axes:
            if size % mesh.shape[axis] == 0:
                kept.append(axis)
                size //= mesh.shape[axis]
        fitting[logical] = tuple(kept)
    return fitting


def _tracing() -> bool:
    """Whether jax is tracing: then a mesh can only be set as an abstract one."""
    try:
        jax.sharding.get_mesh()
    except ValueError:
        return True
    return False


def _check_ids(model: nnx.Module, tokens: jax.Array) -> None:
    """Raises ValueError for ids outside the vocabulary, which the model cannot see while it is compiled."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    bad = np.argwhere((ids < 0) | (ids >= size))
    if len(bad):
        raise ValueError(
            f"token id {ids[tuple(bad[0])]} at {bad[0].tolist()} is outside the vocabulary [0, {size}); "
            f"{len(bad)} such ids in all"
        )
