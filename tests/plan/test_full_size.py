"""Every full-size recipe compiles for its slice and fits: `pytest -m slow tests/plan/test_full_size.py`.

The figures are kept in BENCHMARKS.md and in the recipes' first lines.
"""

from __future__ import annotations

import pytest

import fathom
from fathom.recipe_files import recipe_names
from fathom.recipe_stages import stage_recipes

FULL_SIZE = [name for name in recipe_names() if not name.startswith("tiny")]
STAGES = [(name, stage) for name in FULL_SIZE for stage in range(1, len(stage_recipes(fathom.load_recipe(name))) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_fits(name, stage):
    report = fathom.plan(fathom.load_recipe(name), stage=stage, advise=False)
    print("\n" + report.to_text(parameters=False))
    assert report.fits
    assert report.parameters == report.formula_parameters
    # Operations against the formulas: test_planner.py, which need not compile.
    assert report.expected_flops is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("tiny")])
def test_tiny_recipes_compile_for_the_cpu(name):
    """Those of a GPU for one CPU device, whose buffers need not be a GPU's; `test_a_step_for_a_gpu` lowers it."""
    report = fathom.plan(fathom.load_recipe(name))
    print("\n" + report.to_text(parameters=False))
    assert report.parameters == report.formula_parameters
