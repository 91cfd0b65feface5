"""What a recipe takes on a slice, found out by the TPU's compiler with no TPU.

The package is callable, so that the public `fathom.plan(recipe, topology=...)` and the subpackage share the name.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fathom.plan.report import PlanReport
    from fathom.recipe import Recipe


class _PlanPackage(types.ModuleType):
    def __call__(self, recipe: Recipe, topology: str | None = None, **options: Any) -> PlanReport:
        """Plans a recipe, or with `stage=` one of its stages; see `fathom.plan.planner.plan`.

        Raises:
          ValueError: for a recipe of several stages when `stage` does not say which.
        """
        from fathom.plan.planner import plan
        from fathom.recipe_stages import stage_recipes

        count = len(stage_recipes(recipe))
        if count > 1 and options.get("stage") is None:
            raise ValueError(
                f"recipe {recipe.name} has {count} stages; say which with stage=1 to {count} or its name, or call "
                "fathom.plan.planner.plan for all of them"
            )
        return next(plan(recipe, topology, **options))


sys.modules[__name__].__class__ = _PlanPackage
