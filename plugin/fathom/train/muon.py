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
nothing is fetched twice, and no product is made on two devices of a slice where that leaves any of them fewer.

A program is one for all devices: of a weight of fewer matrices than devices each would make one, of a weight of a few
more, two. Such weights are stacked with others whose matrices have their shape and lie alike (`SURPLUS`).

Letters: N matrices, M rows, K columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from fathom.layers.param import Matrix
from fathom.mesh import replica_axes, split_axes, variable_axes
from fathom.train.moments import stored_moments
from fathom.train.state import path_names

FAST, SETTLING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (SETTLING,) * 2
"""a, b, c of each step of HybridNS."""

SURPLUS = 1 / 8
"""Weights of which devices would make more than this beside what there is join others; the rest are not copied."""

Path = tuple[str, ...]
Axes = tuple[str | None, ...]


def matrices_of(params: nnx.State) -> dict[Path, tuple[Matrix, Axes]]:
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
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        weights = [declared[path_names(path)] for path, _ in leaves]
        found = orthogonal([leaf for _, leaf in leaves], weights, block.muon_rms, jnp.dtype(block.muon_dtype))
        return jax.tree.unflatten(tree, found)

    trace = stored_moments(optax.trace(block.muon_momentum, nesterov=True), "trace", block.momentum_dtype)
    return optax.chain(trace, optax.stateless(orthogonalize))


class Lie(NamedTuple):
    """Mesh axes over which the matrices of a weight lie: their rows, their columns, different ones (`many`), and those
    along which devices hold the same (`replicas`)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    many: tuple[str, ...]
    replicas: tuple[str, ...]


def orthogonal(
    updates: Sequence[jax.Array], weights: Sequence[tuple[Matrix, Axes]], rms: float, dtype: jnp.dtype
) -> list[jax.Array]:
    """HybridNS of each matrix of some weights, times rms sqrt(max(M, K)): float32, laid out as `updates` are.

    Args:
      updates: float32, Nesterov's momentum of each weight. weights: the matrix and the logical axes of each.
      dtype: of the iteration.

    Raises:
      ValueError: when parts do not add up, or lie along a dimension that the mesh splits.
    """
    lies = [_lie(update.shape, *weight) for update, weight in zip(updates, weights, strict=True)]

    def of_device(updates):
        split = [_split(update, matrix) for update, (matrix, _) in zip(updates, weights, strict=True)]
        stacks = {}  # of matrices of one shape that lie alike, by weight and piece
        for i, pieces in enumerate(split):
            for j, piece in enumerate(pieces):
                x_NMK = _to_stack(piece, weights[i][0]).astype(dtype)
                stacks.setdefault((x_NMK.shape[1:], lies[i]), {})[i, j] = x_NMK
        done = {}
        for (_, lie), alike in stacks.items():
            done |= _together(functools.partial(_hybrid_ns, rms), alike, lie)
        for i, pieces in enumerate(split):
            for j, piece in enumerate(pieces):
                pieces[j] = _from_stack(done[i, j].astype(jnp.float32), piece.shape, weights[i][0])
        return [jnp.concatenate(p, axis=m.outputs[-1]) for p, (m, _) in zip(split, weights, strict=True)]

    if not any(axes for lie in lies for axes in lie):
        return of_device(updates)
    # Without mesh axes of size 1, by which types of matrices that lie alike would differ.
    specs = [PartitionSpec(*(split_axes(axis) or None for axis in axes)) for _, axes in weights]
    return jax.shard_map(of_device, in_specs=(specs,), out_specs=specs)(list(updates))


def _lie(shape: Sequence[int], matrix: Matrix, axes: Axes) -> Lie:
    """How a weight's matrices lie under the active rules; raises what `orthogonal` says."""
    split = {i - len(shape): split_axes(axis) for i, axis in enumerate(axes) if split_axes(axis)}
    along = matrix.outputs[-1]
    if matrix.parts and (sum(matrix.parts) != shape[along] or along in split):
        raise ValueError(
            f"a weight of shape {tuple(shape)} holds parts of {matrix.parts} along dimension {along}, which must be "
            f"their sum and whole on every device; it lies on {split.get(along, 'one device')}"
        )
    many = [i for i in split if i not in matrix.inputs + matrix.outputs]
    over = (tuple(a for i in dims for a in split.get(i, ())) for dims in (matrix.inputs, matrix.outputs, sorted(many)))
    return Lie(*over, replica_axes(axes))


def _split(update: jax.Array, matrix: Matrix) -> list[jax.Array]:
    """The parts of a weight that hold one matrix for each of their other dimensions."""
    return list(jnp.split(update, list(itertools.accumulate(matrix.parts))[:-1], axis=matrix.outputs[-1]))


def _order(rank: int, matrix: Matrix) -> list[int]:
    """A piece's dimensions, those of rows and of columns last."""
    many = [i for i in range(-rank, 0) if i not in matrix.inputs + matrix.outputs]
    return [i + rank for i in (*many, *matrix.inputs, *matrix.outputs)]


def _to_stack(piece: jax.Array, matrix: Matrix) -> jax.Array:
    """[N, M, K]. Rows may come in another order than in the whole matrix: what follows treats all alike."""
    rows, columns = (math.prod(piece.shape[i] for i in dims) for dims in (matrix.inputs, matrix.outputs))
    return piece.transpose(_order(piece.ndim, matrix)).reshape(-1, rows, columns)


def _from_stack(x_NMK: jax.Array, shape: Sequence[int], matrix: Matrix) -> jax.Array:
    """Undoes `_to_stack` of a piece of this shape."""
    order = _order(len(shape), matrix)
    return x_NMK.reshape([shape[i] for i in order]).transpose(sorted(range(len(shape)), key=order.__getitem__))


def _together(function: Callable, stacks: dict[Any, jax.Array], lie: Lie) -> dict[Any, jax.Array]:
    """`function` of stacks of matrices of one shape that lie alike, as one stack those for which too many are made."""
    sizes = {name: x.shape[0] for name, x in stacks.items()}
    devices = _size(lie.rows + lie.columns) * _size(lie.replicas)
    join = [name for name, size in sizes.items() if math.ceil(size / devices) * devices > (1 + SURPLUS) * size]
    done = {name: _whole_matrices(function, x, lie) for name, x in stacks.items() if name not in join}
    if join:
        x_NMK = _whole_matrices(function, jnp.concatenate([stacks[name] for name in join]), lie)
        edges = list(itertools.accumulate(sizes[name] for name in join))
        done |= zip(join, jnp.split(x_NMK, edges[:-1]), strict=True)
    return done


def _size(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _whole_matrices(function: Callable, x_NMK: jax.Array, lie: Lie) -> jax.Array:
    """`function` of matrices whose rows and columns lie over mesh axes: each device gets some of them whole."""
    count, shards, replicas = x_NMK.shape[0], _size(lie.rows + lie.columns), lie.replicas
    if math.ceil(count / (shards * _size(replicas))) == math.ceil(count / shards):
        replicas = ()  # if they took different ones, no device would have fewer
    x = jnp.pad(x_NMK, ((0, -count % (shards * _size(replicas))), (0, 0), (0, 0)))
    if replicas:
        own = x.shape[0] // _size(replicas)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(replicas) * own, own)
    moves = [(axes, dim) for axes, dim in ((lie.rows, 1), (lie.columns, 2)) if axes]
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
