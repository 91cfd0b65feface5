"""Rows gathered: each query reads the rows it lists, and nothing grows with the number of rows there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.attention_chunk import ChunkGradients, Made, Part, attend, attend_backward
from fathom.ops.segment_sum import add_rows
from fathom.ops.selection import Selected


def prepare(rows_BTH: jax.Array) -> jax.Array:
    """The rows and one of zeros behind them, which stands for every index that is to be skipped: [B, T + 1, H]."""
    return jnp.pad(rows_BTH, ((0, 0), (0, 1), (0, 0)))


def tidy(indices_BCK: jax.Array, num_rows: int) -> jax.Array:
    """Indices sorted, with `num_rows` for those to skip: negative, past the end, or listed before."""
    outside = (indices_BCK < 0) | (indices_BCK >= num_rows)
    indices_BCK = jnp.sort(jnp.where(outside, num_rows, indices_BCK), axis=-1)
    again = indices_BCK[..., 1:] == indices_BCK[..., :-1]
    return indices_BCK.at[..., 1:].set(jnp.where(again, num_rows, indices_BCK[..., 1:]))


def _part(rows: jax.Array, indices_BCK: jax.Array) -> Part:
    # Row by row of the batch: XLA partitions a gather over its batch dimensions only.
    keys = jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds"))(rows, indices_BCK)
    return Part(keys, indices_BCK < rows.shape[1] - 1)


def forward(q, band: list[Part], sink, rows: jax.Array, selection: Selected, num_rows: int, **sizes):
    """`attend` to the band and the rows selected."""
    return attend(q, [*band, _part(rows, tidy(selection.indices_BSK, num_rows))], sink, **sizes)


def backward(
    q,
    band: list[Part],
    sink,
    rows: jax.Array,
    selection: Selected,
    made: Made,
    dout,
    dlse,
    drows,
    num_rows: int,
    **sizes,
) -> tuple[ChunkGradients, jax.Array]:
    """`attend_backward`, the rows' gradient added to `drows` (float32, shaped as `rows`)."""
    indices = tidy(selection.indices_BSK, num_rows)
    grads = attend_backward(q, [*band, _part(rows, indices)], sink, made, dout, dlse, **sizes)
    batch, width = drows.shape[0], drows.shape[2]
    flat = grads.dkeys[-1].reshape(batch, -1, width)
    drows = jax.vmap(add_rows)(drows, indices.reshape(batch, -1), flat)
    return grads._replace(dkeys=grads.dkeys[:-1]), drows
