"""Imports point one way: ops and mesh know nobody, layers know ops and mesh, models know layers, train knows zoo
and never a model, checkpoints_tools knows the models' tables and never the loop."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package -> what it may import of Fathom; longest matching prefix of the importing module decides
ALLOWED = {
    "fathom.ops": ("fathom.ops",),
    "fathom.mesh": (),
    "fathom.hub": (),
    "fathom.step_folder": ("fathom.zoo", "fathom.recipe_checks"),
    "fathom.zoo": ("fathom.mesh",),
    "fathom.layers": ("fathom.layers", "fathom.ops", "fathom.mesh"),
    "fathom.models": (
        "fathom.models",
        "fathom.layers",
        "fathom.ops",
        "fathom.mesh",
        "fathom.zoo",
        "fathom.hub",
    ),
    "fathom.topology": (),
    "fathom.host_memory": (),
    "fathom.recipe_checks": ("fathom.zoo",),
    "fathom.plan": (
        "fathom.plan",
        "fathom.train",
        "fathom.layers",
        "fathom.mesh",
        "fathom.zoo",
        "fathom.topology",
        "fathom.recipe",
        "fathom.recipe_checks",
        "fathom.recipe_stages",
    ),
    "fathom.launch": (
        "fathom.launch",
        "fathom.distributed",
        "fathom.cli_problem",
        "fathom.host_memory",
        "fathom.topology",
        "fathom.cli",
        "fathom.recipe",
        "fathom.recipe_checks",
        "fathom.recipe_stages",
    ),
    "fathom.train": (
        "fathom.train",
        "fathom.hub",
        "fathom.zoo",
        "fathom.mesh",
        "fathom.layers",
        "fathom.recipe",
        "fathom.recipe_checks",
        "fathom.recipe_stages",
        "fathom.step_folder",
    ),
    "checkpoints_tools": (
        "checkpoints_tools",
        "fathom.zoo",
        "fathom.hub",
        "fathom.mesh",
        "fathom.step_folder",
        "fathom.recipe_checks",
        "fathom.layers.options",
    ),
}


def modules():
    for folder, package in ((ROOT / "plugin", "fathom"), (ROOT, "checkpoints_tools")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("fathom", "checkpoints_tools")}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_one_way(module, path):
    package = max((p for p in ALLOWED if within(module, p)), key=len, default=None)
    if package is None:
        return  # the top of the package: cli, loading, recipe, __init__ may know all
    wrong = [
        name
        for name in imports_of(path)
        if not any(within(name, allowed) for allowed in ALLOWED[package])
    ]
    assert not wrong, f"{module} may import only {ALLOWED[package]}, found {wrong}"
