"""Work on no more of a row's entries than a chunk of queries sees: one program for each of a few lengths.

Causal queries early in a sequence then leave most of its entries alone, where one program for all of them would mask
half of what it makes. Letters: B batch, C queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fathom.ops.selection import VisibleRange


def seen_range(visible: VisibleRange, num_entries: int) -> tuple[jax.Array, jax.Array]:
    """First entry that any query of the batch sees and one past the last; (num_entries, 0) if none."""
    begin, end = jnp.maximum(visible.begin_BS, 0), jnp.minimum(visible.end_BS, num_entries)
    sees = end > begin
    return jnp.where(sees, begin, num_entries).min(), jnp.where(sees, end, 0).max()


def steps(last: int, unit: int, after: int = 0) -> list[int]:
    """Multiples of `unit` above `after`, and `last`."""
    return [*range(unit * (after // unit + 1), last, unit), last]


def for_length(needed: jax.Array, sizes: Sequence[int], run: Callable[..., jax.Array], after: int = 0) -> jax.Array:
    """run(size) with the least of `sizes`, which rise, that is no less than `needed`, or with the last.

    Args:
      needed: int32 scalar. after: less than the first of `sizes`; `needed` is above it but for what needs nothing.
    """
    if len(sizes) == 1:
        return run(sizes[0])
    which = (needed > jnp.array(sizes[:-1], jnp.int32)).sum()
    edges = [after, *sizes]
    branches = [
        taken(lambda size=size: run(size), size - edge, sizes[-1] - after)
        for size, edge in zip(sizes, edges, strict=False)
    ]
    return jax.lax.switch(which, branches)


def taken(function: Callable, times: int, of: int) -> Callable:
    """`function` as a branch that causal queries of a whole row take so many times; `fathom.plan.flops` reads it."""

    def branch(*args):
        return function(*args)

    branch.__name__ = f"taken_{times}_of_{of}"
    return branch
