"""The lightning indexer's scores and selection (report eq. 13-17; models/deepseek_v4/README.md "Indexer").

score[s, e] = sum_h w[s, h] relu(q[s, h] . k[e]); each query keeps its top_k visible entries. Selection is discrete: no
gradient passes through it. An entry is a compressed window of tokens (V4) or a token (V3.2).

Letters: B batch, S queries, C queries of a chunk, E entries, N index heads, H index head dim, K = min(top_k, E).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.platform import program_platform
from fathom.ops.precision import precision_of
from fathom.ops.ranges import for_length, seen_range, steps
from fathom.ops.selection import VisibleRange
from fathom.ops.topk import bisected_topk, bisects

MAX_PRODUCTS = 1 << 26
"""Products of queries and keys held at a time: 256 MiB in float32."""
LENGTHS = {"cpu": 8}
"""How many lengths of range are compiled for at most where it is not 2: each is a sort, which a TPU's compiler takes
long over, and a CPU's does not."""
SHORTEST = {"cpu": 256}
"""The fewest entries of the shortest range where it is not 1,024."""
SCORED, SCORED_SHORTEST = 32, 1024
"""Products alone compile quickly: how many lengths at most, and the fewest entries of the shortest."""


def indexer_scores(q_BSNH: jax.Array, k_BEH: jax.Array, weights_BSN: jax.Array) -> jax.Array:
    """sum_h w relu(q . k), float32 [B, S, E]; all queries x entries at once."""
    products = jnp.einsum(
        "bsnh,beh->bsne", q_BSNH, k_BEH, precision=precision_of(q_BSNH), preferred_element_type=jnp.float32
    )
    weights = weights_BSN.astype(jnp.float32)
    return jnp.einsum("bsne,bsn->bse", jax.nn.relu(products), weights, precision=precision_of(weights))


def exact_topk(scores_BCE: jax.Array, visible: VisibleRange, keep: int) -> jax.Array:
    """int32 [B, C, keep]: the visible entries of the largest scores, in any order, ties to the lowest entry; and -1."""
    scores = _visible_scores(scores_BCE, visible)
    if bisects(scores.shape[-1]):
        return bisected_topk(scores, keep)
    values, indices = jax.lax.top_k(scores, keep)
    return jnp.where(values > -jnp.inf, indices, -1).astype(jnp.int32)


def approximate_topk(scores_BCE: jax.Array, visible: VisibleRange, keep: int, recall_target: float) -> jax.Array:
    """Like `exact_topk`, missing on average at most 1 - recall_target of the entries; ties are taken as they come.

    On TPUs it is one pass that keeps the best of each of several interleaved groups of entries (arXiv 2206.14286);
    other platforms sort, and find all. A query that sees at most `keep` entries gets each of them: two that fall
    into one group would otherwise cost one of them although there is room for both.
    """
    scores = _visible_scores(scores_BCE, visible)
    values, indices = jax.lax.approx_max_k(scores, keep, recall_target=recall_target)
    indices = jnp.where(values > -jnp.inf, indices, -1)
    fits = (visible.end_BS - visible.begin_BS)[..., None] <= keep
    return jnp.where(fits, all_visible(visible, keep), indices).astype(jnp.int32)


def all_visible(visible: VisibleRange, keep: int) -> jax.Array:
    """int32 [B, C, keep]: the first `keep` visible entries in their order; then -1."""
    entry = visible.begin_BS[..., None] + jnp.arange(keep)
    return jnp.where(entry < visible.end_BS[..., None], entry, -1).astype(jnp.int32)


def _visible_scores(scores_BCE: jax.Array, visible: VisibleRange) -> jax.Array:
    entry = jnp.arange(scores_BCE.shape[-1])
    seen = (entry >= visible.begin_BS[..., None]) & (entry < visible.end_BS[..., None])
    return jnp.where(seen, scores_BCE, -jnp.inf)


