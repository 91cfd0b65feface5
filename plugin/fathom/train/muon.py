"""Muon: the update of a matrix is its momentum with all singular values made one.

As published for V4 (its report, 2.4), for W of n x m: M = mu M + G, O = HybridNS(mu M + G),
W = W (1 - lr decay) - lr rms sqrt(max(n, m)) O.
HybridNS divides by the Frobenius norm, then iterates X = a X + b (X X^T) X + c (X X^T)^2 X, eight times with
coefficients that raise small singular values fast and twice with ones that settle them at 1. Momentum and iteration
are optax's; what is here is which matrices a weight holds (`Matrix`, declared where the weight is made) and how
they come together on a device.

A weight's rows or columns may lie on several devices. Of the many matrices that such a weight stands for (layers,
experts) each device then fetches some whole, in an all-to-all in the dtype of the iteration, and returns their updates
the same way. Devices of a slice that hold the same weights share the matrices out as well and gather the updates. So
nothing is fetched twice, and no product is made on two devices of a slice where that leaves any of them fewer; of
fewer matrices than devices some have none.

Letters: N matrices, M rows, K columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fathom.layers.param import Matrix
from fathom.mesh import partition_spec, replica_axes, split_axes, variable_axes
from fathom.train.moments import stored_moments
from fathom.train.state import path_names

FAST, SETTLING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (SETTLING,) * 2
"""a, b, c of each step of HybridNS."""

Path = tuple[str, ...]


def matrices_of(params: nnx.State) -> dict[Path, tuple[Matrix, tuple[str | None, ...]]]:
    """(matrix, logical axes) of every weight that declares one, by path."""
    found = {}
    for path, variable in _variables(params):
        matrix = variable.get_metadata().get("matrix")
        if matrix is not None:
            found[path_names(path)] = (matrix, variable_axes(variable) or (None,) * variable.get_value().ndim)
    return found


def muon_flops(params: nnx.State) -> float:
    """What one update of these weights multiplies: each matrix once, ten times X X^T, its square, and their sum X."""
    shapes = {path_names(path): v.get_value().shape for path, v in _variables(params)}
    total = 0.0
    for path, (matrix, _) in matrices_of(params).items():
        rows, columns = (math.prod(shapes[path][i] for i in dims) for dims in (matrix.inputs, matrix.outputs))
        along = shapes[path][matrix.outputs[-1]]
        for part in matrix.parts or (along,):
            short, long = sorted((rows, columns * part // along))
            count = math.prod(shapes[path]) // (rows * columns)
            total += count * len(COEFFICIENTS) * (4.0 * short**2 * long + 2.0 * short**3)
    return total


def _variables(params: nnx.State) -> list[tuple[Any, nnx.Variable]]:
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]


def scale_by_hybrid_muon(params: nnx.State, block: Any) -> optax.GradientTransformation:
    """From gradients of matrices to their updates, before decay and learning rate; other weights must be masked out.

    Args:
      params: (abstract) nnx.State with the weights' declarations.
      block: the recipe's optimizer block: `muon_momentum`, `muon_rms`, `muon_dtype`, `momentum_dtype`.
    """
    declared = matrices_of(params)

    def orthogonalize(updates, _):
        def one(path, update):
            matrix, axes = declared[path_names(path)]
            return orthogonal(update, matrix, axes, block.muon_rms, jnp.dtype(block.muon_dtype))

        return jax.tree_util.tree_map_with_path(one, updates)

    trace = stored_moments(optax.trace(block.muon_momentum, nesterov=True), "trace", block.momentum_dtype)
    return optax.chain(trace, optax.stateless(orthogonalize))


def orthogonal(
    update: jax.Array, matrix: Matrix, axes: tuple[str | None, ...], rms: float, dtype: jnp.dtype
) -> jax.Array:
    """HybridNS of each matrix in a weight, times rms sqrt(max(M, K)): float32, laid out as `update` is.

    Args:
      update: float32, Nesterov's momentum. axes: its logical axes. dtype: of the iteration.

    Raises:
      ValueError: when parts do not add up, or lie along a dimension that the mesh splits.
    """
    split = {i - update.ndim: split_axes(axis) for i, axis in enumerate(axes) if split_axes(axis)}
    along = matrix.outputs[-1]
    if matrix.parts and (sum(matrix.parts) != update.shape[along] or along in split):
        raise ValueError(
            f"a weight of shape {update.shape} holds parts of {matrix.parts} along dimension {along}, which must be "
            f"their sum and whole on every device; it lies on {split.get(along, 'one device')}"
        )

    replicas = replica_axes(axes)

    def of_device(update):
        pieces = jnp.split(update, list(itertools.accumulate(matrix.parts))[:-1], axis=along)
        return jnp.concatenate([_orthogonal_piece(p, matrix, split, replicas, rms, dtype) for p in pieces], axis=along)

    if not split and not replicas:
        return of_device(update)
    spec = partition_spec(axes)
    return jax.shard_map(of_device, in_specs=spec, out_specs=spec)(update)


def _orthogonal_piece(
    piece, matrix: Matrix, split: dict[int, tuple[str, ...]], replicas: tuple[str, ...], rms: float, dtype
) -> jax.Array:
    """`orthogonal` of a device's piece of a weight that holds one matrix for each of its other dimensions."""
    rows, columns = matrix.inputs, matrix.outputs
    many = [i for i in range(-piece.ndim, 0) if i not in rows + columns]
    order = [i + piece.ndim for i in (*many, *rows, *columns)]
    turned = piece.transpose(order)
    sizes = [math.prod(piece.shape[i] for i in dims) for dims in (many, rows, columns)]
    # Rows may come in another order than in the whole matrix: what follows treats all alike.
    x_NMK = turned.reshape(sizes).astype(dtype)
    row_axes, column_axes = (tuple(a for i in dims for a in split.get(i, ())) for dims in (rows, columns))
    x_NMK = _whole_matrices(functools.partial(_hybrid_ns, rms), x_NMK, row_axes, column_axes, replicas)
    back = sorted(range(piece.ndim), key=order.__getitem__)
    return x_NMK.astype(jnp.float32).reshape(turned.shape).transpose(back)


