"""A small sound recipe over the toy model, for tests to spoil."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.recipe import Recipe, RecipeError
from tests.train.toy_model import TOY

SPEC = dataclasses.replace(TOY, name="toy-for-recipes")
"""The toy under a name of its own, so that registering it hides no entry point."""

SMALL: dict[str, Any] = {
    "model": {"name": SPEC.name, "dtype": "float32", "config": {"vocab_size": 264}},
    "data": {"path": ".", "sequence_length": 32, "batch_size": 8},
    "optimizer": {"learning_rate": 1e-3},
    "mesh": {"data": 4, "fsdp": 2},
    "train": {"steps": 10},
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = values
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = value
    return values


def write_recipe(folder: Path, values: dict[str, Any], name: str = "small") -> Path:
    """The values as <folder>/<name>.yaml."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def recipe_with(**changes) -> Recipe:
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return Recipe.model_validate(changed({"name": "small", **SMALL}, flat))


def problems_of(call, *arguments):
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    return {problem.key: problem for problem in caught.value.problems}
