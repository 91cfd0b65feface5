"""Reading a Hub's `config.json` strictly: every key taken once, every problem told at once.

A model keeps the tables of its own field names; what is the same for every model is here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fathom.models.config_parts import YarnScaling

Config = TypeVar("Config")
Yarn = TypeVar("Yarn", bound=YarnScaling)

# Keys that say nothing about any model's architecture.
_IGNORED = frozenset(
    """architectures auto_map dtype torch_dtype transformers_version use_cache _name_or_path
    pad_token_id chunk_size_feed_forward id2label label2id is_encoder_decoder problem_type
    return_dict output_attentions output_hidden_states output_router_logits router_aux_loss_coef
    scale_fmt max_batch_size max_seq_len""".split()
)


class Fields:
    """The file's keys, taken one by one; what is left at the end is unknown. Collects the problems.

    Args:
      source: a dict, a JSON file or the folder that holds `config.json`.
      to_hub_names: gives the source's keys the Hub's names.

    Raises:
      ValueError, OSError: as `parse_file`.
    """

    def __init__(
        self,
        source: Mapping[str, Any] | str | Path,
        to_hub_names: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ):
        raw, self._where = (source, "config") if isinstance(source, Mapping) else parse_file(Path(source))
        self._left = dict(to_hub_names(raw))
        self.problems: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def require(self, name: str) -> Any:
        if self._left.get(name) is None:
            self.problems.append(f"{name}: missing")
        return self.take(name)

    def take_plain(
        self, fixed: Mapping[str, tuple[Any, ...]], required: Mapping[str, str], optional: Mapping[str, str]
    ) -> dict[str, Any]:
        """Our name -> value of the fields that are read as they stand.

        Args:
          fixed: Hub field -> the values that the model is defined for; absent is the first. Checked, not returned.
          required, optional: Hub field -> our name.
        """
        for name, allowed in fixed.items():
            value = self.take(name, allowed[0])
            # By type too: True == 1 and 0 == False.
            if type(value) not in map(type, allowed) or value not in allowed:
                self.problems.append(f"{name}: found {value!r}, supported {allowed[0]!r} only")
        ours = {our_name: self.require(name) for name, our_name in required.items()}
        given = {our_name: self.take(name, ...) for name, our_name in optional.items()}
        return ours | {our_name: value for our_name, value in given.items() if value is not ...}

    def take_tables(self, *names: str) -> list[Mapping[str, Any]] | None:
        """Objects, empty where absent or null; None, with a problem, when one is something else."""
        tables = {name: self.take(name) for name in names}
        for name, value in tables.items():
            if value is not None and not isinstance(value, Mapping):
                self.problems.append(f"{name}: found {value!r}, expected an object or null")
                return None
        return [value or {} for value in tables.values()]

    def agree(self, name: str, found: Iterable[tuple[str, Any]]) -> Any:
        """The one value given in several places; None when in none, a problem when they differ."""
        given = [(place, value) for place, value in found if value is not None]
        if any(value != given[0][1] for _, value in given):
            listing = ", ".join(f"{place} gives {value!r}" for place, value in given)
            self.problems.append(f"{name}: {listing}; make them equal or remove all but one")
        return given[0][1] if given else None

    def yarn_numbers(self, place: str, table: Mapping[str, Any], beside: Iterable[str]) -> dict[str, Any] | None:
        """What a rope table of type "yarn" holds but for its type and the keys `beside` YaRN, None for plain RoPE."""
        left = {key: value for key, value in table.items() if value is not None and key not in beside}
        kind = self.agree(f"{place}.type", [(key, left.pop(key, None)) for key in ("type", "rope_type")])
        if kind in (None, "default"):
            if left:
                self.problems.append(f"{place}: found {sorted(left)} without type 'yarn'")
            return None
        if kind != "yarn":
            self.problems.append(f"{place}.type: found {kind!r}, expected 'yarn' or 'default'")
            return None
        return left

    def make_yarn(self, place: str, numbers: Mapping[str, Any], yarn: type[Yarn]) -> Yarn | None:
        """A `yarn` of these numbers; None, with a problem, when it cannot be."""
        numbers = {"beta_fast": 32, "beta_slow": 1} | numbers
        known = {field.name for field in dataclasses.fields(yarn)}
        if set(numbers) != known:
            self.problems.append(f"{place}: found keys {sorted(numbers)}, expected {sorted(known)}")
            return None
        try:
            return yarn(**numbers)
        except ValueError as error:
            self.problems.append(str(error))
            return None

    def finish(self, model: str, config: type[Config], ours: Mapping[str, Any], ignored: Iterable[str] = ()) -> Config:
        """The config of these numbers, when every key was understood.

        Args:
          model: its name in the message.
          ignored: keys of this model's files that say nothing about its architecture.

        Raises:
          ValueError: listing every problem and unknown key at once; or naming the one number that is out of range.
        """
        unknown = sorted(set(self._left) - _IGNORED - set(ignored))
        if unknown:
            self.problems.append(f"unknown keys: {', '.join(unknown)}")
        if self.problems:
            raise ValueError(f"{self._where}: not a {model} config Fathom knows: " + "; ".join(self.problems))
        try:
            return config(**ours)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None


def write_plain(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Hub field -> value of a config, JSON-ready; `names` is Hub field -> our name."""
    values = {name: getattr(config, our_name) for name, our_name in names.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
