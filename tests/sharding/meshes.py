"""One function on a mesh and on one device, and how far apart all that comes back is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from fathom.mesh import batch_sharding, make_mesh, sharding_scope, state_shardings
from fathom.train.state import named_leaves
from tests.models.small import FAST_COMPILE

ERROR = 1e-5
FLOOR = 1e-3
"""A gradient smaller than this part of the whole gradient is measured against that part. Only scalars and short
vectors that sum over every token and stream (mHC scales and bases) are so small: their terms cancel to a
thousandth, and what is left carries the rounding of the terms."""

Leaves = dict[str, np.ndarray]


def compiled_on(
    shape: Mapping[str, int] | None,
    rules: Mapping[str, Any],
    compute: Callable[..., Any],
    params: nnx.State,
    rest: nnx.State,
    *rows: Any,
) -> tuple[Callable[..., Leaves], str]:
    """(a function of rows to every number of `compute(params, rest, *rows)` by name, the compiled program).

    `shape` None is one device. `rows` are arrays [B, S, ...], laid out as the train step does.
    """

    def fresh(*args):  # jit's cache does not see the sharding rules
        return compute(*args)

    function = jax.jit(fresh, compiler_options=FAST_COMPILE)
    if shape is None:
        one = function.lower(params, rest, *rows).compile()
        return lambda *rows: named_leaves(jax.device_get(one(params, rest, *rows))), ""
    mesh = make_mesh(shape)
    with sharding_scope(mesh, rules):
        params = jax.device_put(params, state_shardings(params, mesh, rules))
        rest = jax.device_put(rest, state_shardings(rest, mesh, rules))
        layout = batch_sharding(mesh, rules)
        compiled = function.lower(params, rest, *jax.device_put(rows, layout)).compile()

    def call(*rows: Any) -> Leaves:
        return named_leaves(jax.device_get(compiled(params, rest, *jax.device_put(rows, layout))))

    return call, compiled.as_text()


def part(leaves: Leaves, prefix: str) -> Leaves:
    """Those whose names start so, without it."""
    return {name[len(prefix) :]: value for name, value in leaves.items() if name.startswith(prefix)}


def too_far(got: Leaves, want: Leaves, floor: float = FLOOR) -> dict[str, float]:
    """The relative error of each value of (anything, gradients) that is beyond ERROR."""
    assert list(got) == list(want)
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in part(want, "1/").values()))
    errors = {}
    for leaf, value in want.items():
        size = max(np.linalg.norm(value), floor * whole if leaf.startswith("1/") else 0.0, 1e-30)
        errors[leaf] = np.linalg.norm(got[leaf] - value) / size
    return {leaf: error for leaf, error in errors.items() if not error < ERROR}
