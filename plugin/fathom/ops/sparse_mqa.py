"""Sparse attention to one shared key-value: each query attends to its listed rows, with a sink.

`sparse_mqa` is the core: rows listed by number, as V3.2's latent attention selects them. `banded_sparse_mqa` is V4's
composition: a band of recent keys and a selection of compressed entries through one softmax. All heads share keys, keys
are values, and a head's sink joins the denominator only, unscaled (models/deepseek_v4/README.md "Attention").

What holds in every version:
  * A row number that is negative or past the last row is skipped. A row listed more than once counts once.
  * A query that sees nothing gives 0. A sink of -inf is no sink; one of +inf takes all the weight: output 0,
    log-sum-exp +inf, and no NaN in any gradient.
  * A row that a query does not see has no influence on it, forward or backward, not even when it holds NaN.
  * float32 or bfloat16 in; scores, softmax and every sum are float32. Gradients of rows are summed in float32, in an
    order that does not change from run to run.

Versions behind one signature:
  reference  the meaning, over all queries x rows, differentiated by JAX.
  masked     a chunk of queries against the rows from the first to the last that any of them sees, under a mask.
  gathered   each query's own rows, gathered; the cost does not grow with the number of rows.
  short      V4's composition up to 256 tokens (ops/sparse_mqa_short.py).
"auto" takes the short version where it can, and gathers where there are more than `GATHER_BEYOND` times as many rows as
each query lists. Neither masked nor gathered holds anything of size queries x rows or queries x listed x channels of
the whole sequence, and the backward of each keeps the arguments, the output and its log-sum-exp.

Letters: B batch, S queries, T rows, E entries, N heads, H key channels, V value channels, K rows listed per query.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fathom.ops import sparse_mqa_chunks as chunks
from fathom.ops import sparse_mqa_short
from fathom.ops.attention_chunk import Made
from fathom.ops.platform import program_platform
from fathom.ops.precision import precision_of
from fathom.ops.selection import Selected, Selection, entry_mask
from fathom.ops.sparse_mqa_short import attend_short

logger = logging.getLogger(__name__)

GATHER_BEYOND = 8
"""Rows per listed row beyond which gathering is faster. Measured on a CPU, at 8 and at 16; on a TPU it is where the
masked version's extra products pass those of the gathers; the GPU's is taken from the TPU (BENCHMARKS.md)."""

QUERY_CHUNK = 64
"""Queries per step."""


@functools.cache
def _log_choice(version: str, rows: int, listed: int | None, platform: str) -> None:
    per_query = "a range" if listed is None else f"{listed} listed"
    logger.info("sparse attention: %s version for %d rows, %s per query, on %s", version, rows, per_query, platform)


def choose_version(implementation: str, num_rows: int, selection: Selection) -> str:
    """ "masked" or "gathered", by the stated rule or as forced. A range is never gathered: it has no list.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in ("auto", "masked", "gathered"):
        raise ValueError(
            f"unknown sparse attention implementation {implementation!r}; "
            "expected 'auto', 'reference', 'masked' or 'gathered'"
        )
    if not isinstance(selection, Selected):
        return "masked"
    if implementation != "auto":
        return implementation
    platform, listed = program_platform(), selection.indices_BSK.shape[-1]
    version = "gathered" if num_rows > GATHER_BEYOND * listed else "masked"
    _log_choice(version, num_rows, listed, platform)
    return version


def make_plan(
    implementation: str,
    query_chunk: int | None,
    num_rows: int,
    selection: Selection,
    *,
    scale: float,
    window: int,
    value_dim: int,
) -> chunks.Plan:
    """Everything static of one call."""
    version = choose_version(implementation, num_rows, selection)
    return chunks.Plan(scale, window, value_dim, version, query_chunk or QUERY_CHUNK)


