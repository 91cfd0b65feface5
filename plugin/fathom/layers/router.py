"""Which experts a token goes to, with what weight, and the statistics that keep experts balanced.

Scores are sqrt(softplus(x W)), or sigmoid(x W) in V3.2, in float32 from both operands on: a product in bfloat16 makes
ties and flips experts. Selection is either learned, by score plus a bias that only ever selects (in V3.2 within the
best groups of experts), or a fixed table from token id to experts.

Letters: B batch, S sequence, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from fathom.layers.param import MATRIX, HashTable, RouterBias, constant, normal, param
from fathom.mesh import constrain, split_axes


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      indices_BSK: int32 expert ids, distinct within a token.
      weights_BSK: float32, summing to the routed scale; they carry the gradient to the router.
      scores_BSE: float32, positive, without the selection bias.
    """

    indices_BSK: jax.Array
    weights_BSK: jax.Array
    scores_BSE: jax.Array


def sqrt_softplus(x: jax.Array) -> jax.Array:
    """sqrt(softplus(x)), exact in float32 and with a finite gradient for any finite x."""
    # Below -20 softplus(x) is exp(x) in float32. Where exp(x) underflows, the gradient of its root
    # would be 0 / 0.
    tail = x < -20.0
    low, high = jnp.where(tail, x, 0.0), jnp.where(tail, 0.0, x)
    return jnp.where(tail, jnp.exp(0.5 * low), jnp.sqrt(jax.nn.softplus(high)))


def router_scores(
    x_BSD: jax.Array, weight_DE: jax.Array, activation: Callable[[jax.Array], jax.Array] = sqrt_softplus
) -> jax.Array:
    """float32 [B, S, E]: activation(x W), both operands in float32 at the highest precision."""
    logits = jnp.einsum(
        "bsd,de->bse",
        x_BSD.astype(jnp.float32),
        weight_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return constrain(activation(logits), ("act_batch", "act_sequence", None))


def routing_from(scores_BSE: jax.Array, indices_BSK: jax.Array, scale: float) -> Routing:
    """The routing to the given experts: weights are their scores over their sum, times `scale`."""
    experts = jnp.arange(scores_BSE.shape[-1], dtype=indices_BSK.dtype)
    # One masked sum per choice: its gradient is a select, where a gather's is a scatter-add.
    chosen = [
        jnp.sum(jnp.where(indices_BSK[..., k, None] == experts, scores_BSE, 0.0), axis=-1)
        for k in range(indices_BSK.shape[-1])
    ]
    weights = jnp.stack(chosen, axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) * scale
    return Routing(indices_BSK, weights, scores_BSE)


class LearnedRouter(nnx.Module):
    """Selects the top_k of scores + bias; ties go to the lowest expert id.

    Attributes:
      weight: [D, E].
      bias: RouterBias float32 [E], starts at 0; it selects, never weighs, and has no gradient.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scale: float,
        init_std: float,
        param_dtype: str = "float32",
    ):
        _check_top_k(top_k, num_experts)
        self.top_k, self.scale = top_k, scale
        self.weight = _router_weight(rngs, hidden_size, num_experts, init_std, param_dtype)
        self.bias = param(
            rngs.params(),
            (num_experts,),
            constant(0.0),
            axes=("router_experts",),
            dtype="float32",
            kind=RouterBias,
        )

    def __call__(self, x_BSD: jax.Array, tokens_BS: jax.Array, indices_BSK: jax.Array | None = None) -> Routing:
        """[B, S, D] -> Routing; `tokens_BS` is not used. Given indices are taken as they are, and weighed."""
        del tokens_BS
        scores = self.scores(x_BSD)
        if indices_BSK is None:
            indices = self.select(jax.lax.stop_gradient(scores + self.bias[...]))
        else:
            indices = constrain(indices_BSK, ("act_batch", "act_sequence", None))
        return routing_from(scores, indices, self.scale)

    def scores(self, x_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, E]."""
        return router_scores(x_BSD, self.weight[...])

    def select(self, values_BSE: jax.Array) -> jax.Array:
        """int32 [B, S, K]: the experts that scores + bias choose."""
        return _top_k(values_BSE, self.top_k)


class GroupLimitedRouter(LearnedRouter):
    """V3.2's: sigmoid scores; experts come from the groups whose two best scores + bias have the largest sums.

    Attributes: as `LearnedRouter`; experts [g * E / groups, (g + 1) * E / groups) are group g.
    """

    def __init__(self, rngs: nnx.Rngs, *, num_groups: int, groups_per_token: int, **common):
        super().__init__(rngs, **common)
        num_experts, top_k = common["num_experts"], common["top_k"]
        size = num_experts // num_groups
        if num_experts % num_groups or size < 2 or not top_k <= groups_per_token * size <= num_experts:
            raise ValueError(
                f"{num_experts} experts in {num_groups} groups, {groups_per_token} of them for {top_k} experts per "
                "token: expected equal groups of at least two experts, and enough of them chosen to hold the token's"
            )
        self.num_groups, self.groups_per_token = num_groups, groups_per_token

    def scores(self, x_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, E]."""
        return router_scores(x_BSD, self.weight[...], jax.nn.sigmoid)

    def select(self, values_BSE: jax.Array) -> jax.Array:
        """int32 [B, S, K]: the experts that scores + bias choose within the best groups."""
        return _on_own_tokens(self._select, values_BSE)

    def _select(self, values_BSE: jax.Array) -> jax.Array:
        groups = values_BSE.reshape(*values_BSE.shape[:-1], self.num_groups, -1)
        best = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        chosen = jax.lax.top_k(best, self.groups_per_token)[1]
        kept = jnp.any(chosen[..., None] == jnp.arange(self.num_groups), axis=-2)
        values = jnp.where(kept[..., None], groups, -jnp.inf).reshape(values_BSE.shape)
        return jax.lax.top_k(values, self.top_k)[1].astype(jnp.int32)


class HashRouter(nnx.Module):
    """Selects by a fixed table from token id to experts; the learned scores only weigh them.

    Attributes:
      weight: [D, E]. tid2eid: HashTable int32 [V, K], see `balanced_hash_table`.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scale: float,
        vocab_size: int,
        init_std: float,
        param_dtype: str = "float32",
    ):
        _check_top_k(top_k, num_experts)
        self.scale = scale
        self.weight = _router_weight(rngs, hidden_size, num_experts, init_std, param_dtype)
        self.tid2eid = param(
            rngs.params(),
            (vocab_size, top_k),
            lambda key, shape, dtype: balanced_hash_table(key, *shape, num_experts).astype(dtype),
            axes=("hash_vocab", None),
            dtype="int32",
            kind=HashTable,
        )

    def __call__(self, x_BSD: jax.Array, tokens_BS: jax.Array) -> Routing:
        """[B, S, D] and token ids [B, S] -> Routing."""
        scores = router_scores(x_BSD, self.weight[...])
        indices = self.tid2eid[...][tokens_BS]
        indices = constrain(indices, ("act_batch", "act_sequence", None))
        return routing_from(scores, indices, self.scale)