def _whole_matrices(
    function: Callable, x_NMK: jax.Array, row_axes: tuple, column_axes: tuple, replicas: tuple
) -> jax.Array:
    """`function` of matrices whose rows and columns lie over mesh axes: each device gets some of them whole.

    `replicas` are mesh axes along which `x_NMK` is equal, and stays so: their devices take different matrices.
    """
    count = x_NMK.shape[0]
    shards = jax.lax.axis_size((*row_axes, *column_axes)) if row_axes or column_axes else 1
    sharers = jax.lax.axis_size(replicas) if replicas else 1
    if math.ceil(count / (shards * sharers)) == math.ceil(count / shards):
        replicas, sharers = (), 1  # no device would have fewer
    x = jnp.pad(x_NMK, ((0, -count % (shards * sharers)), (0, 0), (0, 0)))
    if replicas:
        own = x.shape[0] // sharers
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(replicas) * own, own)
    moves = [(axes, dim) for axes, dim in ((row_axes, 1), (column_axes, 2)) if axes]
    for axes, dim in moves:
        x = jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=dim, tiled=True)
    x = function(x)
    for axes, dim in reversed(moves):
        x = jax.lax.all_to_all(x, axes, split_axis=dim, concat_axis=0, tiled=True)
    if replicas:
        x = jax.lax.all_gather(x, replicas, axis=0, tiled=True, to="invarying")
    return x[:count]


def _hybrid_ns(rms: float, x_NMK: jax.Array) -> jax.Array:
    """HybridNS of matrices, one after the other, scaled to the update's root mean square."""
    dims = optax.contrib.MuonDimensionNumbers(0, 1)
    iteration = optax.contrib.scale_by_muon(
        COEFFICIENTS, len(COEFFICIENTS), beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )
    scale = rms * math.sqrt(max(x_NMK.shape[1:]))

    def one(x_MK):
        # Without momentum of its own the transformation is the iteration alone, and its state is not kept.
        orthogonal, _ = iteration.update(x_MK, iteration.init(x_MK))
        return orthogonal * jnp.asarray(scale, x_MK.dtype)

    with jax.default_matmul_precision("float32" if x_NMK.dtype == jnp.float32 else "default"):
        return jax.lax.map(one, x_NMK)
