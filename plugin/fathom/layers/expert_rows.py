"""The routed experts that one device holds, over the rows (token, expert) that are theirs, sorted by expert.

Of all assignments of the tokens a device is given, those to its own experts are `1 / shards` on average, and all of
them at worst. `sum_experts` holds the worst case at once, and is for a device that holds every expert.
`sum_experts_in_blocks` takes as many rows at a time as are expected, in a loop as long as the rows there are: nothing
is dropped, an uneven load costs time and no memory.

Letters: T tokens, D hidden, K experts per token, A = T * K assignments, E experts held, F expert hidden, R rows of a
block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fathom.mesh import vary
from fathom.ops.grouped_matmul import grouped_matmul
from fathom.ops.segment_sum import add_rows

SLACK = 1.25
"""Rows of a block over those that a device has when every expert is chosen as often."""

Matrices = tuple[jax.Array, jax.Array, jax.Array]
"""w1_EDF (gate), w3_EDF (up), w2_EFD (down)."""


class ExpertOptions(NamedTuple):
    """How the experts of a device compute.

    Attributes:
      limit: the clamp of `swiglu`. implementation: that of `grouped_matmul`.
      shards: how many devices hold as many experts each.
      varying: inside a shard_map, the mesh axes along which tokens or experts differ.
    """

    limit: float | None
    implementation: str = "auto"
    shards: int = 1
    varying: tuple[str, ...] = ()


def swiglu(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """silu(min(gate, L)) * clip(up, -L, L); a limit of 0 or None clamps nothing."""
    if limit:
        gate = jnp.minimum(gate, limit)
        up = jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def expert_rows(
    rows_RD: jax.Array, weights_R: jax.Array, matrices: Matrices, sizes_E: jax.Array, options: ExpertOptions
) -> jax.Array:
    """float32 [R, D]: each row's expert, times its routing weight. Rows past the last expert's are 0."""
    w1_EDF, w3_EDF, w2_EFD = matrices
    gate_RF = grouped_matmul(rows_RD, w1_EDF, sizes_E, options.implementation)
    up_RF = grouped_matmul(rows_RD, w3_EDF, sizes_E, options.implementation)
    # The routing weight goes in before w2, in float32, as in the released inference code; after w2
    # low precision rounds differently.
    hidden_RF = (swiglu(gate_RF, up_RF, options.limit) * weights_R[:, None]).astype(rows_RD.dtype)
    return grouped_matmul(hidden_RF, w2_EFD, sizes_E, options.implementation)


def sort_by_expert(indices_TK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """(order int32 [A], sizes int32 [E]): the assignments by expert, those to experts held elsewhere last."""
    expert_A = indices_TK.reshape(-1)
    expert_A = jnp.where((expert_A >= 0) & (expert_A < num_experts), expert_A, num_experts)
    sizes_E = jnp.sum(expert_A[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return jnp.argsort(expert_A, stable=True), sizes_E


def sum_experts(
    x_TD: jax.Array, indices_TK: jax.Array, weights_TK: jax.Array, matrices: Matrices, options: ExpertOptions
) -> jax.Array:
    """The weighted sum over each token's experts that are among the E given ones.

    Args:
      indices_TK: int32; ids outside [0, E) belong to experts held elsewhere and contribute nothing.

    Returns:
      float32 [T, D].
    """
    top_k = indices_TK.shape[1]
    order_A, sizes_E = sort_by_expert(indices_TK, matrices[0].shape[0])
    inverse_A = jnp.argsort(order_A)
    rows_AD = _dispatch(x_TD, order_A, inverse_A, top_k)
    weight_A = _permute(weights_TK.reshape(-1), order_A, inverse_A)
    return _combine(expert_rows(rows_AD, weight_A, matrices, sizes_E, options), order_A, inverse_A, top_k)


# Sorting assignments by expert is a permutation, so the gradient of a gather is the gather by the
# inverse permutation. Autodiff would write a scatter-add: slow, and its sums depend on the order.


@jax.custom_vjp
def _permute(values_A, order_A, inverse_A):
    return values_A[order_A]


_permute.defvjp(
    lambda values, order, inverse: (values[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


def _gather_rows(x_TD, order_A, top_k):
    return x_TD[order_A // top_k]


def _sum_rows(rows_AD, inverse_A, top_k):
    rows_TKD = rows_AD[inverse_A].reshape(-1, top_k, rows_AD.shape[-1])
    return jnp.sum(rows_TKD, axis=1, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x_TD, order_A, inverse_A, top_k):
    """Each assignment's token, sorted by expert: [T, D] -> [A, D]."""
    return _gather_rows(x_TD, order_A, top_k)


