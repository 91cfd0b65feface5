"""Which optimizer moves which parameter: what `optimizer.name` and the weights' own declarations come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flax import nnx

from fathom.recipe import Recipe
from fathom.train import optimizer
from fathom.train.muon import matrices_of
from fathom.train.state import path_names
from fathom.train.step import Program

STACKS = ("prefix", "repeated", "suffix", "mtp")
"""Lists of blocks in a model's tree; numbers after them say which block, and do not tell kinds apart."""


def parameter_rows(program: Program, recipe: Recipe) -> list[dict[str, Any]]:
    """One row per kind of weight: {"name", "shape", "layers", "optimizer", "matrix", "sharding", "elements"}.

    Weights of the same name, shape and treatment in different blocks share a row; `layers` counts them, stacked ones
    each. `shape` leaves out the stack. "matrix" says which dimensions are one matrix's rows and columns under Muon.
    """
    trainable, _ = optimizer.split_frozen(program.spec, program.state.params, recipe.train.parameter_stage)
    trained = {path_names(path) for path, _ in _variables(trainable)}
    mask = optimizer.decay_mask(trainable, recipe.optimizer.decay_all)
    decays = {path_names(path): decay for path, decay in _variables(mask)}
    matrices = matrices_of(program.state.params)
    rows: dict[tuple, dict[str, Any]] = {}
    for path, variable in _variables(program.state.params):
        names, value = path_names(path), variable.get_value()
        held = recipe.train.hold_moments and not program.spec.frozen(path, "sparse")
        kind = "frozen, moments held" if held else "frozen"
        if names in trained:
            kind = "muon" if recipe.optimizer.name == "muon" and names in matrices else "adamw"
        if names in trained and not _flag(decays[names]):
            kind += ", no decay"
        stack = sum(axis == optimizer.STACK_AXIS for axis in variable.get_metadata().get("out_sharding") or ())
        shape = tuple(value.shape[stack:])
        name = _general_name(names)
        matrix = _matrix(matrices[names][0], shape) if names in matrices and kind.startswith("muon") else ""
        spec = str(tuple(value.sharding.spec)[stack:]) if value.sharding is not None else ""
        row = rows.setdefault(
            (name, shape, kind),
            {"name": name, "shape": list(shape), "layers": 0, "optimizer": kind, "matrix": matrix, "sharding": spec,
             "elements": 0},
        )  # fmt: skip
        row["layers"] += math.prod(value.shape[:stack])
        row["elements"] += math.prod(value.shape)
    return list(rows.values())


def _variables(tree: Any):
    import jax

    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]


def _flag(value: Any) -> bool:
    return bool(value.get_value() if isinstance(value, nnx.Variable) else value)


def _general_name(names: Sequence[str]) -> str:
    """"layers/attn/wq_a/weight" for each block's; a name outside of blocks as it is."""
    names = list(names)
    if len(names) > 2 and names[0] in STACKS and names[1].isdigit():
        return "/".join(["mtp" if names[0] == "mtp" else "layers", *names[2:]])
    return "/".join(names)


def _matrix(matrix: Any, shape: Sequence[int]) -> str:
    """"4096 x 1024", and how many of them a weight of one layer holds."""
    rows = math.prod(shape[i] for i in matrix.inputs)
    columns = math.prod(shape[i] for i in matrix.outputs)
    if matrix.parts:
        each = columns // sum(matrix.parts)
        return " + ".join(f"{rows} x {part * each}" for part in matrix.parts)
    many = math.prod(shape) // (rows * columns)
    return f"{rows} x {columns}" + (f", {many} of them" if many > 1 else "")
