"""The loss that trains the lightning indexer: KL(p || softmax(I)), p from the attention it selects for.

p[s, e] = sum_n exp(scale q[s, n] . k[e] - lse[s, n]), over the entries in question, then L1-normalised. lse is that of
the whole softmax of the attention (window, entries and sink), so a head that looks elsewhere counts for less. The
entries in question are all visible ones (dense warm-up) or the selected ones (sparse stage). p is a constant: gradients
reach the indexer's queries, keys and weights only (V3.2 report 2.1.1; models/deepseek_v4/README.md "Indexer").

Letters: B batch, S queries, C queries of a chunk, E entries, N attention heads, H their width, I index heads, J their
width, K selected entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.indexer import indexer_scores
from fathom.ops.precision import precision_of
from fathom.ops.ranges import for_length, seen_range, steps
from fathom.ops.selection import MASKED, Selected, VisibleRange

MAX_SCORES = 1 << 24
"""Attention scores held at a time, per row of the batch: 64 MiB in float32."""
LENGTHS, SHORTEST = 32, 512
"""How many lengths of range are compiled for at most, and the fewest entries of the shortest."""


class Teacher(NamedTuple):
    """The attention that the indexer shall foresee.

    Attributes:
      q_BSNH: its queries. keys_BEH: the entries it may select. lse_BSN: float32 log of its whole denominator.
      scale: multiplies q . k. head_axes: mesh axes over which other devices hold the other heads, inside a shard_map.
    """

    q_BSNH: jax.Array
    keys_BEH: jax.Array
    lse_BSN: jax.Array
    scale: float
    head_axes: tuple[str, ...] = ()


def _gather(keys_BEJ: jax.Array, indices_BCK: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, places: row.at[places].get(mode="clip"))(keys_BEJ, indices_BCK)


def _row_loss(scores_BCE: jax.Array, p_BCE: jax.Array, mask_BCE: jax.Array) -> jax.Array:
    """KL(p / |p| || softmax(scores)) over the masked entries, [B, C]; 0 for rows without any."""
    p = jnp.where(mask_BCE, p_BCE, 0.0)
    total = p.sum(axis=-1, keepdims=True)
    counts = total > 0
    target = jax.lax.stop_gradient(p / jnp.where(counts, total, 1.0))
    log_q = jax.nn.log_softmax(jnp.where(mask_BCE, scores_BCE, MASKED), axis=-1)
    log_target = jnp.log(jnp.where(target > 0, target, 1.0))
    return jnp.where(target > 0, target * (log_target - log_q), 0.0).sum(axis=-1)


def _all_entries(index: tuple, k_BEJ: jax.Array, teacher: Teacher, seen: VisibleRange) -> jax.Array:
    """A chunk's loss over every visible entry."""
    q_BCIJ, weights_BCI = index
    return _ranged((teacher.scale, teacher.head_axes), q_BCIJ, k_BEJ, weights_BCI, teacher[:3], seen)


def _of_range(how: tuple, start: jax.Array, size: int, arrays: tuple, teacher: tuple, seen: VisibleRange) -> jax.Array:
    """The loss over those of the entries [start, start + size) that are visible."""
    q_BCIJ, k_BEJ, weights_BCI = arrays
    tq_BCNH, keys_BEH, lse_BCN = teacher
    k_BEJ, keys_BEH = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k_BEJ, keys_BEH))
    entry = start + jnp.arange(size)
    mask = (entry >= seen.begin_BS[..., None]) & (entry < seen.end_BS[..., None])
    attention = jnp.einsum(
        "bcnh,beh->bcne", tq_BCNH, keys_BEH, precision=precision_of(tq_BCNH), preferred_element_type=jnp.float32
    )
    scale, head_axes = how
    p = _sum_of_heads(attention * scale, mask, lse_BCN, head_axes)
    return _row_loss(indexer_scores(q_BCIJ, k_BEJ, weights_BCI), p, mask)


