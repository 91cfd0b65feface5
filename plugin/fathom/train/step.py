"""The train step: loss and gradients over microbatches, one guarded update, metrics.

`make_program` needs no devices: with an AbstractMesh or a mesh of a TPU topology it gives the same
program, for lowering and memory analysis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.options import ComputeOptions
from fathom.mesh import LEVEL_FLAG, Rules, batch_sharding, sharding_scope
from fathom.recipe import Recipe
from fathom.train import optimizer
from fathom.train.state import (
    SplitModel,
    TrainState,
    abstract_state,
    global_norm,
    init_variables,
    seed_to_rng,
    shardings_of,
    split_model,
    state_bytes,
)
from fathom.zoo import ModelSpec

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled-to-be functions of a run and the layout of their arguments.

    Call `init` and `step` inside `sharding_scope(mesh, rules)`.

    Attributes:
      spec: the model, at the recipe's size. options: how it computes.
      mesh, rules: where it runs.
      model: the model split into its static part and abstract arrays.
      state: abstract TrainState that carries shardings.
      batch_sharding: layout of every [B, S] array of a batch. batch_names: which arrays there are.
      init: uint32 key data -> TrainState, born sharded.
      start: (params, model_state, uint32 key data) -> TrainState with a fresh optimizer.
      step: (TrainState, donated; batch) -> (TrainState, metrics).
      evaluate: (TrainState, batch) -> metrics that begin with "loss".
      route: (TrainState, batch) -> what a batch takes as "routing" (`ModelSpec.route`); None where the model has none.
    """

    spec: ModelSpec
    options: ComputeOptions
    mesh: Mesh | AbstractMesh
    rules: Rules
    model: SplitModel
    state: TrainState
    batch_sharding: NamedSharding
    batch_names: tuple[str, ...]
    init: Callable[[jax.Array], TrainState]
    start: Callable[..., TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Batch], Metrics]
    route: Callable[[TrainState, Batch], dict[str, jax.Array]] | None

    def abstract_batch(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """The batch the step takes, as ShapeDtypeStructs with shardings."""
        struct = jax.ShapeDtypeStruct(
            (batch_size, sequence_length), jnp.int32, sharding=self.batch_sharding
        )
        return {name: struct for name in self.batch_names}

    def lower(self, batch_size: int, sequence_length: int, platforms: tuple[str, ...] | None = None):
        """Lowers the real step for `mesh`, without devices if it has none."""
        with sharding_scope(self.mesh, self.rules):
            traced = self.step.trace(self.state, self.abstract_batch(batch_size, sequence_length))
            return traced.lower(lowering_platforms=platforms) if platforms else traced.lower()


def make_program(recipe: Recipe, mesh: Mesh | AbstractMesh) -> Program:
    """Everything that runs on the devices, from a recipe.

    Args:
      recipe: its model, optimizer, mesh and train blocks are read.
      mesh: real, abstract, or of a topology that is not attached.

    Raises:
      ValueError: when model, sharding preset, schedule and mesh do not fit together (`Recipe.check`
        says more).
    """
    spec, options = recipe.model_spec(), recipe.compute_options()
    rules = spec.preset(recipe.mesh.preset)
    block, train = recipe.optimizer, recipe.train
    with sharding_scope(mesh, rules):
        model = split_model(spec, options)
        tx = optimizer.make_optimizer(spec, model.params, block, train.steps, train.parameter_stage)
        if train.hold_moments:
            tx = optimizer.beside_held(tx)

        def init_tx(params):
            own = optimizer.init_optimizer(tx, spec, params, train.parameter_stage)
            if not train.hold_moments:
                return own
            return optimizer.with_held(own, spec, params, train.parameter_stage, block)

        state = abstract_state(spec, model, init_tx, mesh, rules)

    def init(rng):
        return start(*init_variables(spec, options, rng), rng)

    def start(params, model_state, rng):
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, model_state, init_tx(params), step, rng)

    schedule = optimizer.make_schedule(block, train.steps)
    shardings = shardings_of(state)
    weights_of = weights_by_update(train, block.decay_steps)
    train_step = make_train_step(spec, model, tx, schedule, weights_of, train, shardings)
    return Program(
        spec=spec,
        options=options,
        mesh=mesh,
        rules=rules,
        model=model,
        state=state,
        batch_sharding=batch_sharding(mesh, rules),
        batch_names=recipe.data.batch_names,
        init=jax.jit(init, out_shardings=shardings, compiler_options=_once_options(mesh, state)),
        start=jax.jit(start, out_shardings=shardings, donate_argnums=(0, 1)),
        step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        evaluate=jax.jit(_make_evaluate(spec, model, weights_of, train.accumulation)),
        route=None if spec.route is None else jax.jit(_make_route(spec, model, train.accumulation)),
    )


