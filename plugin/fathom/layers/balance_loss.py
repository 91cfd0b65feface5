"""The sequence-wise balance loss of routers, per document, over sequences cut anywhere.

A device counts its own tokens. Of a document that goes on beyond them only two rows of counts per device cross, those
of its first and of its last document.

Letters: B batch, S sequence (inside a shard_map: of a device), E experts, K experts per token, P devices of a row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fathom.layers.router import Routing, chosen_experts
from fathom.mesh import split_axes


def sequence_balance_loss(routing: Routing, segment_ids_BS: jax.Array | None) -> jax.Array:
    """Sequence-wise balance loss of DeepSeek-V3, per document, summed over valid tokens.

    With s' = scores / sum(scores), f_i = E / (K T) * (tokens of the document that chose i) and P_i
    the mean of s'_i over the document's T tokens, a document contributes T * sum_i f_i P_i. Divide
    the sum by the number of valid tokens for the token-weighted mean. No gradient flows through f.

    Args:
      segment_ids_BS: a document is a run of equal non-zero ids; 0 is padding, which takes part in
        nothing. None makes each row one document.

    Returns:
      float32 scalar.
    """
    scores = routing.scores_BSE
    num_experts, top_k = scores.shape[-1], routing.indices_BSK.shape[-1]
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    if segment_ids_BS is not None:
        share = jnp.where((segment_ids_BS > 0)[..., None], share, 0.0)
    fraction = _fractions(routing.indices_BSK, segment_ids_BS, num_experts)
    return jnp.sum(share * fraction) * (num_experts / top_k)


def _fractions(indices_BSK: jax.Array, segment_ids_BS: jax.Array | None, num_experts: int) -> jax.Array:
    """float32 [B, S, E]: at each token the share of its document's tokens that chose each expert."""
    batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
    of_device = functools.partial(_fractions_on_device, num_experts, sequence)
    arrays = (indices_BSK,) if segment_ids_BS is None else (indices_BSK, segment_ids_BS)
    if not batch + sequence:
        return of_device(*arrays)
    spec = PartitionSpec(batch or None, sequence or None)
    return jax.shard_map(of_device, in_specs=spec, out_specs=spec)(*arrays)


def _fractions_on_device(
    num_experts: int, sequence: tuple[str, ...], indices_BSK: jax.Array, segment_ids_BS: jax.Array | None = None
) -> jax.Array:
    chosen = chosen_experts(indices_BSK, num_experts)
    if segment_ids_BS is None:
        mean = jnp.mean(chosen, axis=1, keepdims=True)
        mean = jax.lax.pmean(mean, sequence) if sequence else mean
        return jnp.broadcast_to(mean, chosen.shape)
    start_BS, end_BS = _runs(segment_ids_BS)
    # One more column counts the tokens themselves.
    counted = jnp.concatenate([chosen, jnp.ones_like(chosen[..., :1])], axis=-1)
    before = jnp.pad(jnp.cumsum(counted, axis=1), ((0, 0), (1, 0), (0, 0)))

    def up_to(edge_BS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(before, edge_BS[..., None], axis=1)

    total = up_to(end_BS) - up_to(start_BS)
    if sequence:
        left, right = _beyond(sequence, total, start_BS, segment_ids_BS)
        length = segment_ids_BS.shape[1]
        total += jnp.where((start_BS == 0)[..., None], left[:, None], 0.0)
        total += jnp.where((end_BS == length)[..., None], right[:, None], 0.0)
    return total[..., :-1] / total[..., -1:]


def _runs(ids_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 (first, end) of the run of equal ids that each token is in."""
    batch, length = ids_BS.shape
    index = jnp.broadcast_to(jnp.arange(length), (batch, length))
    edge = ids_BS[:, 1:] != ids_BS[:, :-1]
    outer = jnp.ones((batch, 1), bool)
    starts = jnp.where(jnp.concatenate([outer, edge], axis=1), index, 0)
    ends = jnp.where(jnp.concatenate([edge, outer], axis=1), index + 1, length)
    return jax.lax.cummax(starts, axis=1), jax.lax.cummin(ends, axis=1, reverse=True)


def _beyond(
    sequence: tuple[str, ...], total: jax.Array, start_BS: jax.Array, ids_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Counts [B, E + 1] of what the device's first document has on devices to the left, and its last to the right."""
    own = total[:, 0], total[:, -1], start_BS[:, -1] == 0, ids_BS[:, 0], ids_BS[:, -1]
    first, last, one_run, first_id, last_id = jax.lax.all_gather(own, sequence)  # [P, B, ...]
    joined = last_id[:-1] == first_id[1:]  # across the border after each device
    outer = jnp.zeros_like(joined[:1])

    def step(so_far, device):
        counts, one_run, joined = device
        return jnp.where(joined[:, None], counts + jnp.where(one_run[:, None], so_far, 0.0), 0.0), so_far

    nothing = jnp.zeros_like(first[0])
    _, left = jax.lax.scan(step, nothing, (last, one_run, jnp.concatenate([joined, outer])))
    _, right = jax.lax.scan(step, nothing, (first, one_run, jnp.concatenate([outer, joined])), reverse=True)
    mine = jax.lax.axis_index(sequence)
    return left[mine], right[mine]
