"""Reading a Hub's `config.json` strictly: every key taken once, every problem told at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Fields:
    """The file's keys, taken one by one; what is left at the end is unknown. Collects the problems."""

    def __init__(self, raw: Mapping[str, Any]):
        self._left = dict(raw)
        self.problems: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def require(self, name: str) -> Any:
        if self._left.get(name) is None:
            self.problems.append(f"{name}: missing")
        return self.take(name)

    def leftovers(self) -> list[str]:
        return sorted(self._left)

    def agree(self, name: str, found: Iterable[tuple[str, Any]]) -> Any:
        """The one value given in several places; None when in none, a problem when they differ."""
        given = [(place, value) for place, value in found if value is not None]
        if any(value != given[0][1] for _, value in given):
            listing = ", ".join(f"{place} gives {value!r}" for place, value in given)
            self.problems.append(f"{name}: {listing}; make them equal or remove all but one")
        return given[0][1] if given else None


def parse_file(path: Path) -> tuple[Mapping[str, Any], str]:
    """(what a JSON file, or the `config.json` of a folder, holds; its name).

    Raises:
      ValueError: naming the file, for what is not an object of finite numbers with every key once.
      OSError: when the file cannot be read.
    """
    path = path / "config.json" if path.is_dir() else path

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
        if twice:
            raise ValueError(f"{path}: keys given twice: {', '.join(twice)}")
        return dict(pairs)

    def constant(text: str) -> None:
        raise ValueError(f"{path}: found the number {text}, expected finite numbers")

    try:
        raw = json.loads(path.read_text("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: found a JSON {type(raw).__name__}, expected an object")
    return raw, str(path)