def _once_options(mesh: Mesh | AbstractMesh, state: TrainState) -> dict[str, Any] | None:
    """Compiler options of the program that makes a state: a small one on a CPU takes longer to compile than to run."""
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return {LEVEL_FLAG: 0} if on_cpu and state_bytes(state) < 1 << 30 else None


WeightsOf = Callable[[Any], LossWeights]


def weights_by_update(train: Any, decay_steps: int) -> WeightsOf:
    """Optimizer state -> the weights of the next update's losses, by the recipe's train block.

    The MTP loss has its final weight, where there is one, from the first update of the learning rate's decay on.

    Args:
      decay_steps: updates of the decay, at the end of the run.
    """
    weights = LossWeights(mtp=train.mtp_weight, balance=train.balance_weight, indexer=train.indexer_weight)

    def weights_of(opt_state: Any) -> LossWeights:
        if train.mtp_weight_final is None:
            return weights
        decays = optimizer.updates_done(opt_state) >= train.steps - decay_steps
        return weights._replace(mtp=jnp.where(decays, train.mtp_weight_final, weights.mtp).astype(jnp.float32))

    return weights_of


def make_train_step(
    spec: ModelSpec,
    model: SplitModel,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    weights_of: WeightsOf,
    train: Any,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step function, to be jitted with its first argument donated.

    A step whose loss or gradients are not finite changes nothing but the step number; its
    metric "finite" is False. Metrics are float32 scalars.

    Args:
      weights_of: see `weights_by_update`. train: the recipe's train block. shardings: layout of the state.
    """
    grad_shardings, _ = optimizer.split_frozen(spec, shardings.params, train.parameter_stage)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = optimizer.split_frozen(spec, state.params, train.parameter_stage)
        counts, weights = count_targets(batch), weights_of(state.opt_state)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss_fn(trainable, microbatch, index):
            module = model.merge(
                (trainable, frozen), state.model_state, jax.random.fold_in(key, index)
            )
            return spec.loss(module, microbatch, weights, counts)

        loss, aux, grads = accumulate(loss_fn, trainable, batch, train.accumulation, grad_shardings)
        new_trainable, opt_state = _update(tx, trainable, grads, state.opt_state)
        model_state = state.model_state
        if spec.update_state is not None and train.stage != "indexer-warmup":  # the routers are frozen too
            model_state = spec.update_state(model_state, aux, train.router_bias_speed)
        grad_norm = global_norm(grads)
        # Gradients whose norm is finite give a finite update. To look at the update itself would keep the old and the
        # new of all weights and moments side by side until the last of them is known.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new_state = TrainState(
            params=nnx.merge_state(new_trainable, frozen),
            model_state=model_state,
            opt_state=opt_state,
            step=state.step + 1,
            rng=state.rng,
        )
        kept = dataclasses.replace(state, step=new_state.step)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, kept)
        metrics = {
            "loss": loss,
            **{name: value for name, value in aux.items() if name.startswith("loss/")},
            "grad_norm": grad_norm,
            "learning_rate": schedule(optimizer.updates_done(state.opt_state)),
            "tokens": counts.valid_tokens,
            **_expert_balance(aux.get("expert_load", {})),
            "finite": finite,
        }
        return new_state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return train_step


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, dict[str, Any]]],
    trainable: nnx.State,
    batch: Batch,
    microbatches: int,
    grad_shardings: Any = None,
) -> tuple[jax.Array, dict[str, Any], nnx.State]:
    """Sums loss, aux and float32 gradients of `loss_fn(trainable, microbatch, index)` over
    microbatches.

    Microbatch i takes rows i, i + n, i + 2n, ...: each device keeps its own rows, nothing moves.

    Raises:
      ValueError: when the rows cannot be cut into that many microbatches.
    """

    def one(microbatch, index):
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, microbatch, index)
        grads = optimizer.as_float32(grads)
        if grad_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
        return loss, aux, grads

    if microbatches == 1:
        return one(batch, 0)
    rows = batch["tokens"].shape[0]
    if rows % microbatches:
        raise ValueError(
            f"data.batch_size {rows} is not divisible by train.accumulation {microbatches}"
        )

    def body(total, inputs):
        loss, aux, grads = one(*inputs)
        return jax.tree.map(jnp.add, total, grads), (loss, aux)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    inputs = (_microbatches(dict(batch), microbatches), jnp.arange(microbatches))
    grads, (losses, auxes) = jax.lax.scan(body, zeros, inputs)
    loss, aux = jax.tree.map(lambda x: x.sum(axis=0), (losses, auxes))
    return loss, aux, grads


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]: microbatch i has rows i, i + count, ..."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _update(tx, trainable, grads, opt_state):
    """The trainable parameters after one update, in their storage dtype, and the optimizer's state."""
    params = optimizer.as_float32(nnx.as_pure(trainable))
    updates, opt_state = tx.update(nnx.as_pure(grads), opt_state, params)
    values = iter(jax.tree.leaves(optax.apply_updates(params, updates)))
    new = jax.tree.map(lambda old: next(values).astype(old.dtype), trainable)
    return new, opt_state


def _expert_balance(expert_load: Mapping[str, jax.Array]) -> Metrics:
    """max/mean tokens per expert of each block (the worst of stacked layers), 1 is perfect balance."""
    ratios = {}
    for name, load in expert_load.items():
        load = load.astype(jnp.float32)
        ratio = load.max(axis=-1) / jnp.maximum(load.mean(axis=-1), 1e-9)
        ratios[f"expert_load/{name}"] = ratio.max()
    if ratios:
        ratios["expert_load/worst"] = jnp.stack(list(ratios.values())).max()
    return ratios


def _make_evaluate(spec: ModelSpec, model: SplitModel, weights_of: WeightsOf, microbatches: int):
    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        module = model.merge((state.params,), state.model_state, jax.random.wrap_key_data(state.rng))
        module.eval()
        weights, counts = weights_of(state.opt_state), count_targets(batch)

        def one(part: Batch) -> Metrics:
            loss, aux = spec.loss(module, part, weights, counts)
            return {"loss": loss, **{name: value for name, value in aux.items() if name.startswith("loss/")}}

        if microbatches == 1:
            return one(batch)
        # No more tokens at a time than the step itself takes.
        return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(one, _microbatches(dict(batch), microbatches)))

    return evaluate


def _make_route(spec: ModelSpec, model: SplitModel, microbatches: int):
    def route(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        module = model.merge((state.params,), state.model_state, jax.random.wrap_key_data(state.rng))
        module.eval()
        if microbatches == 1:
            return spec.route(module, batch)
        # No more tokens at a time than the step itself takes.
        routing = jax.lax.map(lambda part: spec.route(module, part), _microbatches(dict(batch), microbatches))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), routing)

    return route


def init_state(program: Program, seed: int) -> TrainState:
    """A fresh TrainState, laid out over the program's mesh."""
    with sharding_scope(program.mesh, program.rules):
        return program.init(make_rng(program, seed))


def make_rng(program: Program, seed: int) -> jax.Array:
    """TrainState.rng of a seed, on every device of the program's mesh."""
    replicated = NamedSharding(program.mesh, PartitionSpec())
    return jax.jit(lambda: seed_to_rng(seed), out_shardings=replicated)()
