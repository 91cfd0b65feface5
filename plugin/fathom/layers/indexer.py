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

from fathom.layers.linear import Linear
from fathom.layers.options import ComputeOptions
from fathom.layers.param import HEADS_OUT
from fathom.layers.shards import START, Place
from fathom.ops.chunks import map_chunks
from fathom.ops.indexer import indexer_topk
from fathom.ops.indexer_kl import Teacher, indexer_kl
from fathom.ops.selection import Selected, Selection, VisibleRange

logger = logging.getLogger(__name__)

INDEX_CHUNK = 128
"""Queries scored at a time where the options do not say."""
Tables = tuple[jax.Array, jax.Array]


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
    """What an indexer gives.

    Attributes:
      selection: which entries each query attends to. k_BEH: the keys it scored, where it has a loss of its own.
    """

    selection: Selection
    k_BEH: jax.Array | None


NO_CHOICE = Choice(None, None)


class Asked(NamedTuple):
    """Queries: their hidden states, their low-rank form, and what else is known about them."""

    x_BSD: jax.Array
    qr_BSR: jax.Array
    inputs: Any


class TeacherParts(NamedTuple):
    """The attention that an indexer learns from, its queries not yet made, for they are wide.

    Attributes:
      make_queries: from a stretch of `inputs` to queries [B, C, N, H]. inputs: a tree of arrays [B, S, ...].
      keys_BEH: the entries. lse_BSN: float32 log of the whole denominator. scale: multiplies q . k.
    """

    make_queries: Callable[[Any], jax.Array]
    inputs: Any
    keys_BEH: jax.Array
    lse_BSN: jax.Array
    scale: float


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

    A subclass makes what its keys need after `super().__init__`, and defines `visible`, `tables`, `rotate`, `keys` and
    `simulate`; `head_weights` where the weights' product is special.

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
        self.wq_b = Linear(
            rngs, (q_lora_rank, num_heads, head_dim), axes, stddev=stddev, dtype=dtype, matrix=HEADS_OUT
        )
        self.weights_proj = Linear(
            rngs, (hidden_size, num_heads), ("embed", "index_heads"), stddev=stddev, dtype=weights_dtype or dtype
        )

    @abc.abstractmethod
    def visible(self, inputs: Any) -> tuple[VisibleRange, int]:
        """The range of entries that each query sees, and how many entries a row has."""

    @abc.abstractmethod
    def tables(self, inputs: Any) -> Tables:
        """(cos, sin) of the queries, [B, S, half of the rotary channels]."""

    @abc.abstractmethod
    def rotate(self, x: jax.Array, tables: Tables) -> jax.Array:
        """RoPE on queries or keys [..., H]; the tables broadcast."""

    @abc.abstractmethod
    def keys(self, x_BSD: jax.Array, inputs: Any, place: Place) -> jax.Array:
        """Rotated keys [B, E, H] of the whole row."""

    @abc.abstractmethod
    def simulate(self, x: jax.Array) -> jax.Array:
        """The released code's rounding of queries and keys, over the last dimension."""

    def head_weights(self, x_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, N], not yet scaled."""
        return self.weights_proj.contract("bsd,dn->bsn", x_BSD, jnp.float32)

    def queries(self, x_BSD: jax.Array, qr_BSR: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
        """Rotated queries [B, S, N, H], and float32 head weights [B, S, N], scaled."""
        cos, sin = tables
        q = self.rotate(self.wq_b.contract("bsr,rnh->bsnh", qr_BSR), (cos[:, :, None], sin[:, :, None]))
        q = self.simulate(q) if self.options.simulate_quant else q
        return q, self.head_weights(x_BSD) * self.weight_scale

    def project(self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: Any, place: Place = START) -> IndexProjections:
        """All that the scores are made of; gradients reach the arguments, a caller detaches them first."""
        q, weights = self.queries(x_BSD, qr_BSR, self.tables(inputs))
        return IndexProjections(q, self._keys(x_BSD, inputs, place), weights)

    def _keys(self, x_BSD: jax.Array, inputs: Any, place: Place) -> jax.Array:
        k = self.keys(x_BSD, inputs, place)
        return self.simulate(k) if self.options.simulate_quant else k

    def select(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, k_BEH: jax.Array, inputs: Any, stretch: int | None = None
    ) -> Selected:
        """The top_k entries of each query, the queries made a stretch at a time."""
        options = self.options

        def of_stretch(parts):
            x, qr, tables, visible = parts
            q, weights = self.queries(x, qr, tables)
            return indexer_topk(
                q,
                k_BEH,
                weights,
                visible,
                self.top_k,
                query_chunk=options.query_chunk or INDEX_CHUNK,
                selection=options.selection,
                recall_target=options.recall_target,
            )

        parts = jax.lax.stop_gradient((x_BSD, qr_BSR, self.tables(inputs), self.visible(inputs)[0]))
        return Selected(checkpoint_name(map_chunks(of_stretch, parts, stretch), "selected_entries"))

    def __call__(
        self, x_BSD: jax.Array, qr_BSR: jax.Array, inputs: Any, place: Place = START, asked: Asked | None = None
    ) -> Choice:
        """Which entries each query attends to: without selecting when a row has no more entries than top_k, without
        scoring when it does not train either. `asked`: other queries than those of the device's tokens."""
        asked = asked or Asked(x_BSD, qr_BSR, inputs)
        visible, num_entries = self.visible(asked.inputs)
        stage = self.options.stage
        everything = num_entries <= self.top_k or stage != "sparse"
        if everything:
            _log_skip(num_entries, self.top_k, stage)
            if not self.options.indexer_loss:
                return Choice(visible, None)
        else:
            _log_selection(num_entries, self.top_k, self.options.selection, self.options.recall_target)
        # Selection is discrete, and the indexer's own loss stops here: nothing before it learns from it.
        k = self._keys(jax.lax.stop_gradient(x_BSD), inputs, place.detached())
        selection = visible if everything else self.select(asked.x_BSD, asked.qr_BSR, k, asked.inputs, place.stretch)
        return Choice(selection, k if self.options.indexer_loss else None)

    def loss(
        self,
        choice: Choice,
        x_BSD: jax.Array,
        qr_BSR: jax.Array,
        inputs: Any,
        teacher: TeacherParts,
        place: Place = START,
    ) -> jax.Array:
        """The loss that trains the indexer, summed over the device's queries: float32 scalar; 0 without training.

        Args:
          choice: what the indexer gave. x_BSD, qr_BSR, inputs, place: what it was given.
          teacher: the attention over its selection; a constant (see `indexer_kl`).
        """
        if choice.k_BEH is None or choice.selection is None:
            return jnp.zeros((), jnp.float32)

        def of_stretch(parts):
            x, qr, tables, lse, selection, teacher_inputs = parts
            q, weights = self.queries(x, qr, tables)
            attention = Teacher(
                teacher.make_queries(teacher_inputs), teacher.keys_BEH, lse, teacher.scale, place.shard.heads
            )
            chunk = self.options.query_chunk or INDEX_CHUNK
            return indexer_kl(q, choice.k_BEH, weights, attention, selection, query_chunk=chunk)

        lse = teacher.lse_BSN
        if self.options.stage == "indexer-warmup":
            # Nothing but the indexers is differentiated there, and the attention names nothing for a policy to keep.
            lse = checkpoint_name(lse, "attention")
        constants = x_BSD, qr_BSR, self.tables(inputs), lse, choice.selection, teacher.inputs
        return map_chunks(of_stretch, jax.lax.stop_gradient(constants), place.stretch).sum()
