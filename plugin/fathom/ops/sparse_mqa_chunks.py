"""A sequence of queries in chunks: a band of recent keys and rows selected, forward and backward.

What `sparse_mqa`, `banded_sparse_mqa` and `attend_in_chunks` share. Queries come with the `window - 1` keys that
precede the first of them, so that a stretch of a longer sequence is the same case as a whole one. The backward goes
from the last chunk to the first: when a chunk is done, the gradients of its own keys are complete and written once,
and what it owes to the keys before them is handed on.

Letters: B batch, S queries, C queries of a chunk, N heads, H key channels, V value channels, T rows, W = window - 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fathom.ops import sparse_mqa_gathered, sparse_mqa_masked
from fathom.ops.attention_chunk import Made, Part, attend, attend_backward, masked_part
from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.platform import program_platform
from fathom.ops.selection import Selection, selection_chunks

VERSIONS = {"masked": sparse_mqa_masked, "gathered": sparse_mqa_gathered}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static. window 0: no band. version: how rows are read, "masked" or "gathered"."""

    scale: float
    window: int
    value_dim: int
    version: str
    query_chunk: int

    @property
    def earlier(self) -> int:
        """W: how many keys before a query its band may reach."""
        return max(self.window - 1, 0)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"scale": self.scale, "value_dim": self.value_dim}


class Rows(NamedTuple):
    """Rows as the version wants them, and how many they are; nothing and 0 where there are none."""

    prepared: Any
    count: int


def prepare_rows(plan: Plan, rows_BTH: jax.Array | None) -> Rows:
    if rows_BTH is None or rows_BTH.shape[1] == 0:
        return Rows(None, 0)
    return Rows(VERSIONS[plan.version].prepare(rows_BTH), rows_BTH.shape[1])


def zero_gradient(rows: Rows) -> jax.Array | None:
    """Where the gradient of the rows is summed: float32, of the shape of the prepared rows."""
    return jnp.zeros(jax.tree.leaves(rows.prepared)[0].shape, jnp.float32) if rows.count else None


def rows_gradient(drows: jax.Array | None, rows_BTH: jax.Array | None) -> jax.Array | None:
    """The sum as the gradient of the rows themselves."""
    if drows is None:
        return None if rows_BTH is None else jnp.zeros_like(rows_BTH)
    return drows[:, : rows_BTH.shape[1]].astype(rows_BTH.dtype)


def no_gradient(tree: Any) -> Any:
    """The gradient of integers, as JAX wants it."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tree)


def nothing_owed(plan: Plan, keys: jax.Array | None) -> jax.Array | None:
    """What the queries after the last owe to its W keys: float32 zeros [B, W, H]."""
    return jnp.zeros((keys.shape[0], plan.earlier, keys.shape[2]), jnp.float32) if plan.window else None


def keys_gradient(owed: jax.Array | None, dkv_BSH: jax.Array | None) -> jax.Array | None:
    """The gradient of keys [B, W + S, H]: what is owed to the first W, and the rest."""
    return None if dkv_BSH is None else jnp.concatenate([owed.astype(dkv_BSH.dtype), dkv_BSH], axis=1)


def keys_of_chunk(plan: Plan, keys: jax.Array | None, number: jax.Array, chunk: int) -> jax.Array | None:
    """A chunk's own keys and the W before them, of keys that have W before the first: [B, W + C, H]."""
    if not plan.window:
        return None
    return jax.lax.dynamic_slice_in_dim(keys, number * chunk, chunk + plan.earlier, axis=1)


def pad_keys(keys: jax.Array | None, length: int, chunk: int) -> jax.Array | None:
    """Keys up to the end of the last chunk."""
    return None if keys is None else jnp.pad(keys, ((0, 0), (0, -length % chunk), (0, 0)))


def _band(plan: Plan, keys: jax.Array | None, band_BC: jax.Array | None) -> list[Part]:
    if not plan.window:
        return []
    chunk = band_BC.shape[1]
    distance = jnp.arange(chunk)[:, None] + plan.earlier - jnp.arange(chunk + plan.earlier)
    return [masked_part(keys, (distance >= 0) & (distance < band_BC[..., None]))]


def _steps(chunk: int, band_BS, selection: Selection, count: int, *queries):
    """What each of `count` steps reads: its number and its chunk of everything that is per query."""
    band, queries = jax.tree.map(lambda x: to_chunks(x, chunk), (band_BS, queries))
    return jnp.arange(count), band, selection_chunks(selection, chunk), queries