def attend_reference(
    q_BSNH: jax.Array,
    keys_BTH: jax.Array,
    seen_BST: jax.Array,
    sink_N: jax.Array,
    *,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """The meaning: output [B, S, N, V] and log-sum-exp [B, S, N] of one softmax over the keys seen and the sink."""
    # Zeros in the place of keys that are not finite, for 0 * NaN is NaN; who sees such a key gets the NaN as a score.
    finite = jnp.isfinite(keys_BTH).all(axis=-1)
    keys_BTH = jnp.where(finite[..., None], keys_BTH, 0)
    seen = seen_BST[:, :, None, :]
    precision, f32 = precision_of(q_BSNH), jnp.float32
    scores = jnp.einsum("bsnh,bth->bsnt", q_BSNH, keys_BTH, precision=precision, preferred_element_type=f32)
    scores = scores * scale + jnp.where(finite, 0.0, jnp.nan)[:, None, None, :]
    sink = jnp.broadcast_to(sink_N.astype(f32), scores.shape[:3])
    bounded = jnp.isfinite(sink)
    peak = jnp.where(seen, scores, -jnp.inf).max(axis=-1, initial=-jnp.inf)
    peak = jnp.maximum(peak, jnp.where(bounded, sink, -jnp.inf))
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
    # `where` inside and outside of exp: the gradient of what is left out must be 0, and not 0 * inf.
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, peak[..., None]) - peak[..., None]), 0.0)
    total = weights.sum(axis=-1) + jnp.where(bounded, jnp.exp(jnp.where(bounded, sink, peak) - peak), 0.0)
    values = keys_BTH[..., :value_dim]
    out = jnp.einsum(
        "bsnt,bth->bsnh", weights.astype(values.dtype), values, precision=precision, preferred_element_type=f32
    )
    nothing, everything = total == 0, sink == jnp.inf
    total = jnp.where(nothing, 1.0, total)
    out = jnp.where((nothing | everything)[..., None], 0.0, out / total[..., None])
    lse = jnp.where(everything, sink, jnp.where(nothing, -jnp.inf, peak + jnp.log(total)))
    return out.astype(q_BSNH.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: chunks.Plan, q_BSNH, keys, sink_N, band_BS, rows_BTH, selection):
    return chunks.forward(plan, q_BSNH, keys, sink_N, band_BS, chunks.prepare_rows(plan, rows_BTH), selection)


def _attention_forward(plan, *args):
    # Named here, for a policy of activation checkpointing to keep the very arrays that the backward reads.
    out, lse = checkpoint_name(_attention(plan, *args), "attention")
    return (out, lse), (args, Made(out, lse))


def _attention_backward(plan, residuals, cotangents):
    (q_BSNH, keys, sink_N, band_BS, rows_BTH, selection), made = residuals
    rows = chunks.prepare_rows(plan, rows_BTH)
    owed = chunks.nothing_owed(plan, keys)
    grads = chunks.backward(
        plan, q_BSNH, keys, sink_N, band_BS, rows, selection, made, *cotangents, owed, chunks.zero_gradient(rows)
    )
    return (
        grads.dq,
        chunks.keys_gradient(grads.owed, grads.dkv_BSH),
        grads.dsink_N.astype(sink_N.dtype),
        chunks.no_gradient(band_BS),
        chunks.rows_gradient(grads.drows, rows_BTH),
        chunks.no_gradient(selection),
    )


_attention.defvjp(_attention_forward, _attention_backward)


