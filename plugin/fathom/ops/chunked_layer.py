"""An attention sublayer in stretches of queries: projection, attention, projection, and nothing wide kept.

V4-Flash's queries and attention outputs are eight times as wide as its residual stream: 8 GiB each at 128K tokens in
bfloat16. `attend_in_chunks` makes the queries of a stretch, attends, and projects the output before it goes on to the
next. The backward does so again; it keeps nothing but the arguments and the log-sum-exp, and sums the gradients of the
weights, of the sinks and of the entries in float32.

Letters: B batch, S queries, N heads, H key channels, V value channels, E entries, C queries of a stretch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fathom.ops import sparse_mqa_chunks as chunks
from fathom.ops.attention_chunk import Made
from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.selection import Selection, selection_chunks
from fathom.ops.sparse_mqa import check_entries, clip_band, make_plan, with_earlier

Tree = Any

SHORTEST_STRETCH = 1024
"""Queries of a stretch at the least: enough of them that reading the weights, and adding to their gradients, is not
what takes the time."""
STRETCH_BYTES = 1 << 26
"""What the queries of a stretch may take: 1,024 of V4-Flash's in bfloat16."""


def stretch_length(heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Queries of a stretch, a power of two: as many as `STRETCH_BYTES` holds, and never fewer than the shortest."""
    fit = STRETCH_BYTES // (heads * head_dim * jnp.dtype(dtype).itemsize)
    return max(SHORTEST_STRETCH, 1 << (fit.bit_length() - 1) if fit else 0)


class Functions(NamedTuple):
    """What `attend_in_chunks` is given, and the queries of a stretch; static."""

    query: Callable[[Tree, Tree], jax.Array]
    output: Callable[[Tree, Tree, jax.Array], jax.Array]
    chunk: int


def attend_in_chunks(
    query_fn: Callable[[Tree, Tree], jax.Array],
    output_fn: Callable[[Tree, Tree, jax.Array], jax.Array],
    params: Tree,
    inputs: Tree,
    kv_BSH: jax.Array | None,
    sink_N: jax.Array,
    band_BS: jax.Array | None = None,
    entries_BEH: jax.Array | None = None,
    selection: Selection = None,
    *,
    scale: float,
    window: int,
    value_dim: int | None = None,
    earlier_BWH: jax.Array | None = None,
    implementation: str = "auto",
    query_chunk: int | None = None,
    layer_chunk: int = SHORTEST_STRETCH,
) -> tuple[jax.Array, jax.Array]:
    """`output_fn` of the attention of `query_fn`'s queries, a stretch of queries at a time, and its log-sum-exp.

    Equal to `output_fn(params, inputs, banded_sparse_mqa(query_fn(params, inputs), ...))`, forward and backward,
    for functions that treat each query alone.

    Args:
      query_fn: (params, inputs of a stretch) -> queries [B, C, N, H].
      output_fn: (params, inputs of a stretch, attention output [B, C, N, V]) -> [B, C, ...]. It must be linear in
        the attention output, as a rotation and projections are: its gradient is taken before that output is known.
        Both functions must be pure, and may not close over arrays that are traced or differentiated.
      params: weights, float32 or bfloat16; every leaf is differentiated.
      inputs: arrays [B, S, ...], one value per query; the floating-point ones are differentiated.
      kv_BSH, band_BS, earlier_BWH: as in `banded_sparse_mqa`; both None when window is 0, which is `sparse_mqa`.
      sink_N, entries_BEH, selection, scale, window: as in `banded_sparse_mqa`.
      value_dim: values are the first `value_dim` channels of the keys; all unless given.
      implementation: "auto", "masked" or "gathered".
      query_chunk: queries per step of the attention.
      layer_chunk: C.

    Returns:
      [B, S, ...] in the dtype of `output_fn`, and the log-sum-exp float32 [B, S, N], a constant.

    Raises:
      ValueError: for entries without a selection, neither keys nor entries, or an unknown implementation.
    """
    entries_BEH, selection = check_entries(entries_BEH, selection)
    keys = kv_BSH if window else entries_BEH
    if keys is None:
        raise ValueError(f"attention got window {window} and no {'keys' if window else 'entries'} to attend to")
    plan = make_plan(
        implementation,
        query_chunk,
        0 if entries_BEH is None else entries_BEH.shape[1],
        selection,
        scale=scale,
        window=window,
        value_dim=keys.shape[-1] if value_dim is None else value_dim,
    )
    length = jax.tree.leaves(inputs)[0].shape[1]
    functions = Functions(query_fn, output_fn, min(layer_chunk, length))
    near = None
    if window:
        band_BS = clip_band(band_BS, window, whole=earlier_BWH is None)
        near = with_earlier(kv_BSH, earlier_BWH, window)
    else:
        band_BS = None
    y, lse = _layer(plan, functions, params, inputs, near, sink_N, band_BS, entries_BEH, selection)
    return y, jax.lax.stop_gradient(lse)


def _stretches(functions: Functions, inputs: Tree, band_BS, selection: Selection):
    """What a step reads: its number and its stretch of everything that is per query."""
    leaves = jax.tree.leaves(inputs)
    count = -(-leaves[0].shape[1] // functions.chunk)
    inputs, band_BS = jax.tree.map(lambda x: to_chunks(x, functions.chunk), (inputs, band_BS))
    return jnp.arange(count), inputs, band_BS, selection_chunks(selection, functions.chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(plan, functions, params, inputs, keys, sink_N, band_BS, entries_BEH, selection):
    length = jax.tree.leaves(inputs)[0].shape[1]
    rows = chunks.prepare_rows(plan, entries_BEH)
    keys = chunks.pad_keys(keys, length, functions.chunk)

    def step(_, xs):
        number, inputs, band, picked = xs
        near = chunks.keys_of_chunk(plan, keys, number, functions.chunk)
        q = functions.query(params, inputs)
        out, lse = chunks.forward(plan, q, near, sink_N, band, rows, picked)
        return None, (functions.output(params, inputs, out), lse)

    _, (y, lse) = jax.lax.scan(step, None, _stretches(functions, inputs, band_BS, selection))
    return from_chunks(y, length), from_chunks(lse, length)


def _layer_forward(plan, functions, *args):
    # Named here, for a policy of activation checkpointing to keep the very arrays that the backward reads.
    y, lse = checkpoint_name(_layer(plan, functions, *args), "attention")
    return (y, lse), (args, lse)


class _Inputs(NamedTuple):
    """A tree of inputs taken apart: the floating-point leaves, which are differentiated, and the others."""

    floats: list[jax.Array]
    others: list[jax.Array]

    @classmethod
    def of(cls, tree: Tree) -> _Inputs:
        leaves = jax.tree.leaves(tree)
        return cls([x for x in leaves if _is_float(x)], [x for x in leaves if not _is_float(x)])

    def join(self, like: Tree) -> Tree:
        """The tree again; `like` tells which leaves are which."""
        floats, others = iter(self.floats), iter(self.others)
        return jax.tree.map(lambda x: next(floats) if _is_float(x) else next(others), like)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _layer_backward(plan, functions, residuals, cotangents):
    (params, inputs, unpadded, sink_N, band_BS, entries_BEH, selection), lse = residuals
    dy, _ = cotangents
    length, chunk = dy.shape[1], functions.chunk
    rows = chunks.prepare_rows(plan, entries_BEH)
    keys = chunks.pad_keys(unpadded, length, chunk)

    def step(carry, xs):
        dparams, dsink, owed, drows = carry
        (number, here, band, picked), lse, dy = xs
        floats, others = _Inputs.of(here)

        def make_queries(params, floats):
            return functions.query(params, _Inputs(floats, others).join(here))

        def project(params, floats, out):
            return functions.output(params, _Inputs(floats, others).join(here), out)

        q, pull_queries = jax.vjp(make_queries, params, floats)
        blank = jnp.zeros((*q.shape[:3], plan.value_dim), q.dtype)
        _, pull_out = jax.vjp(lambda out: project(params, floats, out), blank)
        near = chunks.keys_of_chunk(plan, keys, number, chunk)
        grads = chunks.backward(
            plan, q, near, sink_N, band, rows, picked, Made(None, lse), *pull_out(dy), None, owed, drows
        )
        _, pull_project = jax.vjp(lambda params, floats: project(params, floats, grads.out), params, floats)
        terms = pull_queries(grads.dq), pull_project(dy)
        dparams = jax.tree.map(lambda total, *parts: sum((x.astype(total.dtype) for x in parts), total),
                               dparams, *(params for params, _ in terms))  # fmt: skip
        dfloats = jax.tree.map(jnp.add, *(floats for _, floats in terms))
        return (dparams, dsink + grads.dsink_N, grads.owed, grads.drows), (dfloats, grads.dkv_BSH)

    start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params),
        jnp.zeros(sink_N.shape, jnp.float32),
        chunks.nothing_owed(plan, unpadded),
        chunks.zero_gradient(rows),
    )
    xs = _stretches(functions, inputs, band_BS, selection), to_chunks(lse, chunk), to_chunks(dy, chunk)
    (dparams, dsink, owed, drows), ys = jax.lax.scan(step, start, xs, reverse=True)
    dparams = jax.tree.map(lambda d, x: d.astype(x.dtype), dparams, params)
    # The float32 sums end here, before anything else is computed.
    dparams, dsink, drows, ys = jax.lax.optimization_barrier((dparams, dsink, drows, ys))
    dfloats, dkv = jax.tree.map(lambda y: from_chunks(y, length), ys)
    return (
        dparams,
        _Inputs(dfloats, chunks.no_gradient(_Inputs.of(inputs).others)).join(inputs),
        chunks.keys_gradient(owed, dkv),
        dsink.astype(sink_N.dtype),
        chunks.no_gradient(band_BS),
        chunks.rows_gradient(drows, entries_BEH),
        chunks.no_gradient(selection),
    )


_layer.defvjp(_layer_forward, _layer_backward)
