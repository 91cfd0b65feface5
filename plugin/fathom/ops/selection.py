"""Which entries each query attends to: a range of them, a list, or none.

Entries of a row are numbered in closing order, so what a query sees is a range (layers/documents.py); an indexer picks
a list from it. Letters: B batch, S queries, E entries, K listed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fathom.ops.chunks import to_chunks

MASKED = -1e30
"""Score of a key that is not attended; finite so that an all-masked row stays free of NaN."""


class VisibleRange(NamedTuple):
    """Query s attends to every entry in [begin, end). int32 [B, S] each."""

    begin_BS: jax.Array
    end_BS: jax.Array


class Selected(NamedTuple):
    """Query s attends to the entries listed; -1 and numbers beyond the last entry are skipped. int32 [B, S, K]."""

    indices_BSK: jax.Array


Selection = VisibleRange | Selected | None


def entry_mask(selection: Selection, num_entries: int) -> jax.Array:
    """The selection as a boolean mask [B, S, E]; duplicates count once."""
    if isinstance(selection, VisibleRange):
        entry = jnp.arange(num_entries)
        return (entry >= selection.begin_BS[..., None]) & (entry < selection.end_BS[..., None])
    # Query by query: XLA partitions a scatter over its batch dimensions only.
    def of_query(indices_K: jax.Array) -> jax.Array:
        # -1 would wrap around to the last entry; send it past the end, where the scatter drops it.
        indices_K = jnp.where(indices_K < 0, num_entries, indices_K)
        return jnp.zeros(num_entries, bool).at[indices_K].set(True, mode="drop")

    return jax.vmap(jax.vmap(of_query))(selection.indices_BSK)


def selection_chunks(selection: Selection, chunk: int) -> Selection:
    """Each of the selection's arrays in chunks; padding queries see nothing."""
    if isinstance(selection, Selected):
        return Selected(to_chunks(selection.indices_BSK + 1, chunk) - 1)
    return jax.tree.map(lambda x: to_chunks(x, chunk), selection)
