"""Exact top-k of long rows without sorting: the k-th largest value by bisection of its bits, then who is above it.

XLA's CPU takes 95 to 240 us to sort the best 512 out of a row of 1,024 to 8,192; this takes 30 to 140, and all of it
is comparisons and sums.

Letters: B batch, C queries of a chunk, E entries, K = `keep`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fathom.ops.platform import program_platform

SHORTEST = {"cpu": 1024}
"""Entries from which on rows are bisected, on platforms where that was measured to be faster than a sort."""
LOWEST = -(2**31)
GROUP = 64
"""Entries counted by one product."""


def bisects(num_entries: int) -> bool:
    """Whether a row of so many entries is bisected rather than sorted, on the platform the program is traced for."""
    shortest = SHORTEST.get(program_platform())
    return shortest is not None and num_entries >= shortest


def bisected_topk(scores_BCE: jax.Array, keep: int) -> jax.Array:
    """int32 [B, C, K]: the entries of the `keep` largest scores, in their order, ties to the lowest; then -1.

    The entries that `jax.lax.top_k` takes, but for those that score -inf or NaN, which are left out. float32 scores;
    -0.0 and 0.0 are equal.
    """
    ranks = _ordered(scores_BCE)
    least = _kth_largest(ranks, keep)[..., None]
    above, equal = ranks > least, ranks == least
    room = keep - above.sum(axis=-1, keepdims=True)
    listed = scores_BCE > -jnp.inf
    above, equal = above & listed, equal & listed
    turn = _running_count(equal)
    place = _running_count(above) + jnp.minimum(turn, room) - 1
    taken = above | (equal & (turn <= room))
    place = jnp.where(taken, place, keep)  # past the end: dropped
    entry = jnp.arange(scores_BCE.shape[-1], dtype=jnp.int32)

    # Query by query: XLA partitions a scatter over its batch dimensions only.
    def of_query(place_E: jax.Array) -> jax.Array:
        return jnp.full(keep, -1, jnp.int32).at[place_E].set(entry, mode="drop")

    return jax.vmap(jax.vmap(of_query))(place)


def _running_count(mask_BCE: jax.Array) -> jax.Array:
    """int32 [B, C, E]: how many are set up to and with each. Within groups by a product with a triangle of ones, which
    a CPU makes a half to a quarter of the work that its cumulative sums are."""
    batch, chunk, entries = mask_BCE.shape
    mask = jnp.pad(mask_BCE, ((0, 0), (0, 0), (0, -entries % GROUP))).reshape(batch, chunk, -1, GROUP)
    triangle = jnp.triu(jnp.ones((GROUP, GROUP), jnp.float32))
    # Counts far below 2^24: exact in float32.
    within = jnp.einsum("bcgi,ij->bcgj", mask.astype(jnp.float32), triangle, precision=jax.lax.Precision.HIGHEST)
    groups = within[..., -1]
    count = within + (jnp.cumsum(groups, axis=-1) - groups)[..., None]
    return count.reshape(batch, chunk, -1)[..., :entries].astype(jnp.int32)


def _ordered(scores: jax.Array) -> jax.Array:
    """int32 in the order of the float32 scores, NaN with its sign at either end; one value for both zeros."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == LOWEST, 0, bits)  # -0.0, by its bits: a CPU takes subnormal numbers for zeros too
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _kth_largest(ranks_BCE: jax.Array, keep: int) -> jax.Array:
    """int32 [B, C]: the largest number that at least `keep` of the row reach. Its bits, from the highest down."""

    def reached(candidate_BC: jax.Array) -> jax.Array:
        return (ranks_BCE >= candidate_BC[..., None]).sum(axis=-1) >= keep

    def next_bit(number: jax.Array, least_BC: jax.Array) -> jax.Array:
        candidate = least_BC | (jnp.int32(1) << (30 - number))
        return jnp.where(reached(candidate), candidate, least_BC)

    zero = jnp.zeros(ranks_BCE.shape[:-1], jnp.int32)
    start = jnp.where(reached(zero), zero, LOWEST)
    return jax.lax.fori_loop(0, 31, next_bit, start)
