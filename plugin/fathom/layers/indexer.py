"""The lightning indexer that V4 and V3.2 share: project, score, select; and what differs, left to subclasses.

score[s, e] = sum_h w[s, h] relu(q[s, h] . k[e]) with q from the low-rank query, w from the hidden state, scaled by
width^-0.5 * heads^-0.5. A subclass says where the keys come from, how RoPE turns, and what a query sees.

Letters: B batch, S queries, E entries, D hidden, R low rank of the query, N index heads, H index head dim.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fathom.layers.linear import Linear
from fathom.layers.options import ComputeOptions
from fathom.mesh import split_axes
from fathom.ops.indexer import indexer_topk
from fathom.ops.indexer_kl import Teacher, indexer_kl
from fathom.ops.selection import Selected, Selection, VisibleRange

logger = logging.getLogger(__name__)

INDEX_CHUNK = 128
"""Queries scored at a time where the options do not say."""
QUERIES, KEYS = "per query", "per key"


class IndexProjections(NamedTuple):
    """All that the scores are made of.

    Attributes:
      q_BSNH: rotated queries. k_BEH: rotated keys, both in the compute dtype.
      weights_BSN: float32 head weights, scaled.
    """

    q_BSNH: jax.Array
    k_BEH: jax.Array
    weights_BSN: jax.Array


class Choice(NamedTuple):
    """What an indexer gives: which entries each query attends to, and what its own loss needs, where it has one."""

    selection: Selection
    projections: IndexProjections | None


@functools.cache
def _log_skip(entries: int, top_k: int, stage: str) -> None:
    if stage == "sparse":
        logger.info("indexer: nothing to select, %d entries are no more than top-k %d", entries, top_k)
    else:
        logger.info("indexer: nothing to select, the stage %s attends to all of %d entries", stage, entries)


@functools.cache
def _log_selection(entries: int, top_k: int, selection: str, recall_target: float) -> None:
    how = selection if selection == "exact" else f"approx (recall {recall_target})"
    logger.info("indexer: %s top-%d of %d entries", how, top_k, entries)


class BaseIndexer(nnx.Module):
    """Scores entries and selects the top_k per query.

    A subclass makes what its keys need after `super().__init__`, and defines `visible`, `rotate_queries` and `keys`;
    `simulate` where the released code rounds queries and keys, `head_weights` where the weights' product is special.

    Attributes:
      wq_b: [R, N, H]. weights_proj: [D, N].
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        q_lora_rank: int,
        num_heads: int,
        head_dim: int,
        top_k: int,
        stddev: float,
        options: ComputeOptions,
        weights_dtype: str | None = None,
    ):
        """`weights_dtype` is the storage of weights_proj, `options.param_dtype` unless given."""
        self.top_k, self.options = top_k, options
        self.weight_scale = head_dim**-0.5 * num_heads**-0.5
        dtype = options.param_dtype
        axes = ("q_lora_in", "index_heads", None)
        self.wq_b = Linear(rngs, (q_lora_rank, num_heads, head_dim), axes, stddev=stddev, dtype=dtype)
        self.weights_proj = Linear(
            rngs, (hidden_size, num_heads), ("embed", "index_heads"), stddev=stddev, dtype=weights_dtype or dtype
        )

    @abc.abstractmethod
    def visible(self, inputs: Any) -> tuple[VisibleRange, int]:
        """The range of entries that each query sees, and how many entries a row has."""

    @abc.abstractmethod
    def rotate_queries(self, q_BSNH: jax.Array, inputs: Any) -> jax.Array:
        """RoPE on the queries."""

    @abc.abstractmethod
    def keys(self, x_BSD: jax.Array, inputs: Any) -> jax.Array:
        """Rotated keys [B, E, H]."""

    @abc.abstractmethod
    def simulate(self, x: jax.Array) -> jax.Array:
        """The released code's rounding of queries and keys, over the last dimension."""

    def head_weights(self, x_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, N], not yet scaled."""
        return self.weights_proj.contract("bsd,dn->bsn", x_BSD, jnp.float32)

    def project(self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: Any) -> IndexProjections:
        """Queries, keys and weights; gradients reach the arguments, a caller detaches them first."""
        q = self.rotate_queries(self.wq_b.contract("bsr,rnh->bsnh", qr_BSR), inputs)
        k = self.keys(x_BSD, inputs)
        if self.options.simulate_quant:
            q, k = self.simulate(q), self.simulate(k)
        return IndexProjections(q, k, self.head_weights(x_BSD) * self.weight_scale)

    def select(self, projections: IndexProjections, visible: VisibleRange) -> Selected:
        """The top_k entries of each query, each device for its own queries."""
        options = self.options
        select = functools.partial(
            indexer_topk,
            top_k=self.top_k,
            query_chunk=options.query_chunk or INDEX_CHUNK,
            selection=options.selection,
            recall_target=options.recall_target,
        )
        # XLA would gather the scores of the whole batch on every device: it does not partition top_k.
        select = _per_device(select, (QUERIES, KEYS, QUERIES, VisibleRange(QUERIES, QUERIES)))
        return Selected(checkpoint_name(select(*projections, visible), "selected_entries"))

    def __call__(self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: Any) -> Choice:
        """Which entries each query attends to: without selecting when a row has no more entries than top_k, without
        scoring when it does not train either."""
        visible, num_entries = self.visible(inputs)
        stage = self.options.stage
        everything = num_entries <= self.top_k or stage != "sparse"
        if everything:
            _log_skip(num_entries, self.top_k, stage)
            if not self.options.indexer_loss:
                return Choice(visible, None)
        else:
            _log_selection(num_entries, self.top_k, self.options.selection, self.options.recall_target)
        # Selection is discrete, and the indexer's own loss stops here: nothing before it learns from it.
        x_BSD, qr_BSR = jax.lax.stop_gradient((x_BSD, qr_BSR))
        projections = self.project(x_BSD, qr_BSR, inputs)
        selection = visible if everything else self.select(projections, visible)
        return Choice(selection, projections if self.options.indexer_loss else None)


def indexer_loss(choice: Choice, teacher: Teacher, query_chunk: int | None = None) -> jax.Array:
    """The loss that trains an indexer, summed over the queries: float32 scalar; 0 where a choice has no projections.

    Args:
      choice: what the indexer gave. teacher: the attention over its selection; a constant (see `indexer_kl`).
    """
    if choice.projections is None or choice.selection is None:
        return jnp.zeros((), jnp.float32)
    scale = teacher.scale

    def rows(q, k, weights, teacher_q, keys, lse, selection):
        teacher = Teacher(teacher_q, keys, lse, scale)
        return indexer_kl(q, k, weights, teacher, selection, query_chunk=query_chunk or INDEX_CHUNK)

    selection = type(choice.selection)(*(QUERIES for _ in choice.selection))
    rows = _per_device(rows, (QUERIES, KEYS, QUERIES, QUERIES, KEYS, QUERIES, selection))
    arrays = jax.lax.stop_gradient((teacher.q_BSNH, teacher.keys_BEH, teacher.lse_BSN))
    return rows(*choice.projections, *arrays, choice.selection).sum()


def _per_device(function: Callable, in_kinds: tuple) -> Callable:
    """`function` of arrays that are per query [B, S, ...] or per key [B, E, ...], each device for its own queries."""
    batch, sequence = split_axes("act_batch"), split_axes("act_sequence")
    if not batch + sequence:
        return function
    specs = {
        QUERIES: PartitionSpec(batch or None, sequence or None),
        KEYS: PartitionSpec(batch or None),
    }
    in_specs = jax.tree.map(lambda kind: specs[kind], in_kinds)
    return jax.shard_map(function, in_specs=in_specs, out_specs=specs[QUERIES])
