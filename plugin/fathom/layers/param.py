"""Making weights: the initial value, the logical axes and the optimizer's view, declared in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


class RouterBias(nnx.Variable):
    """The selection bias of a learned router, float32 [E]: state, updated by rule and not by gradient."""


class HashTable(nnx.Variable):
    """A hash router's table, int32 [V, K]: expert ids per token id, never updated."""


class Matrix(NamedTuple):
    """How the dimensions of a weight form matrices, each of which is one to an optimizer of matrices.

    Attributes:
      inputs, outputs: the dimensions that make up the rows and the columns, counted from the last (-1). All others
        count matrices that have nothing to do with each other: experts, groups, stacked layers.
      parts: sizes of the pieces along the last of `outputs`, when that holds several such matrices side by side.
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)
    parts: tuple[int, ...] = ()


MATRIX = Matrix()
"""[M, K], or many of it."""
HEADS_OUT = Matrix(inputs=(-3,), outputs=(-2, -1))
"""[R, N, H]: into heads."""
HEADS_IN = Matrix(inputs=(-3, -2))
"""[N, H, D]: out of heads, or groups."""


def normal(stddev: float) -> Initializer:
    """Normal initializer with the given standard deviation."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.float32) * stddev).astype(dtype)

    return init


def constant(value: float) -> Initializer:
    """Every element is `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def param(
    key: jax.Array,
    shape: Sequence[int],
    init: Initializer,
    *,
    axes: Sequence[str | None],
    dtype: str | jnp.dtype,
    matrix: Matrix | None = None,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """A variable with its logical axes attached.

    Args:
      key: PRNG key for `init`.
      shape: the logical shape, never a shard's.
      axes: one logical axis (or None) per dimension, mapped to mesh axes by a sharding preset.
      dtype: storage dtype.
      matrix: declares the weight one (or many) for an optimizer of matrices; None leaves it to AdamW, as is right for
        embeddings, heads, norms, biases, gates and every vector.
      kind: `nnx.Param` for weights the optimizer trains, another Variable class for other state.

    Raises:
      ValueError: when `axes` and `shape` differ in length.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for a weight of shape {shape}")
    value = init(key, tuple(shape), jnp.dtype(dtype))
    # Eager sharding is off: models are built inside jit with explicit output shardings, and plain
    # single-device construction must not ask for a mesh.
    return kind(value, out_sharding=tuple(axes), eager_sharding=False, matrix=matrix)