def sparse_mqa(
    q_BSNH: jax.Array,
    kv_BTH: jax.Array,
    indices_BSK: jax.Array,
    sink_N: jax.Array | None = None,
    *,
    scale: float,
    value_dim: int | None = None,
    implementation: str = "auto",
    query_chunk: int | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Each query attends to its listed rows.

    Args:
      q_BSNH: queries; kv_BTH: the rows, of q's dtype, float32 or bfloat16. T may be 0.
      indices_BSK: int32 row numbers, in any order; see the top of the file for numbers out of range and repeated.
        Nothing else decides who sees what: causality is in the list.
      sink_N: one logit per head that joins the denominator, not multiplied by `scale`; None is -inf.
      scale: multiplies q . k.
      value_dim: values are the first `value_dim` channels of the rows; all of them unless given.
      implementation: "auto", "reference", "masked" or "gathered".
      query_chunk: queries per step, in each row of the batch; `QUERY_CHUNK` unless given.
      return_lse: also return the log-sum-exp, which may be differentiated too.

    Returns:
      [B, S, N, V] in q's dtype; with return_lse also float32 [B, S, N], the log of the sum of exp(score), sink
      included, -inf where a query sees nothing and has no sink.

    Raises:
      ValueError: for shapes or dtypes that do not fit, or an unknown implementation.
    """
    value_dim = kv_BTH.shape[-1] if value_dim is None else value_dim
    if sink_N is None:
        sink_N = jnp.full(q_BSNH.shape[2], -jnp.inf, jnp.float32)
    selection = Selected(indices_BSK)
    _check(q_BSNH, kv_BTH, "rows", sink_N, value_dim, selection)
    if implementation == "reference":
        seen = entry_mask(selection, kv_BTH.shape[1])
        out, lse = attend_reference(q_BSNH, kv_BTH, seen, sink_N, scale=scale, value_dim=value_dim)
    else:
        plan = make_plan(
            implementation, query_chunk, kv_BTH.shape[1], selection, scale=scale, window=0, value_dim=value_dim
        )
        out, lse = _attention(plan, q_BSNH, None, sink_N, None, kv_BTH, selection)
    return (out, lse) if return_lse else out


def banded_sparse_mqa(
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None = None,
    selection: Selection = None,
    *,
    scale: float,
    window: int,
    earlier_BWH: jax.Array | None = None,
    implementation: str = "auto",
    query_chunk: int | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """V4's attention: a band of recent keys and a selection of compressed entries in one softmax, with sinks.

    The band is computed as a band: `window - 1` keys before a chunk of queries and the chunk's own. Entries listed
    are read as in `sparse_mqa`; of a range of entries a chunk reads about what its queries see.

    Args:
      q_BSNH: queries. kv_BSH: the tokens' shared key-values. Of one dtype, float32 or bfloat16.
      sink_N: float32, one logit per head that joins the denominator, not multiplied by `scale`.
      band_BS: int32, how many recent tokens (itself included) each query sees; at most `window` count.
      entries_BEH: compressed key-values, or None.
      selection: which entries each query sees; required when there are entries.
      scale: multiplies q . k.
      window: the longest band, at least 1.
      earlier_BWH: the `window - 1` key-values before the first query, where these are a stretch of a longer sequence.
      implementation, query_chunk, return_lse: as in `sparse_mqa`.

    Returns:
      [B, S, N, H] in q's dtype; with return_lse also float32 [B, S, N]. A query that sees nothing gets 0.

    Raises:
      ValueError: for entries without a selection, shapes or dtypes that do not fit, or an unknown implementation.
    """
    num_entries = 0 if entries_BEH is None else entries_BEH.shape[1]
    entries_BEH, selection = check_entries(entries_BEH, selection)
    _check(q_BSNH, kv_BSH, "key-values", sink_N, kv_BSH.shape[-1], None)
    if num_entries:
        _check(q_BSNH, entries_BEH, "entries", sink_N, kv_BSH.shape[-1], selection)
    length, value_dim = q_BSNH.shape[1], kv_BSH.shape[-1]
    if is_short(implementation, length, earlier_BWH):
        attended = kv_BSH, sink_N, band_BS, entries_BEH, selection
        whole = functools.partial(attend_in_blocks, lambda _, q: q, lambda _, q, out: out, (), q_BSNH)
        out, lse = whole(*attended, scale=scale, window=window)
        return (out, lse) if return_lse else out
    band_BS = clip_band(band_BS, window, whole=earlier_BWH is None)
    keys = with_earlier(kv_BSH, earlier_BWH, window)
    if implementation == "reference":
        distance = jnp.arange(length)[:, None] + window - 1 - jnp.arange(keys.shape[1])
        seen = (distance >= 0) & (distance < band_BS[..., None])
        if num_entries:
            keys = jnp.concatenate([keys, entries_BEH], axis=1)
            seen = jnp.concatenate([seen, entry_mask(selection, num_entries)], axis=2)
        out, lse = attend_reference(q_BSNH, keys, seen, sink_N, scale=scale, value_dim=value_dim)
    else:
        plan = make_plan(
            implementation, query_chunk, num_entries, selection, scale=scale, window=window, value_dim=value_dim
        )
        out, lse = _attention(plan, q_BSNH, keys, sink_N, band_BS, entries_BEH, selection)
    return (out, lse) if return_lse else out


def is_short(implementation: str, length: int, earlier_BWH: jax.Array | None) -> bool:
    """Whether a sequence is worked through in a few blocks (ops/sparse_mqa_short.py)."""
    return implementation == "auto" and length <= sparse_mqa_short.LENGTH and earlier_BWH is None


def attend_in_blocks(
    query_fn: Callable[[Any, Any], jax.Array],
    output_fn: Callable[[Any, Any, jax.Array], jax.Array],
    params: Any,
    inputs: Any,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    band_BS: jax.Array,
    entries_BEH: jax.Array | None = None,
    selection: Selection = None,
    *,
    scale: float,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """`attend_in_chunks` (ops/chunked_layer.py) of a sequence that `is_short`: the same arguments and results.

    Blocks follow one another in the program, and jax derives what surrounds the attention, so that the functions may
    be any.

    Raises:
      ValueError: for entries without a selection.
    """
    entries_BEH, selection = check_entries(entries_BEH, selection)
    num_entries = 0 if entries_BEH is None else entries_BEH.shape[1]
    listed = selection.indices_BSK.shape[-1] if isinstance(selection, Selected) else None
    _log_choice("short", num_entries, listed, program_platform())

    def of(tokens: slice):
        return jax.tree.map(lambda x: x[:, tokens], inputs)

    return attend_short(
        lambda tokens: query_fn(params, of(tokens)),
        lambda tokens, out: output_fn(params, of(tokens), out),
        kv_BSH,
        sink_N,
        clip_band(band_BS, window),
        entries_BEH if num_entries else None,
        selection,
        scale=scale,
        window=window,
    )


def clip_band(band_BS: jax.Array, window: int, *, whole: bool = True) -> jax.Array:
    """The band within the window and, of a whole sequence, within the tokens there are."""
    return jnp.clip(band_BS, 0, jnp.minimum(jnp.arange(band_BS.shape[1]) + 1, window) if whole else window)


def with_earlier(kv_BSH: jax.Array, earlier_BWH: jax.Array | None, window: int) -> jax.Array:
    """Keys after those that precede them, zeros where there are none: [B, W + S, H] with W = window - 1.

    Raises:
      ValueError: when the earlier ones are not `window - 1`.
    """
    if earlier_BWH is None:
        return jnp.pad(kv_BSH, ((0, 0), (window - 1, 0), (0, 0)))
    if earlier_BWH.shape[1] != window - 1:
        raise ValueError(f"{earlier_BWH.shape[1]} earlier key-values, expected {window - 1} for a window of {window}")
    return jnp.concatenate([earlier_BWH, kv_BSH], axis=1)


def check_entries(entries_BEH: jax.Array | None, selection: Selection) -> tuple[jax.Array | None, Selection]:
    """No entries and no selection where there are none to see.

    Raises:
      ValueError: for entries without a selection.
    """
    num_entries = 0 if entries_BEH is None else entries_BEH.shape[1]
    if num_entries and selection is None:
        raise ValueError(
            f"attention got {num_entries} compressed entries and no selection; pass a VisibleRange or Selected"
        )
    return entries_BEH, selection if num_entries else None


def _check(q_BSNH, rows_BTH, name: str, sink_N, value_dim: int, selection: Selection) -> None:
    batch, length, heads, width = q_BSNH.shape
    if rows_BTH.shape[0] != batch or rows_BTH.shape[-1] != width:
        raise ValueError(f"{name} have shape {rows_BTH.shape}, expected [{batch}, any, {width}] to fit the queries")
    if rows_BTH.dtype != q_BSNH.dtype:
        raise ValueError(f"{name} are {rows_BTH.dtype}, expected the queries' {q_BSNH.dtype}; cast one of them")
    if sink_N.shape != (heads,):
        raise ValueError(f"sinks have shape {sink_N.shape}, expected one for each of {heads} heads")
    if not 0 < value_dim <= width:
        raise ValueError(f"value_dim is {value_dim}, expected 1 to {width}, the channels of the {name}")
    for part in selection or ():
        if part.shape[:2] != (batch, length) or not jnp.issubdtype(part.dtype, np.integer):
            raise ValueError(
                f"the selection is {part.dtype}{list(part.shape)}, expected integers [{batch}, {length}, ...]"
            )