def sorted_lengths(num_entries: int, keep: int) -> list[int]:
    """How many scores a program may sort; the first, with nothing to choose from, is `keep`."""
    platform = program_platform()
    lengths = max(1, min(LENGTHS.get(platform, 2), num_entries // max(SHORTEST.get(platform, 1024), keep)))
    return [keep, *(size for size in steps(num_entries, -(-num_entries // lengths)) if size > keep)]


def scored_lengths(num_entries: int, longest: int, before: int) -> list[int]:
    """How many entries a program may score that sorts `longest`, where more than `before` are needed."""
    return steps(longest, -(-num_entries // max(1, min(SCORED, num_entries // SCORED_SHORTEST))), before)


def indexer_topk(
    q_BSNH: jax.Array,
    k_BEH: jax.Array,
    weights_BSN: jax.Array,
    visible: VisibleRange,
    top_k: int,
    *,
    query_chunk: int = 128,
    selection: str = "exact",
    recall_target: float = 0.95,
) -> jax.Array:
    """The entries each query attends to.

    Args:
      q_BSNH: index queries. k_BEH: index keys. weights_BSN: head weights, already scaled.
      visible: the range of entries each query may choose from.
      top_k: how many to keep.
      query_chunk: queries scored at a time, fewer where their products with the keys would exceed MAX_PRODUCTS.
      selection: "exact" (`exact_topk`) or "approx" (`approximate_topk`).
      recall_target: with "approx", the mean share of the true top-k to find.

    Returns:
      int32 [B, S, K], in any order, no entry twice, -1 where a query sees fewer. Of equal scores at the edge "exact"
      takes the lowest entries.

    Raises:
      ValueError: for an unknown selection.
    """
    if selection not in ("exact", "approx"):
        raise ValueError(f"unknown indexer selection {selection!r}; expected 'exact' or 'approx'")
    num_entries = k_BEH.shape[1]
    keep = min(top_k, num_entries)
    lengths = sorted_lengths(num_entries, keep)

    def one_chunk(chunk):
        q, weights, *edges = chunk
        visible = VisibleRange(*edges)
        low, high = seen_range(visible, num_entries)

        def of_range(length: int) -> jax.Array:
            if length <= keep:
                clipped = VisibleRange(jnp.maximum(visible.begin_BS, 0), jnp.minimum(visible.end_BS, num_entries))
                return all_visible(clipped, keep)
            start = jnp.clip(low, 0, num_entries - length)
            before = max((size for size in lengths if size < length), default=0)

            def scored(size: int) -> jax.Array:
                k = jax.lax.dynamic_slice_in_dim(k_BEH, start, size, axis=1)
                # libtpu for tpu7x fails where it cuts the product into pieces of what are themselves pieces.
                scores = indexer_scores(*jax.lax.optimization_barrier((q, k)), weights)
                return jnp.pad(scores, ((0, 0), (0, 0), (0, length - size)))  # nothing that a query sees

            scores = for_length(high - start, scored_lengths(num_entries, length, before), scored, before)
            seen = VisibleRange(*(edge - start for edge in edges))
            if selection == "exact":
                indices = exact_topk(scores, seen, keep)
            else:
                indices = approximate_topk(scores, seen, keep, recall_target)
            return jnp.where(indices < 0, -1, indices + start)

        return for_length(high - low, lengths, of_range)

    per_query = q_BSNH.shape[0] * q_BSNH.shape[2] * num_entries
    chunk = max(1, min(query_chunk, q_BSNH.shape[1], MAX_PRODUCTS // max(per_query, 1)))
    parts = (q_BSNH, weights_BSN, *visible)
    chunks = tuple(to_chunks(jax.lax.stop_gradient(part), chunk) for part in parts)
    k_BEH = jax.lax.stop_gradient(k_BEH)
    return from_chunks(jax.lax.map(one_chunk, chunks), q_BSNH.shape[1])
