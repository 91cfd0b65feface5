"""What can be wrong with a recipe, told all at once: what a Problem is, and values that are wrong by themselves.

`schema_problems` puts pydantic's errors into our words; `model_spec` and `apply_config` check the keys of
`model.config` against the architecture. Combinations of values are looked at in `fathom.recipe_combinations`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from fathom.zoo import ModelSpec


class Problem(NamedTuple):
    """One thing wrong with a recipe: the key path, what is there, what should be, what to do."""

    key: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}; expected {self.expected}; fix: {self.fix}"


class RecipeError(ValueError):
    """A recipe that cannot run.

    Attributes:
      problems: every Problem found.
      source: the recipe's file or name.
    """

    def __init__(self, problems: list[Problem], source: str):
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        head = f"recipe {source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """"did you mean ...?" for the known word nearest to a wrong one, None when nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else None


def stage_label(number: int | str, name: str | None) -> str:
    """How errors name a stage: by its number as overrides and `--stage` have it, from 1, and its name."""
    return f"stages.{number}" + (f" ({name})" if name else "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty mapping stays a value, lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- Schema --------------------------------------------------------------------------------------


def _block_type(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """Key as a recipe spells it -> field."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in _keys(model).items():
        block = _block_type(field.annotation)
        yield f"{prefix}{name}"
        if block is not None and typing.get_origin(field.annotation) is not tuple:  # items of a list have no path
            yield from _key_paths(block, f"{prefix}{name}.")


def _unknown_key(model: type[BaseModel], loc: tuple, value: Any) -> Problem:
    block: type[BaseModel] = model
    for part in loc[:-1]:
        if isinstance(part, int):  # an item of a list, whose block is that of the list
            continue
        block = _block_type(_keys(block)[part].annotation)
    prefix = f"{_dotted(loc[:-1])}." if loc[:-1] else ""
    known = list(_keys(block))
    match = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if match:
        fix = f"did you mean {prefix}{match[0]}?"
    else:
        # The key may be right and its block wrong: look at every key's last part.
        last = {key: key.rsplit(".", 1)[-1] for key in _key_paths(model)}
        near = difflib.get_close_matches(str(loc[-1]), last.values(), n=1, cutoff=0.8)
        elsewhere = [key for key, name in last.items() if name in near]
        fix = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else "remove it"
    where = f"block {prefix[:-1]!r}" if prefix else "a recipe"
    expected = f"a key of {where}: {', '.join(known)}"
    return Problem(_dotted(loc), f"an unknown key (value {value!r})", expected, fix)


def _dotted(loc: tuple) -> str:
    """pydantic's path as overrides have it: items of lists are counted from 1."""
    return ".".join(str(part + 1 if isinstance(part, int) else part) for part in loc)


def _with_stage_name(problem: Problem, loc: tuple, values: Mapping[str, Any]) -> Problem:
    """The problem, where it is in one of the recipe's stages told as those of stages are."""
    if loc[:1] != ("stages",) or len(loc) < 2 or not isinstance(loc[1], int):
        return problem
    stage = values["stages"][loc[1]]
    label = stage_label(loc[1] + 1, stage.get("name") if isinstance(stage, Mapping) else None)
    return problem._replace(key=f"{label}: {_dotted(loc[2:])}" if loc[2:] else label)


def _choices(text: str) -> list[str]:
    return [part for part in text.split("'")[1::2]]


def schema_problems(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> list[Problem]:
    """pydantic's errors, each with its key path and a fix."""
    problems = []
    for item in error.errors(include_url=False):
        loc, kind, value = item["loc"], item["type"], item["input"]
        key = _dotted(loc) or "recipe"
        message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if kind == "extra_forbidden":
            problems.append(_unknown_key(model, loc, value))
        elif kind == "missing":
            problems.append(Problem(key, "nothing", "a value", f"add {key} to the recipe"))
        elif kind == "literal_error":
            fix = nearest(str(value), _choices(message)) or f"set {key} to one of those"
            problems.append(Problem(key, repr(value), message, fix))
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            fix = f"write {key} as `key: value` lines"
            problems.append(Problem(key, repr(value), "a mapping of keys to values", fix))
        else:
            fix = f"set {key} to a value {message}"
            if message.startswith("a "):
                fix = f"set {key} to {message.split(',')[0]}"
            problems.append(Problem(key, _as_read(value), message, _meant(key, kind, value) or fix))
        problems[-1] = _with_stage_name(problems[-1], loc, values)
    return problems


def _as_read(value: Any) -> str:
    if isinstance(value, bool):
        return f"{value!r} (YAML reads yes, no, on and off as booleans too)"
    return repr(value)


def _meant(key: str, kind: str, value: Any) -> str | None:
    """The fix for a value of another type that can only mean one thing."""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"set {key}={int(value)}, without a point or exponent"
    if kind == "bool_type" and value in (0, 1):
        return f"set {key}={'true' if value else 'false'}"
    return None


# --- The architecture ----------------------------------------------------------------------------


def model_spec(block: Any) -> tuple[ModelSpec | None, list[Problem]]:
    """The zoo's spec with a model block's sound config overrides applied, and the problems.

    The spec is None when the model is unknown.
    """
    from fathom import zoo

    try:
        spec = zoo.get(block.name)
    except ValueError as error:
        known = zoo.names()
        expected, fix = ", ".join(known), nearest(block.name, known) or "use one of those"
        if isinstance(error, zoo.BrokenEntryPointError):
            expected = "an entry point that gives a ModelSpec"
            fix = f"repair or uninstall {error.package}, or use another model"
        return None, [Problem("model.name", f"{block.name!r} ({error})", expected, fix)]
    problems: list[Problem] = []
    config = apply_config(spec.config, block.config, "model.config", problems)
    return spec.with_config(config), problems


def apply_config(
    config: Any, overrides: Mapping[str, Any], key: str, problems: list[Problem]
) -> Any:
    """`dataclasses.replace` with checked names and types; nested dataclasses take mappings.

    What is wrong is added to `problems` and left out of the result.
    """
    names = [field.name for field in dataclasses.fields(config) if field.init]
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        path = f"{key}.{name}"
        if name not in names:
            fix = nearest(str(name), names)
            fix = fix or f"remove it; the fields are {', '.join(names)}"
            expected = f"a field of {type(config).__name__}"
            problems.append(Problem(path, f"an unknown field (value {value!r})", expected, fix))
            continue
        before = len(problems)
        converted = _convert(value, hints[name], getattr(config, name), path, problems)
        if len(problems) == before:
            changes[name] = converted
    try:
        return dataclasses.replace(config, **changes)
    except (ValueError, TypeError) as error:
        if not problems:  # else it may only follow from what is told already
            problems.append(Problem(key, str(error), "a sound architecture", f"correct {key}"))
        return config


def _convert(value: Any, hint: Any, current: Any, key: str, problems: list[Problem]) -> Any:
    """A YAML value as the field's type: list to tuple, mapping to dataclass, 1 to 1.0."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
            if dataclasses.is_dataclass(current):
                return apply_config(current, value, key, problems)
            return _make(origin, value, key, problems)
        if origin is tuple and isinstance(value, list | tuple):
            item = (typing.get_args(kind) or (Any,))[0]
            parts = enumerate(value)
            return tuple(_convert(v, item, None, f"{key}.{i}", problems) for i, v in parts)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin in (bool, str) and isinstance(value, origin):
            return value
        plain = (int, float, bool, str, tuple, type(None))
        if origin not in plain and not dataclasses.is_dataclass(origin):
            return value  # a type that YAML knows nothing of: the dataclass judges
    expected = getattr(hint, "__name__", str(hint)) if not _is_union(hint) else str(hint)
    problems.append(Problem(key, repr(value), f"a value of type {expected}", f"correct {key}"))
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _make(kind: type, values: Mapping[str, Any], key: str, problems: list[Problem]) -> Any:
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        found = f"{dict(values)!r} ({error})"
        problems.append(Problem(key, found, f"fields {names}", f"correct {key}"))
        return None
