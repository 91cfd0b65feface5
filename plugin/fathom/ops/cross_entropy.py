"""Cross-entropy of a linear head, in chunks: float32 logits of the whole batch are never held."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.attention import to_chunks


def linear_cross_entropy(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int = 512,
) -> jax.Array:
    """sum over tokens of weight * (logsumexp(hidden @ head) - logit of the target).

    Args:
      hidden_BSD: final hidden states. head_DV: the head's kernel, cast to hidden's dtype.
      targets_BS: int32 in [0, V) wherever the weight is not 0.
      weights_BS: float32; 0 leaves a token out.
      chunk: tokens of each row handled at a time; the largest array is [B, chunk, V] float32.

    Returns:
      float32 scalar, a sum in nats (divide by the number of targets).
    """
    head_DV = head_DV.astype(hidden_BSD.dtype)
    chunk = min(chunk, hidden_BSD.shape[1])

    @jax.checkpoint
    def one_chunk(total, parts):
        hidden, targets, weights = parts
        logits = jnp.einsum("bcd,dv->bcv", hidden, head_DV, preferred_element_type=jnp.float32)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
        # A weight of 0 must also silence a non-finite logit of a padding token.
        loss = jnp.where(weights > 0, (normalizer - picked) * weights, 0.0)
        return total + loss.sum(), None

    parts = tuple(to_chunks(x, chunk) for x in (hidden_BSD, targets_BS, weights_BS))
    total, _ = jax.lax.scan(one_chunk, jnp.zeros((), jnp.float32), parts)
    return total
