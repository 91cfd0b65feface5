"""The state of a run, and the model split once into a static part and arrays.

`TrainState` is everything a step changes and everything a checkpoint must hold about the model.
Names of its leaves ("params/embed/weight") are made here once, for shardings, checkpoints and error
messages alike.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fathom.layers.options import ComputeOptions
from fathom.mesh import Rules, state_shardings
from fathom.zoo import ModelSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step turns into the next.

    Attributes:
      params: nnx.State of the nnx.Param variables, stored in the model's param dtypes.
      model_state: nnx.State of all other variables (router biases, hash tables) but random-number
        state.
      opt_state: optax state, over the trainable parameters only.
      step: int32 scalar, batches consumed (a skipped step counts).
      rng: uint32 key data; each step folds `step` into it, so it never changes.
    """

    params: nnx.State
    model_state: nnx.State
    opt_state: Any
    step: jax.Array
    rng: jax.Array


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model's static definition and the abstract arrays that belong to it.

    Attributes:
      graphdef: what `nnx.merge` needs beside the states.
      params, model_state: abstract states, as in TrainState.
      rng_state: abstract state of random-number streams (dropout); made anew in every step, never
        saved.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    model_state: nnx.State
    rng_state: nnx.State

    def merge(self, params: tuple[nnx.State, ...], model_state: nnx.State, key: jax.Array) -> Any:
        """The module over these arrays, its random-number streams derived from `key`."""
        return nnx.merge(self.graphdef, *params, model_state, _fill_rngs(self.rng_state, key))


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    return nnx.split(model, nnx.Param, nnx.RngState, ...)


def _build(spec: ModelSpec, options: ComputeOptions, key: jax.Array) -> nnx.Module:
    # Sharding comes from out_shardings of the jitted initializer. Flax must see no mesh meanwhile:
    # it would take logical axes for mesh axes.
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with nnx.use_eager_sharding(False), no_mesh:
        return spec.build(spec.config, nnx.Rngs(key), options)


def split_model(spec: ModelSpec, options: ComputeOptions) -> SplitModel:
    """Traces the model's construction without allocating anything, inside a sharding scope or not."""
    graphdefs = []

    def abstract():
        graphdef, *states = _split(_build(spec, options, jax.random.key(0)))
        graphdefs.append(graphdef)
        return states

    params, rng_state, model_state = jax.eval_shape(abstract)
    return SplitModel(graphdefs[0], params, model_state, rng_state)


def init_variables(
    spec: ModelSpec, options: ComputeOptions, rng: jax.Array
) -> tuple[nnx.State, nnx.State]:
    """Fresh (params, model_state) from uint32 key data; to be traced under jit with output shardings."""
    _, params, _, model_state = _split(_build(spec, options, jax.random.wrap_key_data(rng)))
    return params, model_state


def _fill_rngs(rng_state: nnx.State, key: jax.Array) -> nnx.State:
    def fill(path, leaf):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, zlib.crc32("/".join(path_names(path)).encode()))
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree_util.tree_map_with_path(fill, rng_state)


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A jax key path as plain names; the `.value` step into an nnx.Variable is left out."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    inside_variable = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return tuple(names[:-1] if inside_variable else names)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf name ("params/embed/weight") -> leaf, in the tree's own order."""
    return {
        "/".join(path_names(path)): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def abstract_state(
    spec: ModelSpec,
    model: SplitModel,
    init_optimizer: Callable[[nnx.State], Any],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
) -> TrainState:
    """TrainState of `jax.ShapeDtypeStruct`s that carry their shardings.

    Args:
      init_optimizer: params -> optimizer state. Each of its leaves whose path ends in the path of a
        parameter of the same shape is laid out like that parameter; the others are replicated.

    Raises:
      ValueError: naming the weight, when a sharding rule does not fit it.
    """
    params = _with_shardings(model.params, state_shardings(model.params, mesh, rules))
    model_state = _with_shardings(model.model_state, state_shardings(model.model_state, mesh, rules))
    by_path = {path_names(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_param(path, leaf):
        names = path_names(path)
        for start in range(len(names)):
            param = by_path.get(names[start:])
            if param is not None and param.shape == leaf.shape:
                return _struct(leaf, param.sharding)
        return _struct(leaf, replicated)

    opt_state = jax.eval_shape(init_optimizer, model.params)
    return TrainState(
        params=params,
        model_state=model_state,
        opt_state=jax.tree_util.tree_map_with_path(like_param, opt_state),
        step=_struct(jax.ShapeDtypeStruct((), jnp.int32), replicated),
        rng=_struct(jax.eval_shape(lambda: seed_to_rng(0)), replicated),
    )


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _with_shardings(abstract: nnx.State, shardings: nnx.State) -> nnx.State:
    return jax.tree.map(_struct, abstract, shardings)


def shardings_of(abstract: Any) -> Any:
    """The tree of shardings that a tree of ShapeDtypeStructs carries."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def seed_to_rng(seed: int) -> jax.Array:
    """uint32 key data for TrainState.rng."""
    return jax.random.key_data(jax.random.key(seed))


def state_bytes(abstract: Any) -> int:
    """Bytes of all leaves together, over all devices, replicas counted once."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def global_norm(tree: Any) -> jax.Array:
    """float32 scalar: the Euclidean norm of all leaves together."""
    return optax.tree.norm(tree).astype(jnp.float32)
