"""Rows seen through a mask: a chunk of queries against a range of rows that holds all that any of them sees.

Best where the rows are few, and the only sensible way where each query sees a whole range of them. The range that a
chunk needs is measured, rounded up to one of a few lengths, and the program for that length runs: causal chunks never
touch the rows behind them in time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fathom.ops.attention_chunk import ChunkGradients, Made, Part, attend, attend_backward, finite_keys
from fathom.ops.platform import program_platform
from fathom.ops.ranges import seen_range
from fathom.ops.selection import Selection, VisibleRange

LENGTHS = {"cpu": 12}
"""How many lengths of range a program is compiled for at most where it is not 6, or 16 of `MANY_ROWS`: a CPU's compiler
is quick about each."""
MANY_ROWS = 8192
"""Half a length is masked on average, and is work in vain: with 6 a sixth of what causal queries need."""
SHORTEST = 128
"""Ranges are multiples of at least this many rows."""


class MaskedRows(NamedTuple):
    """Rows without NaN, padded to a multiple of the number of lengths; their penalties; on a CPU channels first too."""

    rows_BTH: jax.Array
    penalty_BT: jax.Array
    rows_BHT: jax.Array | None


def num_lengths(num_rows: int) -> int:
    most = LENGTHS.get(program_platform(), 16 if num_rows >= MANY_ROWS else 6)
    return max(1, min(most, num_rows // SHORTEST))


def prepare(rows_BTH: jax.Array) -> MaskedRows:
    padding = -rows_BTH.shape[1] % num_lengths(rows_BTH.shape[1])
    rows, penalty = finite_keys(jnp.pad(rows_BTH, ((0, 0), (0, padding), (0, 0))))
    return MaskedRows(rows, penalty, jnp.swapaxes(rows, 1, 2) if program_platform() == "cpu" else None)


def needed_range(selection: Selection, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """First row that any query sees and one past the last, over all rows of the batch; (num_rows, 0) if none."""
    if isinstance(selection, VisibleRange):
        return seen_range(selection, num_rows)
    index = selection.indices_BSK
    sees = (index >= 0) & (index < num_rows)
    return jnp.where(sees, index, num_rows).min(), jnp.where(sees, index + 1, 0).max()


def seen_rows(selection: Selection, start: jax.Array, length: int, num_rows: int) -> jax.Array:
    """Which of the rows [start, start + length) each query sees: boolean [B, C, length]."""
    if isinstance(selection, VisibleRange):
        row = start + jnp.arange(length)
        end = jnp.minimum(selection.end_BS, num_rows)
        return (row >= selection.begin_BS[..., None]) & (row < end[..., None])

    def of_query(index_K: jax.Array) -> jax.Array:
        inside = (index_K >= start) & (index_K < jnp.minimum(start + length, num_rows))
        return jnp.zeros(length, bool).at[jnp.where(inside, index_K - start, length)].set(True, mode="drop")

    return jax.vmap(jax.vmap(of_query))(selection.indices_BSK)


def for_needed_length(rows: MaskedRows, selection: Selection, num_rows: int, run, *operands):
    """run(length, start, *operands) with the shortest of the lengths that holds what the chunk needs."""
    padded, lengths = rows.rows_BTH.shape[1], num_lengths(num_rows)
    unit = padded // lengths
    low, high = needed_range(selection, num_rows)
    which = jnp.clip((high - low + unit - 1) // unit - 1, 0, lengths - 1)
    branches = [
        lambda *args, length=unit * (i + 1): run(length, jnp.clip(low, 0, padded - length), *args)
        for i in range(lengths)
    ]
    if lengths == 1:
        return branches[0](*operands)
    return jax.lax.switch(which, branches, *operands)


def _part(rows: MaskedRows, selection: Selection, start: jax.Array, length: int, num_rows: int) -> Part:
    keys = jax.lax.dynamic_slice_in_dim(rows.rows_BTH, start, length, axis=1)
    penalty = jax.lax.dynamic_slice_in_dim(rows.penalty_BT, start, length, axis=1)
    columns = None if rows.rows_BHT is None else jax.lax.dynamic_slice_in_dim(rows.rows_BHT, start, length, axis=2)
    return Part(keys, seen_rows(selection, start, length, num_rows), penalty, columns)


def forward(q, band: list[Part], sink, rows: MaskedRows, selection: Selection, num_rows: int, **sizes):
    """`attend` to the band and the rows selected."""

    def run(length, start, q, band, sink, rows, selection):
        return attend(q, [*band, _part(rows, selection, start, length, num_rows)], sink, **sizes)

    return for_needed_length(rows, selection, num_rows, run, q, band, sink, rows, selection)


def backward(
    q,
    band: list[Part],
    sink,
    rows: MaskedRows,
    selection: Selection,
    made: Made,
    dout,
    dlse,
    drows,
    num_rows: int,
    **sizes,
) -> tuple[ChunkGradients, jax.Array]:
    """`attend_backward`, the rows' gradient added to `drows` (float32, shaped as `rows.rows_BTH`)."""

    def run(length, start, q, band, sink, rows, selection, made, dout, dlse, drows):
        parts = [*band, _part(rows, selection, start, length, num_rows)]
        grads = attend_backward(q, parts, sink, made, dout, dlse, **sizes)
        total = jax.lax.dynamic_slice_in_dim(drows, start, length, axis=1) + grads.dkeys[-1]
        drows = jax.lax.dynamic_update_slice_in_dim(drows, total, start, axis=1)
        return grads._replace(dkeys=grads.dkeys[:-1]), drows

    return for_needed_length(
        rows, selection, num_rows, run, q, band, sink, rows, selection, made, dout, dlse, drows
    )
