"""Short sequences: whole, in a few unrolled blocks of queries, a few rows of the batch at a time.

Where a row is a few hundred tokens long, a loop over chunks of queries costs more than it saves. Each block reads the
keys its band may reach, and every entry, under one mask; the rows taken together are as many as a cache holds. The
backward keeps the arguments, the output and its log-sum-exp.

Letters: B batch, G rows of the batch taken together, S queries, N heads, H key channels, E entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fathom.ops.attention_chunk import ChunkGradients, Made, Part, attend, attend_backward, finite_keys
from fathom.ops.selection import Selection, entry_mask

LENGTH = 256
"""Tokens up to which a sequence is short. CPU measured (BENCHMARKS.md, "Short sequences")."""
BLOCKS = {32: 32, 64: 16, LENGTH: 64}
"""Queries of a block, by the length up to which they hold. Rows of up to 32 tokens are one block: 16 was not measured
there, and moves an FP8 rounding of the golden case."""
SCORES = 1 << 18
"""Attention scores of a block, over all rows taken together: 1 MiB in float32."""


Blocks = tuple[jax.Array, ...]
"""One array per block of queries."""


def _block_length(length: int) -> int:
    """Queries of a block, of rows of `length` tokens."""
    return next(block for longest, block in BLOCKS.items() if length <= longest)


def _spans(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end) of each block."""
    block = _block_length(length)
    return [(max(start - window + 1, 0), start, min(start + block, length)) for start in range(0, length, block)]


def _rows_together(blocks: Blocks, kv_BSH: jax.Array, entries_BEH: jax.Array | None) -> int:
    """G: the largest divisor of the batch whose scores are within `SCORES`."""
    batch, queries, heads, _ = blocks[0].shape
    keys = kv_BSH.shape[1] + (0 if entries_BEH is None else entries_BEH.shape[1])
    most = max(SCORES // (queries * heads * keys), 1)
    return max(rows for rows in range(1, batch + 1) if batch % rows == 0 and rows <= most)


def _in_groups(rows: int, tree):
    """[B, ...] -> [B / G, G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), tree)


def _whole(tree):
    """Inverse of `_in_groups`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _map_rows(function, rows: int, args):
    """`function` of `rows` rows at a time; what it gives, [B / G, ...]. All of them together need no loop."""
    groups = _in_groups(rows, args)
    if len(jax.tree.leaves(groups)[0]) > 1:
        return jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x[None], function(args))


def _finite(kv_GSH, entries_GEH):
    """`finite_keys` of the band's keys and of the entries."""
    return finite_keys(kv_GSH), None if entries_GEH is None else finite_keys(entries_GEH)


def _block(span: tuple[int, int, int], near, band_GS, entries, seen_GSE) -> Part:
    """Keys of one block, the band's and then the entries, both as of `_finite`, and who sees them."""
    first, start, end = span
    distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
    seen = (distance >= 0) & (distance < band_GS[:, start:end, None])
    keys, penalty = (x[:, first:end] for x in near)
    if entries is not None:
        keys, penalty = (jnp.concatenate(both, axis=1) for both in zip((keys, penalty), entries, strict=True))
        seen = jnp.concatenate([seen, seen_GSE[:, start:end]], axis=2)
    return Part(keys, seen, penalty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes, sink_N, queries: Blocks, kv_BSH, band_BS, entries_BEH, seen_BSE) -> tuple[Blocks, Blocks]:
    """Output and log-sum-exp of each block of queries."""
    window, scale = sizes
    sizes = {"scale": scale, "value_dim": kv_BSH.shape[-1]}

    def of_rows(group):
        queries, kv, band, entries, seen = group
        near, entries = _finite(kv, entries)
        keys = near, band, entries, seen
        made = [attend(q, [_block(span, *keys)], sink_N, **sizes) for q, span in zip(queries, spans, strict=True)]
        return tuple(x.out.astype(q.dtype) for x, q in zip(made, queries, strict=True)), tuple(x.lse for x in made)

    spans = _spans(kv_BSH.shape[1], window)
    rows = _rows_together(queries, kv_BSH, entries_BEH)
    return _whole(_map_rows(of_rows, rows, (queries, kv_BSH, band_BS, entries_BEH, seen_BSE)))


def _attend_forward(sizes, *args):
    # Named here, for a policy of activation checkpointing to keep the very arrays that the backward reads.
    out, lse = checkpoint_name(_attend(sizes, *args), "attention")
    return (out, lse), (args, out, lse)


def _attend_backward(sizes, residuals, cotangents):
    window, scale = sizes
    (sink_N, queries, kv_BSH, band_BS, entries_BEH, seen_BSE), *made = residuals

    def of_rows(group):
        (kv, band, entries, seen), *blocks = group
        near, entries = _finite(kv, entries)
        dkv, dentries, dqueries, dsink = 0.0, 0.0, [], 0.0
        for span, (q, out, lse, dout, dlse) in zip(spans, zip(*blocks, strict=True), strict=True):
            part = _block(span, near, band, entries, seen)
            sizes = {"scale": scale, "value_dim": kv.shape[-1]}
            grads: ChunkGradients = attend_backward(q, [part], sink_N, Made(out, lse), dout, dlse, **sizes)
            first, _, end = span
            dkv += jnp.pad(grads.dkeys[0][:, : end - first], ((0, 0), (first, kv.shape[1] - end), (0, 0)))
            dentries += grads.dkeys[0][:, end - first :]
            dqueries.append(grads.dq)
            dsink += grads.dsink_N
        dentries = None if entries_BEH is None else dentries.astype(kv.dtype)
        return tuple(dqueries), dkv.astype(kv.dtype), dentries, dsink

    spans = _spans(kv_BSH.shape[1], window)
    groups = (kv_BSH, band_BS, entries_BEH, seen_BSE), queries, *made, *cotangents
    rows = _rows_together(queries, kv_BSH, entries_BEH)
    *grads, dsink = _map_rows(of_rows, rows, groups)
    dqueries, dkv, dentries = _whole(tuple(grads))
    nothing = [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (band_BS, seen_BSE)]
    return dsink.sum(axis=0).astype(sink_N.dtype), dqueries, dkv, nothing[0], dentries, nothing[1]


_attend.defvjp(_attend_forward, _attend_backward)


def attend_short(
    query_fn: Callable[[slice], jax.Array],
    output_fn: Callable[[slice, jax.Array], jax.Array],
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None,
    selection: Selection,
    *,
    scale: float,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """`banded_sparse_mqa` of a short sequence, with what comes before and after it, in blocks of queries.

    Args:
      query_fn: gives the queries of some of the tokens, [B, C, N, H]; output_fn: makes of the output for them, in q's
        dtype, [B, C, ...]. Whole queries and outputs would be copied to cut them, and held beside their blocks.

    Returns:
      [B, S, ...] of `output_fn`, and the log-sum-exp, float32 [B, S, N].
    """
    seen = None if entries_BEH is None else entry_mask(selection, entries_BEH.shape[1])
    tokens = [slice(start, end) for _, start, end in _spans(kv_BSH.shape[1], window)]
    blocks = tuple(query_fn(some) for some in tokens)
    out, lse = _attend((window, scale), sink_N, blocks, kv_BSH, band_BS, entries_BEH, seen)
    made = [output_fn(some, block) for some, block in zip(tokens, out, strict=True)]
    return jnp.concatenate(made, axis=1), jnp.concatenate(lse, axis=1)
