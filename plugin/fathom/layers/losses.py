"""The language-model loss: next token, MTP, sequence-wise expert balance, and the indexers' own.

Sums are divided by counts of the whole batch, given from outside, so that losses and gradients of microbatches
simply add up. Targets are made here: the target of position s is the token after it in the same document.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fathom.layers.documents import Documents, make_documents
from fathom.mesh import active_rules, split_axes, vary
from fathom.ops.cross_entropy import linear_cross_entropy


class LossWeights(NamedTuple):
    """What the MTP loss, the balance loss and the indexers' loss count for (V4: 0.3, later 0.1; 1e-4; 1e-2)."""

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1e-2


class LossCounts(NamedTuple):
    """Denominators, float32 scalars over the whole batch.

    tokens: positions with a next-token target; mtp_tokens: positions with a target two ahead; valid_tokens:
    tokens that are not padding.
    """

    tokens: jax.Array
    mtp_tokens: jax.Array
    valid_tokens: jax.Array


def _documents(batch: Mapping[str, jax.Array]) -> Documents:
    return make_documents(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))


def target_masks(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """float32 [B, S] each: 1 where the next token, and where the token after it, is a target."""
    documents = _documents(batch)
    follows = documents.valid_BS & ~documents.is_last_BS
    counted = follows
    if "loss_mask" in batch:
        counted = counted & (batch["loss_mask"] > 0)
    after = jnp.roll(counted, -1, axis=1).at[:, -1].set(False)
    return counted.astype(jnp.float32), (follows & after).astype(jnp.float32)


def count_targets(batch: Mapping[str, jax.Array]) -> LossCounts:
    """The denominators for a batch; at least 1, so that a batch of padding has loss 0."""
    next_mask, mtp_mask = target_masks(batch)
    valid = _documents(batch).valid_BS.astype(jnp.float32)
    return LossCounts(*(jnp.maximum(x.sum(), 1.0) for x in (next_mask, mtp_mask, valid)))


class HeadTargets(NamedTuple):
    """What a head predicts: hidden [B, S, D], targets int32 [B, S], weights float32 [B, S], 0 to leave a token out."""

    hidden_BSD: jax.Array
    targets_BS: jax.Array
    weights_BS: jax.Array


def head_cross_entropy(head_DV: jax.Array, parts: Sequence[HeadTargets]) -> list[jax.Array]:
    """`linear_cross_entropy` of each of the parts under the current sharding rules: float32 scalars.

    The head is gathered once for all parts, in the compute dtype. Each device sums its gradient over its own tokens,
    and the devices add theirs up once, after the last chunk, in float32; nothing before the head is differentiated
    until then, so that no gradient of the size of the whole head stays.
    """
    if active_rules() is None or jax.sharding.get_abstract_mesh().empty:
        kernel = head_DV.astype(parts[0].hidden_BSD.dtype).astype(jnp.float32)
        return [linear_cross_entropy(part.hidden_BSD, kernel, *part[1:]) for part in parts]
    batch, sequence, vocab = (split_axes(name) for name in ("act_batch", "act_sequence", "act_vocab"))
    token_axes = (*batch, *sequence)
    rows = tuple(axis for axis in split_axes("embed") if axis in token_axes)
    tokens = PartitionSpec(batch or None, sequence or None)

    def of_shard(head, parts):
        # The transposes of these casts are the sums over devices.
        head = vary(head, tuple(axis for axis in token_axes if axis not in rows))
        hidden = tuple(vary(part.hidden_BSD, vocab) for part in parts)
        kernel, hidden = _gather_head(rows, head, hidden)
        totals = [
            linear_cross_entropy(h, kernel, *part[1:], vocab_axes=vocab) for h, part in zip(hidden, parts, strict=True)
        ]
        return [jax.lax.psum(total, token_axes) if token_axes else total for total in totals]

    return jax.shard_map(
        of_shard,
        in_specs=(PartitionSpec(rows or None, vocab or None), tokens),
        out_specs=PartitionSpec(),
    )(head_DV, tuple(parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_head(rows: tuple[str, ...], head: jax.Array, hidden: tuple[jax.Array, ...]):
    """(the whole kernel, float32 of what the compute dtype holds; hidden)."""
    kernel = head.astype(hidden[0].dtype)
    if rows:
        kernel = jax.lax.all_gather(kernel, rows, axis=0, tiled=True)
    return kernel.astype(jnp.float32), hidden


def _gather_head_forward(rows, head, hidden):
    return _gather_head(rows, head, hidden), head[:0]


def _gather_head_backward(rows, like, gradients):
    dkernel, dhidden = gradients
    if rows:
        dkernel = jax.lax.psum_scatter(dkernel, rows, scatter_dimension=0, tiled=True)
    return jax.lax.optimization_barrier((dkernel.astype(like.dtype), dhidden))


_gather_head.defvjp(_gather_head_forward, _gather_head_backward)


def language_model_loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    weights: LossWeights,
    counts: LossCounts,
) -> tuple[jax.Array, dict[str, Any]]:
    """Next-token cross-entropy + weights.mtp * MTP cross-entropy + weights.balance * balance loss, and
    weights.indexer * the indexers' loss where the model gives one: KL per token, summed over layers.

    Args:
      model: has `features(tokens, positions, segment_ids)` and `head.weight` [D, V].
      batch: "tokens" [B, S]; optional "positions", "segment_ids" and "loss_mask" (1 where the target of the
        position counts), "routing" (as `Decoder.features` takes it).
      weights: factors of the parts. counts: denominators of the whole batch (`count_targets`).

    Returns:
      float32 scalar in nats per token, and aux: "loss/main", "loss/mtp", "loss/balance", "loss/indexer" (each
      unweighted), "expert_load" (block path -> token counts).
    """
    given = {"routing": batch["routing"]} if "routing" in batch else {}
    features = model.features(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), **given)
    next_mask, mtp_mask = target_masks(batch)
    targets = features.documents.roll_left(batch["tokens"])
    parts = [HeadTargets(features.hidden, targets, next_mask)]
    if features.mtp_hidden:
        parts.append(HeadTargets(features.mtp_hidden[0], features.documents.roll_left(targets), mtp_mask))
    main, *mtp = head_cross_entropy(model.head.weight[...], parts)
    main = main / counts.tokens
    balance = features.aux["balance"] / counts.valid_tokens
    aux = {"loss/main": main, "loss/balance": balance}
    total = main + weights.balance * balance
    if mtp:
        aux["loss/mtp"] = mtp[0] / counts.mtp_tokens
        total = total + weights.mtp * aux["loss/mtp"]
    if "indexer" in features.aux:
        aux["loss/indexer"] = features.aux["indexer"] / counts.valid_tokens
        total = total + weights.indexer * aux["loss/indexer"]
    aux["expert_load"] = features.aux["expert_load"]
    return total, aux