_dispatch.defvjp(
    lambda x, order, inverse, top_k: (_gather_rows(x, order, top_k), inverse),
    lambda top_k, inverse, g: (_sum_rows(g, inverse, top_k).astype(g.dtype), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(rows_AD, order_A, inverse_A, top_k):
    """The sum of each token's rows, in float32: [A, D] -> [T, D]; the transpose of `_dispatch`."""
    return _sum_rows(rows_AD, inverse_A, top_k)


_combine.defvjp(
    lambda rows, order, inverse, top_k: (_sum_rows(rows, inverse, top_k), order),
    lambda top_k, order, g: (_gather_rows(g, order, top_k), None, None),
)


def block_rows(assignments: int, shards: int) -> int:
    """R, when the experts lie on so many devices: a multiple of 8, at most all assignments."""
    expected = math.ceil(SLACK * assignments / shards)
    return min(-(-expected // 8) * 8, assignments)


class _Blocks(NamedTuple):
    """The rows of a device, to be taken R at a time.

    Attributes:
      order: int32 [A, filled up to whole blocks], as `sort_by_expert` gives it. sizes: int32 [E]. top_k: K.
    """

    order: jax.Array
    sizes: jax.Array
    top_k: int
    rows: int

    @property
    def count(self) -> jax.Array:
        """How many blocks hold rows of this device: int32 scalar."""
        return -(-jnp.sum(self.sizes) // self.rows)

    def block(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(assignments int32 [R], sizes int32 [E] of each expert's rows in the block)."""
        first = number * self.rows
        ends = jnp.cumsum(self.sizes)
        end, begin = (jnp.clip(edge, first, first + self.rows) for edge in (ends, ends - self.sizes))
        return jax.lax.dynamic_slice_in_dim(self.order, first, self.rows), end - begin


def _make_blocks(indices_TK: jax.Array, num_experts: int, shards: int) -> _Blocks:
    order_A, sizes_E = sort_by_expert(indices_TK, num_experts)
    rows = block_rows(order_A.shape[0], shards)
    return _Blocks(jnp.pad(order_A, (0, -order_A.shape[0] % rows)), sizes_E, indices_TK.shape[1], rows)


def sum_experts_in_blocks(
    x_TD: jax.Array,
    indices_TK: jax.Array,
    weights_TK: jax.Array,
    matrices: Matrices,
    options: ExpertOptions,
) -> jax.Array:
    """`sum_experts`, where there are `options.shards` devices. Differentiated by `pull_experts_in_blocks`."""
    blocks = _make_blocks(indices_TK, matrices[0].shape[0], options.shards)
    weights_A = weights_TK.reshape(-1)

    def add_block(number, y_TD):
        assignments, sizes_E = blocks.block(number)
        token = assignments // blocks.top_k
        rows = expert_rows(x_TD[token], weights_A[assignments], matrices, sizes_E, options)
        return add_rows(y_TD, token, rows)

    zeros = vary(jnp.zeros(x_TD.shape, jnp.float32), options.varying)
    return jax.lax.fori_loop(0, blocks.count, add_block, zeros)


def pull_experts_in_blocks(
    total: Matrices,
    x_TD: jax.Array,
    indices_TK: jax.Array,
    weights_TK: jax.Array,
    matrices: Matrices,
    dy_TD: jax.Array,
    options: ExpertOptions,
) -> tuple[Matrices, jax.Array, jax.Array]:
    """The gradients of `sum_experts_in_blocks`; what lies between is made again, a block at a time.

    Args:
      total: float32, to which the matrices' gradients are added. dy_TD: float32.

    Returns:
      (total and the gradients of the matrices, dx float32 [T, D], dweights float32 [T, K]).
    """
    blocks = _make_blocks(indices_TK, matrices[0].shape[0], options.shards)
    weights_A = weights_TK.reshape(-1)

    def add_block(number, sums):
        total, dx_TD, dsorted_A = sums
        assignments, sizes_E = blocks.block(number)
        token = assignments // blocks.top_k
        _, pull = jax.vjp(
            lambda rows, weights, matrices: expert_rows(rows, weights, matrices, sizes_E, options),
            x_TD[token],
            weights_A[assignments],
            matrices,
        )
        drows_RD, dweights_R, dmatrices = pull(dy_TD[token])
        total = jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, dmatrices)
        dx_TD = add_rows(dx_TD, token, drows_RD.astype(jnp.float32))
        return total, dx_TD, jax.lax.dynamic_update_slice_in_dim(dsorted_A, dweights_R, number * blocks.rows, 0)

    zeros = (vary(jnp.zeros(shape, jnp.float32), options.varying) for shape in (x_TD.shape, blocks.order.shape))
    sums = total, *zeros
    total, dx_TD, dsorted_A = jax.lax.fori_loop(0, blocks.count, add_block, sums)
    assignments = weights_A.shape[0]
    inverse_A = jnp.argsort(blocks.order[:assignments])
    return total, dx_TD, dsorted_A[:assignments][inverse_A].reshape(weights_TK.shape)
