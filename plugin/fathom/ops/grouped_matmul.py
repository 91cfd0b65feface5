"""Matrix products of consecutive groups of rows with one matrix per group: routed experts.

Letters: T rows sorted by group, K inner dimension, N outer dimension, E groups.

Implementations, all exact and with the same signature:
  "reference": every group's product over every row, masked; E times the work, the clearest one.
  "ragged": `jax.lax.ragged_dot`, which XLA compiles to a grouped kernel on TPU.
  "tiled": a loop over the (tile of rows, group) pairs that hold rows, ending with the last row in
    use. XLA's CPU ragged_dot does the work of "reference".
"auto" is "tiled" where the program is compiled for CPU and "ragged" elsewhere. The choice is made
at lowering, so a program lowered for TPU on a CPU host gets the TPU's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fathom.ops.precision import precision_of

IMPLEMENTATIONS = ("auto", "reference", "ragged", "tiled")
TILE_ROWS = 64

_CONTRACT_RAGGED_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def chosen_implementation(platform: str) -> str:
    """What "auto" means on a platform ("cpu", "tpu", "gpu", ...)."""
    return "tiled" if platform == "cpu" else "ragged"


def grouped_matmul(
    x_TK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, implementation: str = "auto"
) -> jax.Array:
    """Row t of the result is `x_TK[t] @ w_EKN[e]`, e the group that row t falls into.

    Args:
      x_TK: rows, the first `group_sizes_E[0]` of group 0, and so on. w_EKN: same dtype as x.
      group_sizes_E: int32; their sum may be smaller than T.
      implementation: one of IMPLEMENTATIONS.
      Inside a shard_map all three arrays must be typed as varying over the same mesh axes.

    Returns:
      float32 [T, N], accumulated in float32. Rows past the last group are 0 and carry no gradient.

    Raises:
      ValueError: for an unknown implementation, or shapes or dtypes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul: unknown implementation {implementation!r}, expected one of "
            f"{IMPLEMENTATIONS}"
        )
    if (
        x_TK.ndim != 2
        or w_EKN.ndim != 3
        or x_TK.shape[1] != w_EKN.shape[1]
        or group_sizes_E.shape != w_EKN.shape[:1]
    ):
        raise ValueError(
            f"grouped_matmul: rows {x_TK.shape}, matrices {w_EKN.shape} and group sizes "
            f"{group_sizes_E.shape} do not fit; expected [T, K], [E, K, N] and [E]"
        )
    if x_TK.dtype != w_EKN.dtype:
        raise ValueError(
            f"grouped_matmul: rows are {x_TK.dtype} and matrices {w_EKN.dtype}; "
            "cast one to the other's dtype"
        )
    return _grouped_matmul(x_TK, w_EKN, group_sizes_E, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x, w, sizes, implementation):
    return _rows_product(x, w, sizes, implementation)


def _forward(x, w, sizes, implementation):
    return _rows_product(x, w, sizes, implementation), (x, w, sizes)


def _backward(implementation, saved, g):
    x, w, sizes = saved
    # Rounded to the compute dtype, as in the backward pass of any mixed-precision product.
    g = _mask_unused(g, sizes).astype(x.dtype)
    dx = _rows_product(g, jnp.swapaxes(w, 1, 2), sizes, implementation)
    dw = _outer_product(x, g, sizes, implementation)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _rows_product(x, w, sizes, implementation):
    """[T, K] and [E, K, N] -> float32 [T, N]."""
    if implementation == "auto":
        return jax.lax.platform_dependent(
            x, w, sizes, cpu=_ROWS_PRODUCTS["tiled"], default=_ROWS_PRODUCTS["ragged"]
        )
    return _ROWS_PRODUCTS[implementation](x, w, sizes)


def _outer_product(x, g, sizes, implementation):
    """[T, K] and [T, N] (zero past the last group) -> float32 [E, K, N], sums over groups."""
    if implementation == "auto":
        return jax.lax.platform_dependent(
            x, g, sizes, cpu=_OUTER_PRODUCTS["tiled"], default=_OUTER_PRODUCTS["ragged"]
        )
    return _OUTER_PRODUCTS[implementation](x, g, sizes)


