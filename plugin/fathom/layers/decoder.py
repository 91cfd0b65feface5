"""What every decoder here is made of: embedding, head, and a planned run of blocks that is unrolled and scanned.

Letters: B batch, S sequence, D hidden, n streams, V vocab, E experts, K experts per token, R repeats of a scanned
block.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fathom.layers.documents import Documents
from fathom.layers.embedding import Embedding
from fathom.layers.options import ComputeOptions
from fathom.layers.param import normal, param
from fathom.layers.remat import remat, remat_unit
from fathom.mesh import constrain, variable_axes
from fathom.ops.precision import precision_of


class Output(NamedTuple):
    """Result of a forward pass.

    logits [B, S, V] float32; mtp_logits likewise, or None without MTP; aux: losses and statistics, see
    `Features.aux`; streams: after each layer [B, S, n, D], empty unless asked for.
    """

    logits: jax.Array
    mtp_logits: jax.Array | None
    aux: dict[str, Any]
    streams: tuple[jax.Array, ...]


class Features(NamedTuple):
    """Everything before the head, so that a loss can apply it in chunks.

    hidden [B, S, D]: final normalised states; mtp_hidden: one [B, S, D] per MTP stage; documents: the layout of
    the rows; aux: "balance" (float32, summed over valid tokens and learned layers), "indexer" (where options ask for
    it: the indexers' loss, summed over tokens and layers) and "expert_load" (block path -> float32 token counts
    [..., E]); with return_routing "routing": path of each block with a learned router -> int32 [B, S, K], of a scanned
    one [B, R, S, K], as `features` takes it.
    """

    hidden: jax.Array
    mtp_hidden: tuple[jax.Array, ...]
    documents: Documents
    aux: dict[str, Any]
    streams: tuple[jax.Array, ...]


class Head(nnx.Module):
    """Prediction head [D, V]."""

    def __init__(self, rngs: nnx.Rngs, hidden: int, vocab: int, *, stddev: float, dtype: str):
        self.weight = param(
            rngs.params(), (hidden, vocab), normal(stddev), axes=("embed", "vocab"), dtype=dtype
        )

    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        """float32 logits [B, S, V]."""
        # Cast first: what is gathered over the axes that shard its rows is in the compute dtype.
        kernel = constrain(self.weight[...].astype(hidden_BSD.dtype), ("act_embed", "vocab"))
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden_BSD,
            kernel,
            precision=precision_of(hidden_BSD),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits, ("act_batch", "act_sequence", "act_vocab"))


class Statistics:
    """What the blocks of one pass tell: token counts per block, and sums over all blocks.

    Args:
      sums: names of the scalars to add up. keep_routing: also keep which experts each token went to.
    """

    def __init__(self, *sums: str, keep_routing: bool = False):
        self.load: dict[str, jax.Array] = {}
        self.sums = dict.fromkeys(sums, jnp.zeros((), jnp.float32))
        self.routing: dict[str, jax.Array] | None = {} if keep_routing else None

    def record(self, name: str, stats: dict[str, jax.Array]) -> None:
        """Adds a block's {"load": [..., E], "indices": [..., B, S, K], other names: scalars or one per repeat}; a part
        may be missing."""
        if "load" in stats:
            self.load[name] = stats["load"]
        if self.routing is not None and stats.get("indices") is not None:
            indices = stats["indices"]
            self.routing[name] = jnp.moveaxis(indices, 0, 1) if indices.ndim == 4 else indices
        for part in self.sums:
            if part in stats:
                self.sums[part] = self.sums[part] + jnp.sum(stats[part])

    def aux(self) -> dict[str, Any]:
        """As `Features.aux` has them."""
        kept = {} if self.routing is None else {"routing": self.routing}
        return {**self.sums, "expert_load": self.load, **kept}


class Decoder(nnx.Module):
    """A planned run of blocks, and the call that makes logits; a subclass defines `features`.

    `prefix` and `suffix` blocks are unrolled; `repeated` holds one unit of blocks whose weights are stacked over the
    repeats and scanned (config.plan). A block maps (x, inputs) to (x, statistics).
    """

    def __init__(
        self,
        config: Any,
        rngs: nnx.Rngs,
        options: ComputeOptions,
        make_block: Callable[[nnx.Rngs, Any, ComputeOptions, int], nnx.Module],
    ):
        """`make_block` makes the block of a layer: (rngs, config, options, layer)."""
        self.config, self.options = config, options
        plan = config.plan
        common = dict(stddev=config.initializer_range, dtype=options.param_dtype)
        self.embed = Embedding(rngs, config.vocab_size, config.hidden_size, **common)

        def make(rngs: nnx.Rngs, layer: int) -> nnx.Module:
            return make_block(rngs, config, options, layer)

        self.prefix = nnx.List([make(rngs, layer) for layer in plan.prefix])
        units = range(plan.unit if plan.repeats else 0)
        self.repeated = nnx.List([stacked_block(rngs, make, len(plan.prefix) + u, plan.repeats) for u in units])
        self.suffix = nnx.List([make(rngs, layer) for layer in plan.suffix])

    def layer(self, index: int) -> nnx.Module:
        """The block of decoder layer `index`, wherever the plan keeps it; a scanned layer's weights are copied.

        Raises:
          IndexError: when there is no such layer.
        """
        plan = self.config.plan
        if not 0 <= index < self.config.num_layers:
            raise IndexError(f"layer {index}: the model has layers 0 to {self.config.num_layers - 1}")
        if index in plan.prefix:
            return self.prefix[index]
        if index in plan.suffix:
            return self.suffix[index - plan.suffix.start]
        repeat, unit = divmod(index - len(plan.prefix), plan.unit)
        graphdef, state = nnx.split(self.repeated[unit])
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[repeat], state))

    def run_block(
        self,
        block: nnx.Module,
        x: jax.Array,
        inputs: Any,
        routing: jax.Array | None = None,
        keep_routing: bool = False,
    ) -> tuple[jax.Array, dict]:
        """One block under the options' policy of activation checkpointing.

        Args:
          routing: int32 [B, S, K], the experts to use in place of the router's choice. keep_routing: whether
            "indices" stays among the statistics.
        """
        graphdef, state = nnx.split(block)
        if self.options.stage != "indexer-warmup":  # there almost everything is frozen, and has no gradient to settle
            state, x = _settle_gradients(state, x)

        def run(state, x, inputs, routing):
            x, stats = nnx.merge(graphdef, _cast_late(state, x.dtype))(x, inputs, routing)
            return x, {name: value for name, value in stats.items() if keep_routing or name != "indices"}

        return remat(run, self.options.remat)(state, x, inputs, routing)

    def run_layers(
        self,
        x: jax.Array,
        inputs: Any,
        statistics: Statistics,
        keep: bool,
        routing: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """What all layers make of x, and with `keep` what each makes of it, in order; `routing` as in `features`."""
        kept, routing, told = [], self._known(routing or {}), statistics.routing is not None
        for i, block in enumerate(self.prefix):
            x, stats = self.run_block(block, x, inputs, routing.get(f"prefix/{i}"), told)
            statistics.record(f"prefix/{i}", stats)
            kept.append(x)
        if len(self.repeated):
            x, (unit_stats, unit_kept) = self._scan(x, inputs, keep, routing, told)
            for u, stats in enumerate(unit_stats):
                statistics.record(f"repeated/{u}", stats)
            if keep:
                kept += [states[r] for r in range(self.config.plan.repeats) for states in unit_kept]
        for i, block in enumerate(self.suffix):
            x, stats = self.run_block(block, x, inputs, routing.get(f"suffix/{i}"), told)
            statistics.record(f"suffix/{i}", stats)
            kept.append(x)
        return x, tuple(kept) if keep else ()

    def _known(self, routing: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """`routing`, once each of its names is that of a block; ValueError when one is not."""
        parts = {"prefix": self.prefix, "repeated": self.repeated, "suffix": self.suffix}
        names = {f"{part}/{i}" for part, blocks in parts.items() for i in range(len(blocks))}
        names |= {f"mtp/{i}/block" for i in range(self.config.num_mtp_layers)}
        if not routing.keys() <= names:
            unknown = sorted(routing.keys() - names)
            raise ValueError(f"routing is given for {unknown}, expected some of the blocks {sorted(names)}")
        return routing

    def _scan(self, x: jax.Array, inputs: Any, keep: bool, routing: Mapping[str, jax.Array], told: bool):
        """The repeated run: one scan step applies every block of the unit."""
        graphdef, state = nnx.split(self.repeated)
        given = [routing.get(f"repeated/{u}") for u in range(len(self.repeated))]
        given = [None if indices is None else jnp.moveaxis(indices, 1, 0) for indices in given]

        def step(x, layer):
            layer_state, experts = layer
            stats, kept = [], []
            tied = _tie(inputs, layer_state)
            for block, indices in zip(nnx.merge(graphdef, layer_state), experts, strict=True):
                x, block_stats = self.run_block(block, x, tied, indices, told)
                stats.append(block_stats)
                kept.append(x if keep else None)
            return x, (stats, kept)

        return jax.lax.scan(remat_unit(step, self.options.remat), x, (state, given))

    @abc.abstractmethod
    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        return_streams: bool = False,
        routing: Mapping[str, jax.Array] | None = None,
        return_routing: bool = False,
    ) -> Features:
        """Runs everything but the heads; arguments as in `__call__`.

        Args:
          routing: block path -> int32 [B, S, K], of a scanned block [B, R, S, K]: experts to use in place of those that
            its learned router would select; their weights are the router's. A block that is missing selects by itself.
          return_routing: whether aux has "routing", the experts that were used.
        """

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        return_streams: bool = False,
    ) -> Output:
        """Logits of every position.

        Args:
          tokens: int [B, S] in [0, vocab_size).
          positions: int [B, S], restarting at 0 with each document.
          segment_ids: int [B, S], documents counted from 1, 0 for padding. Without both, a row is one document.
          return_streams: also return the hidden states after each layer, [B, S, n, D].

        Raises:
          ValueError: for ids outside the vocabulary (checked whenever the values are known), shapes that differ.
        """
        check_tokens(tokens, self.config.vocab_size)
        features = self.features(jnp.asarray(tokens), positions, segment_ids, return_streams=return_streams)
        mtp = self.head(features.mtp_hidden[0]) if features.mtp_hidden else None
        return Output(self.head(features.hidden), mtp, features.aux, features.streams)


def _tie(inputs: Any, layer_state: nnx.State) -> Any:
    """`inputs`, the integers of it as if they depended on the weights, which change from layer to layer.

    jax computes before a differentiated scan, and keeps, all that depends on `inputs` alone: masks of size queries x
    entries. Only integers, for to hold numbers apart from what is made of them would change how they round; and the
    smallest weight, which no mesh splits.
    """
    leaves, structure = jax.tree.flatten(inputs)
    whole = [i for i, leaf in enumerate(leaves) if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
    weight = jax.lax.stop_gradient(min(jax.tree.leaves(layer_state), key=jnp.size))
    _, *tied = jax.lax.optimization_barrier((weight, *(leaves[i] for i in whole)))
    for i, leaf in zip(whole, tied, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)


def _cast_late(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """A layer's weights, those that its products cast to `dtype` times a 1 that seems to differ from layer to layer.

    XLA casts the weights of all layers before a scan over them, and keeps them, in half the bytes, to its end; barriers
    do not stop it.
    """
    leaves, structure = jax.tree.flatten(state)
    cast = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32 and leaf.ndim > 1]
    if dtype == jnp.float32 or not cast:
        return state
    weight = jax.lax.stop_gradient(min(leaves, key=jnp.size))
    one, _ = jax.lax.optimization_barrier((jnp.ones((), jnp.float32), weight))
    for i in cast:
        leaves[i] = leaves[i] * one
    return structure.unflatten(leaves)


def _settle_gradients(state: nnx.State, x: jax.Array) -> tuple[nnx.State, jax.Array]:
    """(state, x), of which no gradient is passed on before all are there, each weight's laid out as the weight is.

    A device's gradients of its experts are as large as the experts whole. The compiler would go on to the block before
    and add them up over devices some time later: as many times the memory as blocks are unrolled.
    """
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    leaves, structure = jax.tree.flatten(state)
    chosen = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    axes = []
    for i in chosen:
        own = variable_axes(variables[i]) or (None,) * leaves[i].ndim
        axes.append(tuple(own[len(own) - leaves[i].ndim :]))  # a scan has taken the axis of the layers off
    *settled, x = _settled(tuple(axes), *(leaves[i] for i in chosen), x)
    for i, leaf in zip(chosen, settled, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _settled(axes: tuple[tuple[str | None, ...], ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


def _settled_backward(axes, _, gradients):
    *weights, dx = gradients
    laid_out = [constrain(dw, names) for dw, names in zip(weights, axes, strict=True)]
    return tuple(jax.lax.optimization_barrier((*laid_out, dx)))


_settled.defvjp(lambda axes, *arrays: (arrays, None), _settled_backward)


def check_tokens(tokens: jax.Array, vocab_size: int) -> None:
    """Refuses ids outside the vocabulary wherever the values are known; ValueError names the first."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tokens.shape}, expected [batch, sequence]")
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    bad = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"token id {ids[row, column]} at row {row}, position {column} is outside the vocabulary "
            f"[0, {vocab_size}); {len(bad)} such ids in all"
        )


def stacked_block(
    rngs: nnx.Rngs, make_block: Callable[[nnx.Rngs, int], nnx.Module], layer: int, repeats: int
) -> nnx.Module:
    """`repeats` copies of a layer's block with different weights, stacked on a leading "layers" axis."""
    keys = jax.random.split(rngs.params(), repeats)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_block(nnx.Rngs(params=0), layer)))

    def weights(key: jax.Array) -> nnx.State:
        return nnx.state(make_block(nnx.Rngs(params=key), layer))

    block = nnx.merge(graphdef, jax.vmap(weights)(keys))
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable):
            axes = variable.get_metadata()["out_sharding"]
            variable.set_metadata(out_sharding=("layers", *axes))
    return block
