"""The lightning indexer's scores and exact selection (report eq. 13-17; models/deepseek_v4/README.md "Indexer").

score[s, e] = sum_h w[s, h] relu(q[s, h] . k[e]); each query keeps its top_k visible entries, ties to the lowest
entry number. Selection is discrete: no gradient passes through it.

Letters: B batch, S queries, C queries of a chunk, E entries, N index heads, H index head dim, K = min(top_k, E).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.attention import VisibleRange, from_chunks, to_chunks
from fathom.ops.precision import precision_of


def indexer_scores(q_BSNH: jax.Array, k_BEH: jax.Array, weights_BSN: jax.Array) -> jax.Array:
    """sum_h w relu(q . k), float32 [B, S, E]; all queries x entries at once."""
    products = jnp.einsum(
        "bsnh,beh->bsne", q_BSNH, k_BEH, precision=precision_of(q_BSNH), preferred_element_type=jnp.float32
    )
    weights = weights_BSN.astype(jnp.float32)
    return jnp.einsum("bsne,bsn->bse", jax.nn.relu(products), weights, precision=precision_of(weights))


def indexer_topk(
    q_BSNH: jax.Array,
    k_BEH: jax.Array,
    weights_BSN: jax.Array,
    visible: VisibleRange,
    top_k: int,
    *,
    query_chunk: int = 128,
) -> jax.Array:
    """The entries each query attends to.

    Args:
      q_BSNH: index queries. k_BEH: index keys. weights_BSN: head weights, already scaled.
      visible: the range of entries each query may choose from.
      top_k: how many to keep.
      query_chunk: queries scored at a time; [C, N, E] is the largest array held.

    Returns:
      int32 [B, S, min(top_k, E)], best first, ties by lowest entry number, -1 where a query sees fewer.
    """
    num_entries = k_BEH.shape[1]
    keep = min(top_k, num_entries)
    entry = jnp.arange(num_entries)

    def one_chunk(chunk):
        q, weights, begin, end = chunk
        scores = indexer_scores(q, k_BEH, weights)
        seen = (entry >= begin[..., None]) & (entry < end[..., None])
        values, indices = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), keep)
        return jnp.where(values > -jnp.inf, indices, -1).astype(jnp.int32)

    chunk = min(query_chunk, q_BSNH.shape[1])
    parts = (q_BSNH, weights_BSN, *visible)
    chunks = tuple(to_chunks(jax.lax.stop_gradient(part), chunk) for part in parts)
    k_BEH = jax.lax.stop_gradient(k_BEH)
    return from_chunks(jax.lax.map(one_chunk, chunks), q_BSNH.shape[1])
