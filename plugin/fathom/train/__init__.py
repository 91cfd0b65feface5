"""The training loop and its parts. The loop knows a model only through `fathom.zoo.ModelSpec`.

The package is callable, so that the public `fathom.train(recipe)` and the subpackage can share the name.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom.recipe import Recipe
    from fathom.train.loop import TrainResult


class _TrainPackage(types.ModuleType):
    def __call__(self, recipe: Recipe) -> TrainResult:
        """Trains (or resumes) from a recipe; see `fathom.train.loop.train`."""
        from fathom.train.loop import train

        return train(recipe)


sys.modules[__name__].__class__ = _TrainPackage
