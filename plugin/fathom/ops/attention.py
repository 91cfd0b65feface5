"""V4's attention in one meaning: a band of recent keys plus a set of compressed entries, with a sink.

Each query s attends to the `band[s]` most recent tokens (itself included) and to compressed entries: those listed
(CSA), a contiguous range (HCA), or none (sliding). Keys are values (one shared 512-wide vector for all heads), all
of it goes through one softmax, and each head's sink joins the denominator only, unscaled
(models/deepseek_v4/README.md "Attention").

Versions behind `shared_kv_attention`:
  reference  the meaning, written over all queries x keys.
  chunked    `query_chunk` queries at a time; the band is read as a band, and nothing of size
             queries x keys of the whole sequence is ever held, in the backward either.
"auto" takes the reference for sequences of at most one chunk and the chunked version beyond.

Letters: B batch, S queries, C queries of a chunk, T keys, E entries, N heads, H head dim, K selected.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fathom.ops.precision import precision_of

logger = logging.getLogger(__name__)

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


def _attend(
    q_BCNH: jax.Array,
    parts: list[tuple[jax.Array, jax.Array]],
    sink: jax.Array,
    scale: float,
) -> jax.Array:
    """One softmax over several (keys [B, T, H], mask [B, C, T]) parts with the sink in the denominator.

    `sink` broadcasts to [B, C, N].
    """
    scores, precision = [], precision_of(q_BCNH)
    for keys_BTH, mask_BCT in parts:
        score = jnp.einsum(
            "bcnh,bth->bcnt", q_BCNH, keys_BTH, precision=precision, preferred_element_type=jnp.float32
        )
        scores.append(jnp.where(mask_BCT[:, :, None, :], score * scale, MASKED))
    sink = sink.astype(jnp.float32)[..., None]
    peak = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scores], sink)
    peak = jax.lax.stop_gradient(peak)
    total = jnp.exp(sink - peak)
    out = jnp.zeros((*q_BCNH.shape,), jnp.float32)
    for score, (keys_BTH, mask_BCT) in zip(scores, parts, strict=True):
        weight = jnp.where(mask_BCT[:, :, None, :], jnp.exp(score - peak), 0.0)
        total = total + weight.sum(axis=-1, keepdims=True)
        out = out + jnp.einsum(
            "bcnt,bth->bcnh",
            weight.astype(q_BCNH.dtype),
            keys_BTH,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
    return (out / total).astype(q_BCNH.dtype)


def shared_kv_attention_reference(
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None,
    selection: Selection,
    *,
    scale: float,
    window: int,
) -> jax.Array:
    """The meaning, over all queries x keys; arguments as in `shared_kv_attention`."""
    index = jnp.arange(q_BSNH.shape[1])
    distance = index[:, None] - index[None, :]
    recent = (distance >= 0) & (distance < jnp.minimum(band_BS, window)[..., None])
    parts = [(kv_BSH, recent)]
    if entries_BEH is not None and entries_BEH.shape[1]:
        parts.append((entries_BEH, entry_mask(selection, entries_BEH.shape[1])))
    return _attend(q_BSNH, parts, sink_N, scale)


def to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [S / chunk, B, chunk, ...], zero-padded at the end of S."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `to_chunks`, dropping the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def _recent_keys(kv_BSH: jax.Array, chunk: int, window: int) -> jax.Array:
    """For each chunk its own keys preceded by the window - 1 before it: [S/chunk, B, window-1+chunk, H]."""
    chunks = to_chunks(kv_BSH, chunk)
    count = chunks.shape[0]
    reach = -(-(window - 1) // chunk)  # how many earlier chunks the window reaches into
    blank = jnp.zeros_like(chunks)
    earlier = [
        jnp.concatenate([blank[:back], chunks[: max(count - back, 0)]])[:count]
        for back in range(reach, 0, -1)
    ]
    joined = jnp.concatenate([*earlier, chunks], axis=2)
    return joined[:, :, reach * chunk - (window - 1) :]


def shared_kv_attention_chunked(
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None,
    selection: Selection,
    *,
    scale: float,
    window: int,
    query_chunk: int,
) -> jax.Array:
    """`query_chunk` queries at a time, recomputed in the backward; arguments as in `shared_kv_attention`."""
    length = q_BSNH.shape[1]
    has_entries = entries_BEH is not None and entries_BEH.shape[1] > 0
    offset = jnp.arange(query_chunk)[:, None] + (window - 1) - jnp.arange(
        query_chunk + window - 1
    )

    # One copy per row: its gradient is summed over the rows once, after the loop, and not in every step.
    sink_B1N = jnp.broadcast_to(sink_N, (q_BSNH.shape[0], 1, sink_N.shape[0]))
    # The loop's backward adds up one gradient of all entries per chunk; in bfloat16 the later ones would be lost.
    wide_BEH = entries_BEH.astype(jnp.float32) if has_entries else None

    @jax.checkpoint
    def one_chunk(chunk):
        q_BCNH, keys_BTH, band_BC, selected = chunk
        recent = (offset >= 0) & (offset < jnp.minimum(band_BC, window)[..., None])
        parts = [(keys_BTH, recent)]
        if has_entries:
            mask = entry_mask(type(selection)(*selected), entries_BEH.shape[1])
            parts.append((wide_BEH.astype(entries_BEH.dtype), mask))
        return _attend(q_BCNH, parts, sink_B1N, scale)

    selected = tuple(to_chunks(part, query_chunk) for part in selection) if has_entries else ()
    chunks = (
        to_chunks(q_BSNH, query_chunk),
        _recent_keys(kv_BSH, query_chunk, window),
        to_chunks(band_BS, query_chunk),
        selected,
    )
    return from_chunks(jax.lax.map(one_chunk, chunks), length)


@functools.cache
def _log_choice(choice: str, length: int, entries: int) -> None:
    logger.info("attention: %s version for %d queries, %d entries", choice, length, entries)


def shared_kv_attention(
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None = None,
    selection: Selection = None,
    *,
    scale: float,
    window: int,
    implementation: str = "auto",
    query_chunk: int = 128,
) -> jax.Array:
    """Attention over a band of recent keys and a set of compressed entries, with sinks.

    Args:
      q_BSNH: queries. kv_BSH: the tokens' shared key-values. Both float32 or bfloat16.
      sink_N: float32, one logit per head that joins the denominator, not multiplied by `scale`.
      band_BS: int32, how many recent tokens (itself included) each query sees; at most `window` count.
      entries_BEH: compressed key-values, or None.
      selection: which entries each query sees; required when there are entries.
      scale: multiplies q . k.
      window: the longest band.
      implementation: "auto", "reference" or "chunked".
      query_chunk: queries per step of the chunked version.

    Returns:
      [B, S, N, H] in q's dtype, accumulated in float32. A query that sees nothing gets 0.

    Raises:
      ValueError: for entries without a selection, or an unknown implementation.
    """
    num_entries = 0 if entries_BEH is None else entries_BEH.shape[1]
    if num_entries and selection is None:
        raise ValueError(
            f"attention got {num_entries} compressed entries and no selection; "
            "pass a VisibleRange or Selected"
        )
    if implementation == "auto":
        implementation = "reference" if q_BSNH.shape[1] <= query_chunk else "chunked"
        _log_choice(implementation, q_BSNH.shape[1], num_entries)
    args = (q_BSNH, kv_BSH, sink_N, band_BS, entries_BEH, selection)
    if implementation == "reference":
        return shared_kv_attention_reference(*args, scale=scale, window=window)
    if implementation == "chunked":
        return shared_kv_attention_chunked(
            *args, scale=scale, window=window, query_chunk=query_chunk
        )
    raise ValueError(
        f"unknown attention implementation {implementation!r}; "
        "expected 'auto', 'reference' or 'chunked'"
    )