def forward(
    plan: Plan,
    q_BSNH: jax.Array,
    keys: jax.Array | None,
    sink_N: jax.Array,
    band_BS: jax.Array | None,
    rows: Rows,
    selection: Selection,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, S, N, V] in q's dtype and log-sum-exp, sink included, float32 [B, S, N].

    Args:
      keys: [B, W + S, H], or None when window is 0. band_BS: at most `window`, and within the keys there are.
    """
    length = q_BSNH.shape[1]
    chunk = min(plan.query_chunk, length)
    keys = pad_keys(keys, length, chunk)

    def step(_, xs):
        number, band_BC, picked, (q,) = xs
        band = _band(plan, keys_of_chunk(plan, keys, number, chunk), band_BC)
        if rows.count:
            version = VERSIONS[plan.version]
            made = version.forward(q, band, sink_N, rows.prepared, picked, rows.count, **plan.sizes)
        else:
            made = attend(q, band, sink_N, **plan.sizes)
        return None, (made.out.astype(q.dtype), made.lse)

    _, (out, lse) = jax.lax.scan(step, None, _steps(chunk, band_BS, selection, -(-length // chunk), q_BSNH))
    return from_chunks(out, length), from_chunks(lse, length)


class Gradients(NamedTuple):
    """Of one stretch of queries.

    Attributes:
      out: the output where it was not given. dq: in q's dtype. dsink_N: float32.
      dkv_BSH: of the queries' own keys, in their dtype. owed: float32 [B, W, H], to the keys before them.
      drows: the sum so far, float32.
    """

    out: jax.Array | None
    dq: jax.Array
    dkv_BSH: jax.Array | None
    owed: jax.Array | None
    drows: jax.Array | None
    dsink_N: jax.Array


def backward(
    plan: Plan,
    q_BSNH: jax.Array,
    keys: jax.Array | None,
    sink_N: jax.Array,
    band_BS: jax.Array | None,
    rows: Rows,
    selection: Selection,
    made: Made,
    dout: jax.Array,
    dlse: jax.Array | None,
    owed: jax.Array | None,
    drows: jax.Array | None,
) -> Gradients:
    """Gradients of `forward`.

    Args:
      made: what `forward` gave, the output or None in its place.
      owed: float32 [B, W, H], what later queries owe to the last W of these keys. drows: float32 sum to add to.
    """
    length = q_BSNH.shape[1]
    chunk = min(plan.query_chunk, length)
    padding = -length % chunk
    keys = pad_keys(keys, length, chunk)
    if plan.window:
        # Laid out like the keys of the last chunk, which end with the padding.
        owed = jnp.pad(owed, ((0, 0), (chunk - padding, padding), (0, 0)))

    # Chunk by chunk the gradient of the queries takes the place of the queries, and the output, where it is made again,
    # that of its own gradient. Not so on a CPU, which then takes a tenth longer.
    again = made.out is None
    swap = again and program_platform() != "cpu"
    places = to_chunks(q_BSNH, chunk), to_chunks(dout, chunk) if swap else None

    def step(carry, xs):
        owed, drows, dsink, (queries, outputs) = carry
        number, band_BC, picked, (made, dout, dlse) = xs
        q = queries[number]
        band = _band(plan, keys_of_chunk(plan, keys, number, chunk), band_BC)
        args = made, outputs[number] if swap else dout, dlse
        if rows.count:
            grads, drows = VERSIONS[plan.version].backward(
                q, band, sink_N, rows.prepared, picked, *args, drows, rows.count, **plan.sizes
            )
        else:
            grads = attend_backward(q, band, sink_N, *args, **plan.sizes)
        dkv = None
        if plan.window:
            dkeys = grads.dkeys[0] + owed
            dkv = dkeys[:, plan.earlier :].astype(keys.dtype)
            owed = jnp.pad(dkeys[:, : plan.earlier], ((0, 0), (chunk, 0), (0, 0)))
        queries = queries.at[number].set(grads.dq)
        out = grads.out.astype(q.dtype) if again else None
        if swap:
            outputs, out = outputs.at[number].set(out), None
        return (owed, drows, dsink + grads.dsink_N, (queries, outputs)), (dkv, out)

    carry = (owed, drows, jnp.zeros(sink_N.shape, jnp.float32), places)
    xs = _steps(chunk, band_BS, selection, -(-length // chunk), made, None if swap else dout, dlse)
    (owed, drows, dsink, (dq, outputs)), (dkv, out) = jax.lax.scan(step, carry, xs, reverse=True)
    out, dq, dkv = jax.tree.map(lambda y: from_chunks(y, length), (outputs if swap else out, dq, dkv))
    return Gradients(out, dq, dkv, owed[:, chunk:] if plan.window else None, drows, dsink)
