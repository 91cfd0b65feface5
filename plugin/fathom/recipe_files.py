"""Finding and reading recipe files: YAML, `extends`, `a.b.c=value` overrides; no schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fathom.recipe_checks import Problem, RecipeError, nearest


class _DuplicateKeyError(yaml.YAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number (YAML 1.1 wants a dot); no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _DuplicateKeyError(
                    f"key {key!r} is there twice (line {key_node.start_mark.line + 1})"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def recipe_folders() -> list[Path]:
    """Where named recipes lie: inside the package when installed, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    folders = [package / "recipes"]
    if package.parent.name == "plugin":
        folders.append(package.parent.parent / "recipes")
    return [folder for folder in folders if folder.is_dir()]


def recipe_names() -> list[str]:
    """Names that `load_recipe` knows."""
    return sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})


def is_recipe(source: str) -> bool:
    """Whether a path or a name stands for a recipe: a YAML file, or a known name that is no path."""
    path = Path(source).expanduser()
    return path.suffix in (".yaml", ".yml") and path.is_file() or (not path.exists() and source in recipe_names())


def find_recipe(source: str, beside: Path | None, key: str) -> Path:
    """The file a path or a name stands for; relative paths may also start from `beside`."""
    candidates = [beside / source] if beside else []
    candidates += [Path(source).expanduser()]
    candidates += [folder / f"{source}.yaml" for folder in recipe_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = recipe_names()
    problem = Problem(
        key,
        f"{source!r}, which is neither a file nor a recipe's name",
        f"a YAML file, or one of {', '.join(names) or '(no named recipes are installed)'}",
        nearest(Path(source).stem, names) or "give the path of a YAML file or one of those names",
    )
    raise RecipeError([problem], source)


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        problem = Problem(key, found, "a readable YAML file", f"correct {path}")
        raise RecipeError([problem], str(path)) from error
    if not isinstance(values, dict):
        problem = Problem(
            key,
            f"a {type(values).__name__} at the top of {path}",
            "a mapping with the blocks model, data, optimizer, mesh, train, checkpoint, metrics",
            "write the recipe as `block:` followed by indented `key: value` lines",
        )
        raise RecipeError([problem], str(path))
    return values


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `over` over those of `base`, block by block."""
    values = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = merged(values[key], value) if both else value
    return values


def read_with_base(path: Path) -> dict[str, Any]:
    """The recipe's values over those of the recipe it extends; the file's name is its default."""
    values = {"name": path.stem, **_read(path, "recipe")}
    extends = values.pop("extends", None)
    if extends is None:
        return values
    base_path = find_recipe(str(extends), path.parent, "extends")
    base = _read(base_path, "extends")
    if base.get("extends") is not None:
        problem = Problem(
            "extends",
            f"{extends!r}, which itself extends {base['extends']!r}",
            "a recipe that extends nothing: one level only",
            f"extend {base['extends']!r} directly, or write the values out",
        )
        raise RecipeError([problem], str(path))
    base.pop("extends", None)
    return merged(base, values)


def _parse_value(text: str) -> Any:
    value = yaml.load(text, Loader=_Loader)  # noqa: S506
    # `data.path=stdlib:` is a path; YAML would read a mapping unless it is written with braces.
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text
    return value


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], problems: list[Problem]
) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            fix = "write it as a.b.c=value, for example train.steps=5"
            problems.append(Problem(f"override {override!r}", override, "key=value", fix))
            continue
        try:
            value = _parse_value(text)
        except yaml.YAMLError as error:
            found = f"{text!r} ({' '.join(str(error).split())})"
            problems.append(Problem(key, found, "a YAML value", "quote it: key='\"text\"'"))
            continue
        for part in reversed(parts):
            value = {part: value}
        values = merged(values, value)
    return values