def _mask_unused(rows, sizes):
    used = jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes)
    return jnp.where(used, rows, 0)


def _ragged_rows(x, w, sizes):
    out = jax.lax.ragged_dot(
        x, w, sizes, precision=precision_of(x), preferred_element_type=jnp.float32
    )
    return _mask_unused(out, sizes)  # what a kernel leaves there is not specified


def _ragged_outer(x, g, sizes):
    return jax.lax.ragged_dot_general(
        x,
        g,
        sizes,
        _CONTRACT_RAGGED_ROWS,
        precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )


def _membership(num_rows, sizes, dtype):
    ends = jnp.cumsum(sizes)
    row = jnp.arange(num_rows)[None, :]
    return ((row >= (ends - sizes)[:, None]) & (row < ends[:, None])).astype(dtype)


def _reference_rows(x, w, sizes):
    member_ET = _membership(x.shape[0], sizes, x.dtype)
    return jnp.einsum("et,tk,ekn->tn", member_ET, x, w, precision=precision_of(x), preferred_element_type=jnp.float32)


def _reference_outer(x, g, sizes):
    member_ET = _membership(x.shape[0], sizes, x.dtype)
    return jnp.einsum("et,tk,tn->ekn", member_ET, x, g, precision=precision_of(x), preferred_element_type=jnp.float32)


def _units(num_rows, tile, sizes):
    """The (tile, group) pairs that share rows, in row order.

    Returns:
      (group of each pair, first row of its tile, first and end row of its group, pairs in use).
    """
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    tiles_E = jnp.where(sizes > 0, (ends + tile - 1) // tile - starts // tile, 0)
    unit_ends = jnp.cumsum(tiles_E)
    unit = jnp.arange(-(-num_rows // tile) + sizes.shape[0] - 1)
    group = jnp.sum(unit[:, None] >= unit_ends[None, :], axis=1)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    first_tile = starts // tile - (unit_ends - tiles_E)
    return group, (unit + first_tile[group]) * tile, starts[group], ends[group], unit_ends[-1]


def _over_units(x, sizes, out_shape, step):
    """Folds `step(out, group, first row, mask of rows that count, rows of x)` over the units."""
    num_rows = x.shape[0]
    tile = min(TILE_ROWS, num_rows)
    group, tile_start, group_start, group_end, num_units = _units(num_rows, tile, sizes)

    def body(unit, carry):
        # The last tile may overhang: the slice moves back, and the mask counts each row once.
        first = jnp.minimum(tile_start[unit], num_rows - tile)
        row = first + jnp.arange(tile)
        counts = (row >= tile_start[unit]) & (row >= group_start[unit]) & (row < group_end[unit])
        x_tile = jax.lax.dynamic_slice_in_dim(x, first, tile)
        return step(carry, group[unit], first, counts[:, None], x_tile)

    # Zeros that a shard_map types as varying over the same mesh axes as the loop's results.
    zero = (num_units * 0).astype(jnp.float32)
    return jax.lax.fori_loop(0, num_units, body, jnp.broadcast_to(zero, out_shape))


def _tiled_rows(x, w, sizes):
    def step(out, group, first, counts, x_tile):
        w_group = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = jnp.dot(
            x_tile, w_group, precision=precision_of(x_tile), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_slice_in_dim(out, first, x_tile.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(counts, product, old), first, 0)

    return _over_units(x, sizes, (x.shape[0], w.shape[2]), step)


def _tiled_outer(x, g, sizes):
    def step(out, group, first, counts, x_tile):
        g_tile = jnp.where(counts, jax.lax.dynamic_slice_in_dim(g, first, x_tile.shape[0]), 0)
        product = jnp.einsum(
            "tk,tn->kn", x_tile, g_tile, precision=precision_of(x_tile), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_index_in_dim(out, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, old + product, group, 0)

    return _over_units(x, sizes, (sizes.shape[0], x.shape[1], g.shape[1]), step)


_ROWS_PRODUCTS = {"reference": _reference_rows, "ragged": _ragged_rows, "tiled": _tiled_rows}
_OUTER_PRODUCTS = {"reference": _reference_outer, "ragged": _ragged_outer, "tiled": _tiled_outer}
