"""The language-model loss: next token, MTP, sequence-wise expert balance, and the indexers' own.

Sums are divided by counts of the whole batch, given from outside, so that losses and gradients of microbatches
simply add up. Targets are made here: the target of position s is the token after it in the same document.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def head_cross_entropy(
    hidden_BSD: jax.Array, kernel_DV: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array
) -> jax.Array:
    """`linear_cross_entropy` under the current sharding rules.

    Each device sums the head's gradient over its own tokens, and the devices add theirs up once, after the last
    chunk, in float32.
    """
    kernel_DV = kernel_DV.astype(jnp.float32)
    if active_rules() is None or jax.sharding.get_abstract_mesh().empty:
        return linear_cross_entropy(hidden_BSD, kernel_DV, targets_BS, weights_BS)
    batch, sequence, vocab = (split_axes(name) for name in ("act_batch", "act_sequence", "act_vocab"))
    tokens = PartitionSpec(batch or None, sequence or None)

    def of_shard(hidden, kernel, targets, weights):
        # The transposes of these casts are the sums over devices.
        kernel = vary(kernel, (*batch, *sequence))
        hidden = vary(hidden, vocab)
        total = linear_cross_entropy(hidden, kernel, targets, weights, vocab_axes=vocab)
        return jax.lax.psum(total, (*batch, *sequence)) if batch or sequence else total

    return jax.shard_map(
        of_shard,
        in_specs=(tokens, PartitionSpec(None, vocab or None), tokens, tokens),
        out_specs=PartitionSpec(),
    )(hidden_BSD, kernel_DV, targets_BS, weights_BS)


def language_model_loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    weights: LossWeights,
    counts: LossCounts,
) -> tuple[jax.Array, dict[str, Any]]:
    """Next-token cross-entropy + weights.mtp * MTP cross-entropy + weights.balance * balance loss, and
    weights.indexer * the indexers' loss where the model gives one: KL per token, summed over layers.

    Args:
      model: has `features(tokens, positions, segment_ids)` and `head.kernel(dtype)`.
      batch: "tokens" [B, S]; optional "positions", "segment_ids" and "loss_mask" (1 where the target of the
        position counts).
      weights: factors of the parts. counts: denominators of the whole batch (`count_targets`).

    Returns:
      float32 scalar in nats per token, and aux: "loss/main", "loss/mtp", "loss/balance", "loss/indexer" (each
      unweighted), "expert_load" (block path -> token counts).
    """
    features = model.features(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
    kernel = model.head.kernel(features.hidden.dtype)
    next_mask, mtp_mask = target_masks(batch)
    targets = features.documents.roll_left(batch["tokens"])
    main = head_cross_entropy(features.hidden, kernel, targets, next_mask) / counts.tokens
    balance = features.aux["balance"] / counts.valid_tokens
    aux = {"loss/main": main, "loss/balance": balance}
    total = main + weights.balance * balance
    if features.mtp_hidden:
        after = features.documents.roll_left(targets)
        mtp = head_cross_entropy(features.mtp_hidden[0], kernel, after, mtp_mask)
        aux["loss/mtp"] = mtp / counts.mtp_tokens
        total = total + weights.mtp * aux["loss/mtp"]
    if "indexer" in features.aux:
        aux["loss/indexer"] = features.aux["indexer"] / counts.valid_tokens
        total = total + weights.indexer * aux["loss/indexer"]
    aux["expert_load"] = features.aux["expert_load"]
    return total, aux
