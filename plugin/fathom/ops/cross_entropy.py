"""Cross-entropy of a linear head, in chunks: float32 logits of the whole batch are never held."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.chunks import to_chunks
from fathom.ops.precision import precision_of


def linear_cross_entropy(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int = 512,
    vocab_axes: tuple[str, ...] = (),
) -> jax.Array:
    """sum over tokens of weight * (logsumexp(hidden @ head) - logit of the target).

    Args:
      hidden_BSD: final hidden states. head_DV: the head's kernel; products are in hidden's dtype, and its
        gradient is summed over the chunks in the kernel's own: pass it as float32.
      targets_BS: int32 in [0, V) wherever the weight is not 0.
      weights_BS: float32; 0 leaves a token out.
      chunk: tokens of each row handled at a time; the largest array is [B, chunk, V] float32.
      vocab_axes: inside a shard_map, the mesh axes that V is split over; targets count over the whole of it.

    Returns:
      float32 scalar, a sum in nats (divide by the number of targets).
    """
    chunk = min(chunk, hidden_BSD.shape[1])
    shard_size = head_DV.shape[1]
    first = jax.lax.axis_index(vocab_axes) * shard_size if vocab_axes else 0

    @jax.checkpoint
    def one_chunk(total, parts):
        hidden, targets, weights = parts
        logits = jnp.einsum(
            "bcd,dv->bcv",
            hidden,
            head_DV.astype(hidden.dtype),
            precision=precision_of(hidden),
            preferred_element_type=jnp.float32,
        )
        normalizer = _logsumexp(logits, vocab_axes)
        index = targets[..., None] - first
        picked = jnp.take_along_axis(logits, index, axis=-1, mode="clip")[..., 0]
        if vocab_axes:
            held = (index >= 0) & (index < shard_size)
            picked = jax.lax.psum(jnp.where(held[..., 0], picked, 0.0), vocab_axes)
        # A weight of 0 must also silence a non-finite logit of a padding token.
        loss = jnp.where(weights > 0, (normalizer - picked) * weights, 0.0)
        return total + loss.sum(), None

    parts = tuple(to_chunks(x, chunk) for x in (hidden_BSD, targets_BS, weights_BS))
    # A zero that a shard_map types as varying like the tokens.
    zero = jnp.zeros((), jnp.float32) + 0.0 * weights_BS[0, 0]
    total, _ = jax.lax.scan(one_chunk, zero, parts)
    return total


def _logsumexp(logits: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Over the last dimension, and over the mesh axes that split it."""
    if not axes:
        return jax.nn.logsumexp(logits, axis=-1)
    peak = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), axes)
    total = jax.lax.psum(jnp.exp(logits - peak[..., None]).sum(axis=-1), axes)
    return jnp.log(total) + peak