def _top_k(values_BSE: jax.Array, top_k: int) -> jax.Array:
    """Indices int32 [B, S, K] of the largest values, ties to the lowest index."""

    def select(values: jax.Array) -> jax.Array:
        return jax.lax.top_k(values, top_k)[1].astype(jnp.int32)

    return _on_own_tokens(select, values_BSE)


def _on_own_tokens(select: Callable[[jax.Array], jax.Array], values_BSE: jax.Array) -> jax.Array:
    """`select` over the last dimension, each device for its own tokens."""
    batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
    if not batch + sequence:
        return select(values_BSE)
    # XLA would gather the whole batch on every device: it does not partition top_k.
    spec = PartitionSpec(batch or None, sequence or None)
    return jax.shard_map(select, in_specs=spec, out_specs=spec)(values_BSE)


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"num_experts_per_tok: found {top_k}, expected 1 to num_experts = {num_experts}"
        )


def _router_weight(rngs, hidden_size, num_experts, init_std, param_dtype) -> nnx.Variable:
    return param(
        rngs.params(),
        (hidden_size, num_experts),
        normal(init_std),
        axes=("embed", "router_experts"),
        dtype=param_dtype,
        matrix=MATRIX,
    )


def balanced_hash_table(key: jax.Array, vocab_size: int, top_k: int, num_experts: int) -> jax.Array:
    """A random table int32 [V, K] that loads the experts evenly and never names one twice in a row.

    Token ids are shuffled and dealt in runs of E. Within a run, choice k of the j-th token is
    `shuffled[(j + offset_k) mod E]` with distinct offsets, so each choice is a permutation of the
    experts and the run uses every expert exactly K times.
    """
    key_tokens, key_experts, key_offsets = jax.random.split(key, 3)
    num_runs = -(-vocab_size // num_experts)

    def shuffles(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, num_runs)
        return jax.vmap(lambda k: jax.random.permutation(k, num_experts))(keys)

    experts_RE = shuffles(key_experts)
    offsets_RK = shuffles(key_offsets)[:, :top_k]
    rank = jax.random.permutation(key_tokens, vocab_size)
    run, place = rank // num_experts, rank % num_experts
    slot_VK = (place[:, None] + offsets_RK[run]) % num_experts
    return experts_RE[run[:, None], slot_VK].astype(jnp.int32)


def chosen_experts(indices_BSK: jax.Array, num_experts: int) -> jax.Array:
    """float32 1 where the token goes to the expert."""
    experts = jnp.arange(num_experts, dtype=indices_BSK.dtype)
    return jnp.sum(indices_BSK[..., None] == experts, axis=-2, dtype=jnp.float32)


def expert_load(indices_BSK: jax.Array, mask_BS: jax.Array | None, num_experts: int) -> jax.Array:
    """How many valid tokens chose each expert, float32 [E]; sums to K times the valid tokens.

    Args:
      mask_BS: True or 1 where the token counts; None counts all of them.
    """
    chosen = chosen_experts(indices_BSK, num_experts)
    if mask_BS is not None:
        chosen = chosen * mask_BS.astype(jnp.float32)[..., None]
    return jnp.sum(chosen, axis=(0, 1))
