"""AdamW, or Muon and AdamW, with a warmup-stable-decay schedule, over the parameters that train in this stage.

Frozen parameters never reach the optimizer: the step splits them off by path, so they have no
gradient, no moments, no decay and no update. Gradients and moments are float32 whatever the
parameters are stored in; first moments may be stored in bfloat16.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fathom.mesh import variable_axes
from fathom.train.moments import stored_moments
from fathom.train.muon import matrices_of, scale_by_hybrid_muon
from fathom.train.state import named_leaves, path_names
from fathom.zoo import ModelSpec

STACK_AXIS = "layers"
"""Logical axis of stacked layers; it does not make a vector a matrix."""

NO_DECAY_NAMES = frozenset({"ape", "base", "bias", "scale", "sink"})
"""Last path components that are never decayed, whatever their rank: position and other biases, scales."""

OWN, HELD, MOMENTS = "own", "held", "1"
"""Parts of the state of a stage that holds others' moments; the place of moments in `make_optimizer`'s chain."""


def make_schedule(block: Any, steps: int) -> optax.Schedule:
    """Learning rate by number of updates done: linear warmup, constant, then a final decay.

    The first update has learning_rate / warmup_steps, update warmup_steps - 1 the full rate, and
    the last decay_steps go down to final_ratio * learning_rate.

    Args:
      block: the recipe's optimizer block. steps: updates in the whole run.

    Raises:
      ValueError: when warmup and decay do not fit into the run, or the decay is unknown.
    """
    warmup, decay = block.warmup_steps, block.decay_steps
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup} + optimizer.decay_steps {decay} do not fit into "
            f"train.steps {steps}; shorten them or train longer"
        )
    peak = block.learning_rate
    if block.decay not in ("cosine", "linear"):
        raise ValueError(f"optimizer.decay: found {block.decay!r}, expected 'cosine' or 'linear'")
    pieces = [optax.constant_schedule(peak)]
    boundaries = []
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        pieces, boundaries = [rise, *pieces], [warmup]
    if decay:
        fall = (
            optax.cosine_decay_schedule(peak, decay, alpha=block.final_ratio)
            if block.decay == "cosine"
            else optax.linear_schedule(peak, peak * block.final_ratio, decay)
        )
        pieces, boundaries = [*pieces, fall], [*boundaries, steps - decay]
    return optax.join_schedules(pieces, boundaries)


def split_frozen(spec: ModelSpec, params: nnx.State, stage: str) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen) parameters of a stage, by `spec.frozen(path, stage)`."""
    return nnx.split_state(params, lambda path, _: not spec.frozen(path, stage), ...)


