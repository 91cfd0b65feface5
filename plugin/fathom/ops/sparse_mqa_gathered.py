"""Rows gathered: each query reads the rows it lists, and nothing grows with the number of rows there are.

The band is taken for a whole chunk of queries; rows are gathered for a few queries at a time where a cache should hold
them, and the two are put together by their log-sum-exps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.attention_chunk import (
    ChunkGradients,
    Made,
    Part,
    attend,
    attend_backward,
    merge,
    part_gradients,
    probabilities,
    sink_gradient,
    softmax_shift,
    values,
)
from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.platform import program_platform
from fathom.ops.segment_sum import add_rows
from fathom.ops.selection import Selected, selection_chunks

AT_A_TIME = {"cpu": 4}
"""Queries whose rows are gathered at a time where that is not the whole chunk."""


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


def _add(drows: jax.Array, indices_BCK: jax.Array, dkeys_BCKH: jax.Array) -> jax.Array:
    batch, _, width = drows.shape
    return jax.vmap(add_rows)(drows, indices_BCK.reshape(batch, -1), dkeys_BCKH.reshape(batch, -1, width))


def _at_a_time(chunk: int) -> int:
    return AT_A_TIME.get(program_platform(), chunk)


def forward(q, band: list[Part], sink, rows: jax.Array, selection: Selected, num_rows: int, **sizes) -> Made:
    """`attend` to the band and the rows selected."""
    chunk, few = q.shape[1], _at_a_time(q.shape[1])
    if chunk <= few:
        return attend(q, [*band, _part(rows, tidy(selection.indices_BSK, num_rows))], sink, **sizes)

    def gather(xs):
        q, picked = xs
        part = _part(rows, tidy(picked.indices_BSK, num_rows))
        return attend(q, [part], jnp.full(sink.shape, -jnp.inf), **sizes)

    made = jax.lax.map(gather, (to_chunks(q, few), selection_chunks(selection, few)))
    return merge(attend(q, band, sink, **sizes), jax.tree.map(lambda x: from_chunks(x, chunk), made))


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
    *,
    scale: float,
    value_dim: int,
) -> tuple[ChunkGradients, jax.Array]:
    """`attend_backward`, the rows' gradient added to `drows` (float32, shaped as `rows`)."""
    chunk, few = q.shape[1], _at_a_time(q.shape[1])
    if chunk <= few:
        indices = tidy(selection.indices_BSK, num_rows)
        parts = [*band, _part(rows, indices)]
        grads = attend_backward(q, parts, sink, made, dout, dlse, scale=scale, value_dim=value_dim)
        return grads._replace(dkeys=grads.dkeys[:-1]), _add(drows, indices, grads.dkeys[-1])

    of_band = probabilities(q, band, made.lse, scale)
    start = values(q, of_band, band, value_dim) if made.out is None else made.out

    def gather(drows, xs):
        picked, (q, lse, out, dout, dlse) = xs
        indices = tidy(picked.indices_BSK, num_rows)
        parts = [_part(rows, indices)]
        weights = probabilities(q, parts, lse, scale)
        if made.out is None:
            out = out + values(q, weights, parts, value_dim)
        grads = part_gradients(q, parts, weights, dout, softmax_shift(out, dout, dlse), scale)
        return _add(drows, indices, grads.dkeys[0]), (out, grads.dq)

    dout = dout.astype(q.dtype)
    queries = jax.tree.map(lambda x: to_chunks(x, few), (q, made.lse, start, dout, dlse))
    drows, ys = jax.lax.scan(gather, drows, (selection_chunks(selection, few), queries))
    out, dq = jax.tree.map(lambda x: from_chunks(x, chunk), ys)
    shift = softmax_shift(out, dout, dlse)
    grads = part_gradients(q, band, of_band, dout, shift, scale)
    dq = (dq + grads.dq).astype(q.dtype)
    return ChunkGradients(out, dq, grads.dkeys, sink_gradient(sink, made.lse, shift)), drows
