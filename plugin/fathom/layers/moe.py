"""Mixture of experts: routed experts without token dropping, a shared expert, expert parallelism.

Letters: B batch, S sequence, D hidden, E experts, F expert hidden, K experts per token; inside a
shard T tokens, A = T * K assignments of a token to an expert.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fathom.layers.balance_loss import sequence_balance_loss
from fathom.layers.expert_rows import (
    ExpertOptions,
    block_rows,
    pull_experts_in_blocks,
    sum_experts,
    sum_experts_in_blocks,
    swiglu,
)
from fathom.layers.linear import Linear
from fathom.layers.param import MATRIX, normal, param
from fathom.layers.router import (
    HashRouter,
    LearnedRouter,
    expert_load,
)
from fathom.mesh import active_rules, check_divisible, constrain, split_axes, vary
from fathom.ops.token_chunks import chunk_length, in_token_chunks

_IN_AXES = ("expert", "expert_embed", "expert_mlp")
_OUT_AXES = ("expert", "expert_mlp", "expert_embed")
ROWS_BYTES = 1 << 30
"""What the tokens of a chunk may take, with their sums and as many rows as one device's experts expect. A device that
exchanges V4-Flash's tokens with 15 others in bfloat16 holds 0.7 MiB for each of its own; one that holds all experts
48 KiB."""


class SharedExpert(nnx.Module):
    """The SwiGLU that every token passes through.

    Attributes:
      w1 (gate), w3 (up): [D, F]. w2 (down): [F, D].
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        intermediate_size: int,
        limit: float | None,
        init_std: float,
        param_dtype: str = "float32",
    ):
        self.limit = limit
        common = dict(stddev=init_std, dtype=param_dtype)
        inner, outer = (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        self.w1 = Linear(rngs, inner, ("embed", "mlp"), **common)
        self.w3 = Linear(rngs, inner, ("embed", "mlp"), **common)
        self.w2 = Linear(rngs, outer, ("mlp", "embed"), **common)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """[B, S, D] -> float32 [B, S, D]; products in x's dtype, activation in float32."""
        gate = self.w1.contract("bsd,df->bsf", x_BSD, jnp.float32)
        up = self.w3.contract("bsd,df->bsf", x_BSD, jnp.float32)
        hidden = swiglu(gate, up, self.limit).astype(x_BSD.dtype)
        hidden = constrain(hidden, ("act_batch", "act_sequence", "act_mlp"))
        return self.w2.contract("bsf,fd->bsd", hidden, jnp.float32)


class Experts(nnx.Module):
    """The routed experts, dropless: every token reaches every expert it was routed to.

    Under a `sharding_scope` the computation is one `jax.shard_map` over the whole mesh. Along mesh
    axes that split both the tokens and the experts the tokens are gathered, each shard computes its
    own experts for all of them (`layers/expert_rows.py`), and the sums are scattered back: exact,
    with static shapes, and a chunk of tokens at a time (`ROWS_BYTES`). Weights enter whole in D.

    Attributes:
      w1 (gate), w3 (up): [E, D, F]. w2 (down): [E, F, D].
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        limit: float | None,
        init_std: float,
        param_dtype: str = "float32",
        implementation: str = "auto",
    ):
        self.limit, self.implementation = limit, implementation
        inner = (num_experts, hidden_size, intermediate_size)
        outer = (num_experts, intermediate_size, hidden_size)

        def weight(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Variable:
            return param(rngs.params(), shape, normal(init_std), axes=axes, dtype=param_dtype, matrix=MATRIX)

        self.w1, self.w3 = weight(inner, _IN_AXES), weight(inner, _IN_AXES)
        self.w2 = weight(outer, _OUT_AXES)

    def __call__(
        self, x_BSD: jax.Array, indices_BSK: jax.Array, weights_BSK: jax.Array
    ) -> jax.Array:
        """The weighted sum of each token's experts.

        Args:
          x_BSD: tokens; the products run in this dtype.
          indices_BSK: int32 expert ids. weights_BSK: float32, applied before w2.

        Returns:
          float32 [B, S, D].
        """
        compute = functools.partial(_expert_shard, options=ExpertOptions(self.limit, self.implementation))
        w1, w3, w2 = (
            # Constrained after the cast: what is gathered over fsdp is in the compute dtype.
            constrain(weight[...].astype(x_BSD.dtype), axes)
            for weight, axes in ((self.w1, _IN_AXES), (self.w3, _IN_AXES), (self.w2, _OUT_AXES))
        )
        if active_rules() is None or jax.sharding.get_abstract_mesh().empty:
            return compute(x_BSD, indices_BSK, weights_BSK, w1, w3, w2)
        experts, width = split_axes("expert"), split_axes("expert_mlp")
        batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
        tokens = PartitionSpec(batch or None, sequence or None)
        inner = PartitionSpec(experts or None, None, width or None)
        outer = PartitionSpec(experts or None, width or None)
        exchange = _Exchange((*batch, *sequence), experts, width)
        sharded = jax.shard_map(
            functools.partial(compute, exchange=exchange),
            in_specs=(tokens, tokens, tokens, inner, inner, outer),
            out_specs=tokens,
        )
        return sharded(x_BSD, indices_BSK, weights_BSK, w1, w3, w2)


class _Exchange(NamedTuple):
    """The mesh axes, larger than 1, of one expert computation."""

    tokens: tuple[str, ...] = ()  # split the tokens
    experts: tuple[str, ...] = ()  # split the experts
    width: tuple[str, ...] = ()  # split each expert's hidden dimension

    @property
    def all(self) -> tuple[str, ...]:
        """Every axis, each once."""
        return (*self.experts, *self.width, *self.unsplit_weights)

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes along which shards hold different tokens and different weights."""
        return tuple(axis for axis in (*self.experts, *self.width) if axis in self.tokens)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes along which shards hold the same tokens and different weights."""
        return tuple(axis for axis in (*self.experts, *self.width) if axis not in self.tokens)

    @property
    def unsplit_weights(self) -> tuple[str, ...]:
        """Axes along which shards hold different tokens and the same weights."""
        return tuple(axis for axis in self.tokens if axis not in (*self.experts, *self.width))


_NO_EXCHANGE = _Exchange()


def _expert_shard(
    x_BSD: jax.Array,
    indices_BSK: jax.Array,
    weights_BSK: jax.Array,
    w1_EDF: jax.Array,
    w3_EDF: jax.Array,
    w2_EFD: jax.Array,
    *,
    options: ExpertOptions,
    exchange: _Exchange = _NO_EXCHANGE,
) -> jax.Array:
    """One shard's experts, for its tokens and for those of the shards it exchanges tokens with."""
    x_TD, weights_TK, indices_TK = (x.reshape(-1, x.shape[-1]) for x in (x_BSD, weights_BSK, indices_BSK))
    shards = jax.lax.axis_size(exchange.experts) if exchange.experts else 1
    chunk = _tokens_of_a_chunk(x_TD, indices_TK.shape[1], exchange, shards)
    options = options._replace(shards=shards, varying=exchange.all)
    y_TD = in_token_chunks(
        functools.partial(_exchanged_experts, exchange, options),
        chunk,
        # Everything is typed as varying over all axes in play. The transposes of these casts sum the gradients of what
        # is replicated: a token's over `summed`, a weight's over the token axes.
        tuple(vary(w, exchange.unsplit_weights) for w in (w1_EDF, w3_EDF, w2_EFD)),
        (x_TD, weights_TK),
        (indices_TK,),
        varying=exchange.all,
        pull=functools.partial(_pull_exchanged_experts, exchange, options) if exchange.experts else None,
    )
    return y_TD.reshape(x_BSD.shape)


def _tokens_of_a_chunk(x_TD: jax.Array, top_k: int, exchange: _Exchange, shards: int) -> int:
    """How many of its own tokens a shard exchanges at a time: `ROWS_BYTES`."""
    gathered = jax.lax.axis_size(exchange.gathered) if exchange.gathered else 1
    itemsize = x_TD.dtype.itemsize
    row = block_rows(1024 * top_k, shards) / 1024 * itemsize
    if exchange.experts:
        row += itemsize + 8  # the token itself, and float32 sums: its output's, or its gradient's beside that of those
    return chunk_length(x_TD.shape[0], int(ROWS_BYTES / (gathered * x_TD.shape[1] * row)))


def _gathered(exchange: _Exchange, array: jax.Array) -> jax.Array:
    """The tokens of all shards that hold other experts."""
    if exchange.gathered:
        array = jax.lax.all_gather(array, exchange.gathered, axis=0, tiled=True)
    return vary(array, exchange.summed)


def _own_ids(exchange: _Exchange, indices_CK: jax.Array, held: int) -> jax.Array:
    """Expert ids of all shards' tokens, counted from the first that this one holds."""
    first = jax.lax.axis_index(exchange.experts) * held if exchange.experts else 0
    indices = _gathered(exchange, indices_CK)
    return jnp.where(indices < 0, held, indices - first)  # below 0: tokens that fill a chunk up


def _exchanged_experts(exchange, options, matrices, x_CD, weights_CK, indices_CK) -> jax.Array:
    """[C, D]: a shard's tokens, each through its experts wherever they are held."""
    x, weights = _gathered(exchange, x_CD), _gathered(exchange, weights_CK)
    indices = _own_ids(exchange, indices_CK, matrices[0].shape[0])
    if exchange.experts:
        y = sum_experts_in_blocks(x, indices, weights, matrices, options)
    else:
        y = sum_experts(x, indices, weights, matrices, options)
    if exchange.gathered:
        y = jax.lax.psum_scatter(y, exchange.gathered, scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, exchange.summed) if exchange.summed else y


def _pull_exchanged_experts(exchange, options, total, matrices, floats, integers, dy_CD):
    """The gradients of `_exchanged_experts` where experts are split: those of the matrices are added to `total`."""
    (x, weights), back = jax.vjp(lambda *tokens: tuple(_gathered(exchange, array) for array in tokens), *floats)
    indices = _own_ids(exchange, *integers, matrices[0].shape[0])
    dy = _gathered(exchange, dy_CD)  # the transpose of the sum that is scattered
    total, dx, dweights = pull_experts_in_blocks(total, x, indices, weights, matrices, dy, options)
    return total, back((dx.astype(x.dtype), dweights.astype(weights.dtype)))


class MoEStats(NamedTuple):
    """What the training loop reads off a layer.

    Attributes:
      load: float32 [E], valid tokens per expert.
      balance: float32 scalar, the balance loss summed over valid tokens; None for a hash router.
      indices: int32 [B, S, K], the experts that a learned router sent each token to; None for a hash router.
    """

    load: jax.Array
    balance: jax.Array | None
    indices: jax.Array | None


class MoE(nnx.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, router: LearnedRouter | HashRouter, experts: Experts, shared: SharedExpert):
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        indices_BSK: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """[B, S, D] -> ([B, S, D] in x's dtype, statistics).

        Args:
          x_BSD: normalised hidden states. tokens_BS: input ids, read by a hash router.
          segment_ids_BS: int32 documents; 0 is padding, which the statistics leave out. None makes
            each row one document.
          indices_BSK: int32, the experts to use in place of those that a learned router would select.

        Raises:
          ValueError: when the mesh does not divide the batch, the sequence, the number of experts
            or their width; for indices given to a hash router.
        """
        num_experts, _, width = self.experts.w1.shape
        check_divisible(
            ("batch size", x_BSD.shape[0], "act_batch"),
            ("sequence length", x_BSD.shape[1], "act_sequence"),
            ("number of experts", num_experts, "expert"),
            ("expert width", width, "expert_mlp"),
        )
        learned = isinstance(self.router, LearnedRouter)
        if learned:
            routing = self.router(x_BSD, tokens_BS, indices_BSK)
        elif indices_BSK is not None:
            raise ValueError("indices were given to a hash router, whose table has them; leave its block out")
        else:
            routing = self.router(x_BSD, tokens_BS)
        routed = self.experts(x_BSD, routing.indices_BSK, routing.weights_BSK)
        y_BSD = (routed + self.shared(x_BSD)).astype(x_BSD.dtype)
        y_BSD = checkpoint_name(constrain(y_BSD, ("act_batch", "act_sequence", "act_embed")), "experts")
        valid = None if segment_ids_BS is None else segment_ids_BS > 0
        load = expert_load(routing.indices_BSK, valid, routing.scores_BSE.shape[-1])
        if not learned:
            return y_BSD, MoEStats(load, None, None)
        return y_BSD, MoEStats(load, sequence_balance_loss(routing, segment_ids_BS), routing.indices_BSK)