def range_lengths(num_entries: int) -> list[int]:
    """How many entries a chunk's loss may be made of."""
    return steps(num_entries, -(-num_entries // max(1, min(LENGTHS, num_entries // SHORTEST))))


def _for_seen(num_entries: int, seen: VisibleRange, run: Callable) -> Any:
    """run(start, size) of the shortest of a few ranges that holds what the chunk sees."""
    low, high = seen_range(seen, num_entries)

    def sized(size: int) -> Any:
        return run(jnp.clip(low, 0, num_entries - size), size)

    return for_length(high - low, range_lengths(num_entries), sized)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ranged(how, q_BCIJ, k_BEJ, weights_BCI, teacher, seen):
    arrays = q_BCIJ, k_BEJ, weights_BCI
    return _for_seen(k_BEJ.shape[1], seen, lambda *span: _of_range(how, *span, arrays, teacher, seen))


def _ranged_forward(how, *args):
    return _ranged(how, *args), args


def _ranged_backward(how, residuals, dloss_BC):
    """By hand only so far that a range is chosen once more: JAX would keep what each range's backward may need."""
    *arrays, teacher, seen = residuals

    def run(start, size):
        _, pull = jax.vjp(lambda *arrays: _of_range(how, start, size, arrays, teacher, seen), *arrays)
        return pull(dloss_BC)

    return *_for_seen(arrays[1].shape[1], seen, run), None, None


_ranged.defvjp(_ranged_forward, _ranged_backward)


def _listed_entries(
    index: tuple, k_BEJ: jax.Array, teacher: Teacher, listed: Selected
) -> jax.Array:
    """A chunk's loss over the entries listed for each query; no entry twice."""
    q_BCIJ, weights_BCI = index
    tq_BCNH, keys_BEH = teacher.q_BSNH, teacher.keys_BEH
    indices = listed.indices_BSK
    mask = (indices >= 0) & (indices < k_BEJ.shape[1])
    precision = precision_of(tq_BCNH)
    attention = jnp.einsum(
        "bcnh,bckh->bcnk",
        tq_BCNH,
        _gather(keys_BEH, indices),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    products = jnp.einsum(
        "bcij,bckj->bcik",
        q_BCIJ,
        _gather(k_BEJ, indices),
        precision=precision_of(q_BCIJ),
        preferred_element_type=jnp.float32,
    )
    weights = weights_BCI.astype(jnp.float32)
    scores = jnp.einsum("bcik,bci->bck", jax.nn.relu(products), weights, precision=precision_of(weights))
    p = _sum_of_heads(attention * teacher.scale, mask, teacher.lse_BSN, teacher.head_axes)
    return _row_loss(scores, p, mask)


def _sum_of_heads(
    scores_BCNE: jax.Array, mask_BCE: jax.Array, lse_BCN: jax.Array, head_axes: tuple[str, ...]
) -> jax.Array:
    """sum_n exp(score - lse) [B, C, E] up to a factor per query, which the normalisation cancels: the largest term is
    1, so that window or sink may hold all but nothing of the weight. A head without a finite lse adds nothing.
    """
    lse = jnp.where(jnp.isfinite(lse_BCN), lse_BCN, -MASKED)[..., None]
    logs = jnp.where(mask_BCE[:, :, None], scores_BCNE - lse, MASKED)
    peak = logs.max(axis=(2, 3), keepdims=True)
    if head_axes:
        peak = jax.lax.pmax(peak, head_axes)
    total = jnp.exp(logs - jnp.where(peak > MASKED, peak, 0.0)).sum(axis=2)
    return jax.lax.psum(total, head_axes) if head_axes else total


def indexer_kl(
    q_BSIJ: jax.Array,
    k_BEJ: jax.Array,
    weights_BSI: jax.Array,
    teacher: Teacher,
    selection: VisibleRange | Selected,
    *,
    query_chunk: int = 128,
) -> jax.Array:
    """The indexer's loss of every query.

    Args:
      q_BSIJ, k_BEJ, weights_BSI: what its scores are made of, see `indexer_scores`; gradients reach these.
      teacher: the attention; a constant.
      selection: the entries in question: all that a query sees, or those it attends to (int32 [B, S, K], no entry
        twice, -1 where there are fewer).
      query_chunk: queries at a time, fewer where their attention scores would exceed MAX_SCORES.

    Returns:
      float32 [B, S]: KL in nats; 0 for a query without an entry in question.
    """
    teacher = Teacher(*jax.lax.stop_gradient(teacher[:3]), *teacher[3:])
    length, width = q_BSIJ.shape[1], k_BEJ.shape[1]
    if isinstance(selection, Selected):
        width = selection.indices_BSK.shape[-1]
    if not width:
        return jnp.zeros(q_BSIJ.shape[:2], jnp.float32)
    heads = max(teacher.q_BSNH.shape[2], q_BSIJ.shape[2])
    chunk = max(1, min(query_chunk, length, MAX_SCORES // (heads * width)))
    loss_of = _listed_entries if isinstance(selection, Selected) else _all_entries
    # The loop's backward adds up one gradient of the keys per chunk; in bfloat16 the later ones would be lost.
    wide_BEJ = k_BEJ.astype(jnp.float32)

    @jax.checkpoint
    def one_chunk(parts):
        index, (q, lse), listed = parts
        narrow = wide_BEJ.astype(k_BEJ.dtype)
        return loss_of(index, narrow, teacher._replace(q_BSNH=q, lse_BSN=lse), type(selection)(*listed))

    def chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(to_chunks(array, chunk) for array in arrays)

    parts = (chunks(q_BSIJ, weights_BSI), chunks(teacher.q_BSNH, teacher.lse_BSN), chunks(*selection))
    return from_chunks(jax.lax.map(one_chunk, parts), length)