def decay_mask(trainable: nnx.State, everything: bool = False) -> nnx.State:
    """True for matrices and higher ranks, False for norms, biases, sinks and scales unless `everything` decays.

    The rank leaves out the axis along which repeated layers are stacked (logical axis "layers").
    """

    def decays(path, variable):
        if everything:
            return True
        axes = variable_axes(variable) or ()
        rank = variable.get_value().ndim - sum(axis == STACK_AXIS for axis in axes)
        return rank >= 2 and path_names(path)[-1] not in NO_DECAY_NAMES

    mask = jax.tree_util.tree_map_with_path(
        decays, trainable, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return nnx.as_pure(mask)


def optimizer_kinds(trainable: nnx.State) -> nnx.State:
    """Of each weight "muon", where it declares itself a matrix, or "adamw"."""
    declared = matrices_of(trainable)

    def kind(path, _):
        return "muon" if path_names(path) in declared else "adamw"

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return nnx.as_pure(jax.tree_util.tree_map_with_path(kind, trainable, is_leaf=is_variable))


def make_optimizer(
    spec: ModelSpec, params: nnx.State, block: Any, steps: int, stage: str
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon for matrices and AdamW for the rest, over pure states of the
    trainable parameters.

    Args:
      params: (abstract) nnx.State of all Params; only used to decide which weights decay, and which are matrices.
      block: the recipe's optimizer block. steps: updates in the run. stage: given to `spec.frozen`.

    Raises:
      ValueError: for an unknown optimizer name, a schedule that does not fit, nothing left to train, or Muon for
        no matrix.
    """
    if block.name not in ("adamw", "muon"):
        raise ValueError(f"optimizer.name: found {block.name!r}, expected 'adamw' or 'muon'")
    trainable, _ = split_frozen(spec, params, stage)
    if not jax.tree.leaves(trainable):
        raise ValueError(f"model {spec.name!r} has no trainable parameter in stage {stage!r}")
    if block.name == "muon" and "muon" not in jax.tree.leaves(optimizer_kinds(trainable)):
        raise ValueError(
            f"optimizer.name is 'muon', but of what {spec.name!r} trains in stage {stage!r} no weight declares "
            "itself a matrix (fathom.layers.param.Matrix); use 'adamw'"
        )
    return optax.chain(
        _clip(spec, trainable, block.clip_norm),
        _scale_by_moments(trainable, block),
        optax.add_decayed_weights(block.weight_decay, mask=decay_mask(trainable, block.decay_all)),
        optax.scale_by_learning_rate(make_schedule(block, steps)),
    )


def _scale_by_moments(params: nnx.State, block: Any) -> optax.GradientTransformation:
    adam = stored_moments(optax.scale_by_adam(b1=block.b1, b2=block.b2, eps=block.eps), "mu", block.momentum_dtype)
    if block.name == "adamw":
        return adam
    return optax.partition({"muon": scale_by_hybrid_muon(params, block), "adamw": adam}, optimizer_kinds(params))


def _clip(spec: ModelSpec, trainable: nnx.State, norm: float | None) -> optax.GradientTransformation:
    """Clipping by global norm, of the indexers by themselves: their own loss must not shorten the others' steps."""
    if not norm:
        return optax.identity()

    def of_indexer(path, _):
        names = path_names(path)
        return spec.frozen(tuple(names), "dense") and not spec.frozen(tuple(names), "indexer-warmup")

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    mine = nnx.as_pure(jax.tree_util.tree_map_with_path(of_indexer, trainable, is_leaf=is_variable))
    others = jax.tree.map(lambda flag: not flag, mine)
    clip = optax.clip_by_global_norm(norm)
    return optax.chain(optax.masked(clip, mine), optax.masked(clip, others))


def init_optimizer(
    tx: optax.GradientTransformation, spec: ModelSpec, params: nnx.State, stage: str
) -> Any:
    """Optimizer state for the trainable ones of `params`, moments in float32."""
    trainable, _ = split_frozen(spec, params, stage)
    return tx.init(as_float32(nnx.as_pure(trainable)))


def with_held(own: Any, spec: ModelSpec, params: nnx.State, stage: str, block: Any) -> dict[str, Any]:
    """The optimizer state `own` of a stage, and beside it moments of what only other stages train.

    They are those of parameters that the stage "sparse" trains and this one does not; `beside_held` leaves them be.
    """
    _, frozen = split_frozen(spec, params, stage)
    held, _ = split_frozen(spec, frozen, "sparse")
    moments = _scale_by_moments(held, block).init(as_float32(nnx.as_pure(held)))
    return {OWN: own, HELD: {MOMENTS: moments}}


def beside_held(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on a state that holds its own beside others' (`with_held`)."""

    def update(updates, state, params=None):
        updates, own = tx.update(updates, state[OWN], params)
        return updates, {**state, OWN: own}

    return optax.GradientTransformation(tx.init, update)


def carry_moments(old: Any, fresh: Any) -> Any:
    """`fresh`, the optimizer state with which a stage begins, with all that `old`, the stage's before, has of it.

    Leaves are found by name, wherever they are held. A count of updates goes on, but that of moments all of which
    begin at zero begins there too: they are told from others by it.
    """
    have = {}
    for name, leaf in sorted(named_leaves(old).items(), key=lambda item: item[0].startswith(f"{HELD}/")):
        have[_general(name)] = leaf  # those held last: they count for more parameters, and for longer
    names = named_leaves(fresh)

    def begins(name: str) -> bool:
        group, _, last = name.rpartition("/")
        moments = [other for other in names if other.startswith(f"{group}/") and other != name]
        return last == "count" and bool(moments) and not any(_general(other) in have for other in moments)

    leaves, used = [], set()
    for name, leaf in names.items():
        if not begins(name) and _general(name) in have:
            leaf = have[_general(name)]
            leaf = jnp.copy(leaf) if _general(name) in used else leaf  # a step gives each array up once
            used.add(_general(name))
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _general(name: str) -> str:
    """A leaf's name wherever it is held."""
    return name.removeprefix(f"{OWN}/").removeprefix(f"{HELD}/")


def as_float32(tree: Any) -> Any:
    """Every leaf in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def updates_done(opt_state: Any) -> jax.Array:
    """int32 scalar: updates applied so far, the schedule's argument (skipped steps do not count)."""

    def of_schedule(path, _):
        return any(getattr(key, "tuple_name", None) == "ScaleByScheduleState" for key in path)

    return optax.tree.get(opt_state, "count", filtering=of_schedule)
