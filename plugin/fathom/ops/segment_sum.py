"""Adds rows into a table, several of them into the same row: the gradient of a gather, deterministic everywhere.

A GPU's scatter-add is atomic: its order, and so its last bits, change from run to run, and some jaxlib versions make
it a compare-and-swap loop, hundreds of times slower when rows meet. There the rows are sorted by destination first,
summed within each run of equal destinations, and each sum is then written by one thread. The scatter-adds of the CPU
and the TPU go through the rows in order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_rows(table_TH: jax.Array, index_M: jax.Array, rows_MH: jax.Array) -> jax.Array:
    """table[index[m]] += rows[m] for all m; indices must lie in the table. float32, deterministic.

    Args:
      table_TH: float32. index_M: int32, in [0, T). rows_MH: float32.
    """
    args = table_TH, index_M, rows_MH
    return jax.lax.platform_dependent(*args, cuda=add_rows_sorted, rocm=add_rows_sorted, default=add_rows_in_order)


def add_rows_in_order(table_TH: jax.Array, index_M: jax.Array, rows_MH: jax.Array) -> jax.Array:
    """`add_rows` by the platform's scatter-add."""
    return table_TH.at[index_M].add(rows_MH, mode="promise_in_bounds")


def add_rows_sorted(table_TH: jax.Array, index_M: jax.Array, rows_MH: jax.Array) -> jax.Array:
    """`add_rows` by a stable sort and sums of runs; no two threads write to one row.

    Runs are summed by doubling: after step j a row holds the sum of up to 2^j rows of its run that end with it.
    """
    count = index_M.shape[0]
    index_M, order = jax.lax.sort_key_val(index_M, jnp.arange(count, dtype=jnp.int32))
    rows_MH = rows_MH[order]
    place = jnp.arange(count, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones(1, bool), index_M[1:] != index_M[:-1]])
    within = place - jax.lax.cummax(jnp.where(starts, place, 0))  # place within the run

    def double(state):
        reach, rows = state
        earlier = jnp.roll(rows, reach, axis=0)
        return 2 * reach, rows + jnp.where((within >= reach)[:, None], earlier, 0.0)

    longest = within.max()
    _, rows_MH = jax.lax.while_loop(lambda state: state[0] <= longest, double, (jnp.int32(1), rows_MH))
    # The last row of a run has its sum; the others go past the end, each to a place of its own, and are dropped.
    ends = jnp.concatenate([starts[1:], jnp.ones(1, bool)])
    target = jnp.where(ends, index_M, table_TH.shape[0] + place)
    return table_TH.at[target].add(rows_MH, mode="drop", unique_indices=True)
