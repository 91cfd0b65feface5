"""Fathom: train DeepSeek-V4 and DeepSeek-V3.2 in JAX.

    model = fathom.load(path)                     a checkpoint as an nnx.Module
    out = model(tokens)                           .logits, .mtp_logits, .aux
    recipe = fathom.load_recipe("tiny-v4-cpu")    a recipe by name or file, with overrides
    result = fathom.train(recipe)                 .step, .metrics, .checkpoint_dir
    report = fathom.plan(recipe, topology="v5p:8x8x8")   .fits, .memory, .bound, .to_text()
    spec = fathom.zoo.get("deepseek-v4-flash")    a model's ModelSpec
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom import plan, train, zoo

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from fathom.recipe import Recipe

__all__ = ["load", "load_recipe", "plan", "train", "zoo"]
__version__ = "0.1.0"


def load(path: str | Path, mesh: Mesh | None = None, dtype: str = "fp32", **options: Any) -> nnx.Module:
    """Loads a Hub-format folder or a Fathom checkpoint; see `fathom.loading.load`."""
    from fathom.loading import load as load_checkpoint

    return load_checkpoint(path, mesh=mesh, dtype=dtype, **options)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe by file or name with `a.b=value` overrides; see `fathom.recipe.load_recipe`."""
    from fathom.recipe import load_recipe as load

    return load(path_or_name, list(overrides))
