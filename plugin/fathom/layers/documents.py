"""Documents in a row: positions, the window band, and the compression windows that close.

Everything that attention sees derives from one rule: compressed entry e, which closes at token c_e, is visible
to query s iff c_e <= s and both lie in the same document. Entries of a row are numbered in closing order, so
what a query sees is a contiguous range of entry numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fathom.mesh import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """The compression windows of one ratio.

    Attributes:
      ratio: tokens per window, static.
      aligned: static; True when each row is one document, so that window e is tokens [e*ratio, (e+1)*ratio).
      closing_BE: token index at which entry e closes; S where there is no entry e.
      start_BE: position (within its document) of the window's first token, where the entry's RoPE sits.
      begin_BS, end_BS: query s sees entries [begin, end).
    """

    closing_BE: jax.Array
    start_BE: jax.Array
    begin_BS: jax.Array
    end_BS: jax.Array
    ratio: int = dataclasses.field(metadata={"static": True})
    aligned: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_entries(self) -> int:
        return self.closing_BE.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """Where the documents of each row lie.

    Attributes:
      positions_BS: int32, restarts at 0 with each document.
      segment_ids_BS: int32, documents counted from 1 in each row, 0 is padding.
      single: static; True when each row is one document from its first to its last token.
    """

    positions_BS: jax.Array
    segment_ids_BS: jax.Array
    single: bool = dataclasses.field(metadata={"static": True})

    @property
    def valid_BS(self) -> jax.Array:
        """True where the token is not padding."""
        return self.segment_ids_BS > 0

    def band(self, window: int) -> jax.Array:
        """How many recent tokens, itself included, each token sees: int32 [B, S]; 0 for padding."""
        seen = jnp.minimum(self.positions_BS + 1, window)
        return jnp.where(self.valid_BS, seen, 0).astype(jnp.int32)

    def windows(self, ratio: int) -> Windows:
        """The windows of `ratio` tokens, anchored at each document's start; at most S // ratio close."""
        batch, length = self.positions_BS.shape
        entries = jnp.arange(length // ratio, dtype=jnp.int32)
        if self.single:
            shape = (batch, length // ratio)
            return Windows(
                closing_BE=jnp.broadcast_to((entries + 1) * ratio - 1, shape),
                start_BE=jnp.broadcast_to(entries * ratio, shape),
                begin_BS=jnp.zeros_like(self.positions_BS),
                end_BS=((self.positions_BS + 1) // ratio).astype(jnp.int32),
                ratio=ratio,
                aligned=True,
            )
        # Of whole rows: cut over devices, every step of the search below would be a sum over them.
        def whole(x):
            return constrain(x, ("act_batch", None))

        positions, segments = whole(self.positions_BS), whole(self.segment_ids_BS)
        valid, complete = segments > 0, (positions + 1) // ratio
        closed = whole(jnp.cumsum(valid & ((positions + 1) % ratio == 0), axis=1, dtype=jnp.int32))
        closing = jax.vmap(lambda row: jnp.searchsorted(row, entries + 1, side="left"))(closed)
        closing = whole(closing.astype(jnp.int32))
        last = jnp.take_along_axis(positions, closing, axis=1, mode="clip")
        return Windows(
            closing_BE=closing,
            start_BE=last - (ratio - 1),
            begin_BS=jnp.where(valid, closed - complete, closed).astype(jnp.int32),
            end_BS=closed,
            ratio=ratio,
            aligned=False,
        )

    def roll_left(self, values_BS: jax.Array) -> jax.Array:
        """Each token's successor in its document; the last token of a document gets the first one's value.

        This is "rolled left by one, wrapping" within each document, so a document reads the same wherever it
        is packed.
        """
        rolled = jnp.roll(values_BS, -1, axis=1)
        if self.single:
            return rolled
        index = jnp.arange(values_BS.shape[1], dtype=jnp.int32) - self.positions_BS
        first = jnp.take_along_axis(values_BS, index, axis=1, mode="clip")
        return jnp.where(self.is_last_BS, first, rolled)

    @property
    def is_last_BS(self) -> jax.Array:
        """True at the last token of each document, and at the last of each row's padding."""
        following = jnp.roll(self.segment_ids_BS, -1, axis=1).at[:, -1].set(-1)
        return following != self.segment_ids_BS


def make_documents(
    tokens_BS: jax.Array, positions_BS: jax.Array | None, segment_ids_BS: jax.Array | None
) -> Documents:
    """Fills in what is not given.

    Without both, each row is one document. With positions alone, a document starts wherever the position is 0.
    With segment ids alone, positions count from each change of segment.

    Raises:
      ValueError: when shapes differ, and, wherever the values are known, when positions do not count from 0 in
        each document.
    """
    for name, array in (("positions", positions_BS), ("segment_ids", segment_ids_BS)):
        if array is not None and array.shape != tokens_BS.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, expected the tokens' shape {tokens_BS.shape}"
            )
    index = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
    if positions_BS is None and segment_ids_BS is None:
        return Documents(index, jnp.ones_like(index), single=True)
    if segment_ids_BS is None:
        starts = positions_BS == 0
        segment_ids_BS = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    if positions_BS is None:
        changed = segment_ids_BS != jnp.roll(segment_ids_BS, 1, axis=1)
        changed = changed.at[:, 0].set(True)
        start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
        positions_BS = index - start
    _check_positions(positions_BS, segment_ids_BS)
    return Documents(
        positions_BS.astype(jnp.int32), segment_ids_BS.astype(jnp.int32), single=False
    )


def _check_positions(positions_BS: jax.Array, segment_ids_BS: jax.Array) -> None:
    """Under jit the values are not known; the loader's are right by construction."""
    if isinstance(positions_BS, jax.core.Tracer) or isinstance(segment_ids_BS, jax.core.Tracer):
        return
    positions, segments = np.asarray(positions_BS), np.asarray(segment_ids_BS)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    expected = np.where(starts, 0, np.roll(positions, 1, axis=1) + 1)
    bad = np.argwhere((positions != expected) & (segments > 0))
    if segments.size and not (segments > 0).any() and (positions > 0).any():
        bad = np.argwhere(positions > 0)  # no position 0 opens a document, so all would be padding
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"positions: found {positions[row, column]} at row {row}, token {column}, expected "
            f"{expected[row, column]}: they count from 0 in each document (segment {segments[row, column]})"
        )
