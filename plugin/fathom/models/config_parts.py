"""What the models' configs share: checked numbers, YaRN's, the plan that derives scanned runs, visible entries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_INT = 2**31 - 1
# Bounds far above any released model, so that a damaged or hostile config is refused here and not
# by the machine's memory.
MAX_LAYERS = 4096
MAX_LAYERS_TIMES_EXPERTS = 2**20


def check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INT:
        raise ValueError(f"{name}: found {value!r}, expected an integer from {low} to {MAX_INT}")


def check_real(name: str, value: Any, above: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= above:
        raise ValueError(f"{name}: found {value!r}, expected a finite number above {above}")


def check_divides(whole: str, whole_value: int, part: str, part_value: int) -> None:
    if whole_value % part_value:
        raise ValueError(f"{whole} {whole_value} is not divisible by {part} {part_value}")


def check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    if value > limit:
        raise ValueError(f"{name} {value} is more than {limit_name} {limit}")


def set_reals(config: Any, names: Iterable[str], prefix: str = "") -> None:
    """Makes floats of finite numbers above 0; ValueError names a field that is none."""
    for name in names:
        check_real(prefix + name, getattr(config, name), above=0)
        object.__setattr__(config, name, float(getattr(config, name)))


def set_tuples(config: Any, names: Iterable[str]) -> None:
    """Makes tuples of lists, as a recipe's override gives them."""
    for name in names:
        if isinstance(getattr(config, name), list):
            object.__setattr__(config, name, tuple(getattr(config, name)))


def set_part(config: Any, name: str, kind: type) -> None:
    """Makes the dataclass `kind` of a dict, as a recipe's override gives it; ValueError for all else but None."""
    value = getattr(config, name)
    if isinstance(value, Mapping):
        known = {field.name for field in dataclasses.fields(kind)}
        if set(value) != known:
            raise ValueError(f"{name}: found keys {sorted(value)}, expected {sorted(known)}")
        object.__setattr__(config, name, kind(**value))
    elif value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}: found {value!r}, expected a {kind.__name__} or None")


def check_yarn_length(config: Any) -> None:
    """ValueError when YaRN starts from more positions than the model has."""
    if config.rope_scaling is not None:
        check_at_most(
            "rope_scaling.original_max_position_embeddings",
            config.rope_scaling.original_max_position_embeddings,
            "max_position_embeddings",
            config.max_position_embeddings,
        )


def check_tokens(config: Any) -> None:
    """ValueError for a special token that is no id of the vocabulary; None is not given."""
    eos = config.eos_token_id
    places = [("bos_token_id", config.bos_token_id)]
    places += [("eos_token_id", token) for token in (eos if isinstance(eos, tuple) else (eos,))]
    for name, token in places:
        if token is not None:
            check_int(name, token, 0)
            check_at_most(name, token, "the last token id", config.vocab_size - 1)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN, which stretches RoPE to a longer context. V4 has it in the layers that compress, without a factor on the
    attention; V3.2 everywhere, with one (its config's `MscaleYarn`).

    Attributes:
      factor: context length over the original one.
      original_max_position_embeddings: positions the model was first trained on.
      beta_fast, beta_slow: rotations over the original context above which a frequency is kept, and
        below which it is divided by `factor`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float

    def __post_init__(self) -> None:
        set_reals(self, ("factor", "beta_fast", "beta_slow"), "rope_scaling.")
        check_int(
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            1,
        )
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor: found {self.factor}, expected at least 1")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"rope_scaling.beta_fast: found {self.beta_fast}, expected more than beta_slow {self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How the layers are compiled: `prefix` unrolled, `unit` layers scanned `repeats` times,
    `suffix` unrolled.

    Scanned layer u of repetition r is layer `len(prefix) + r * unit + u`. Without a scan `unit` and
    `repeats` are 0 and every layer is in `prefix`.
    """

    prefix: range
    unit: int
    repeats: int
    suffix: range

    def layer_of(self, unit_index: int, repeat: int) -> int:
        """The layer index of one scanned layer."""
        return len(self.prefix) + repeat * self.unit + unit_index


@functools.lru_cache(maxsize=64)
def plan_layers(kinds: tuple[Any, ...]) -> LayerPlan:
    """The plan with the fewest distinct compiled blocks for any schedule of layer kinds.

    Minimises `len(prefix) + unit + len(suffix)` over all runs that repeat at least twice. Between
    equal costs the shorter suffix wins, then the shorter unit.
    """
    count = len(kinds)
    best = (count, 0, 0, count, 0)  # cost, suffix, unit, start, repeats
    for start in range(count):
        for unit in range(1, (count - start) // 2 + 1):
            same = start + unit
            while same < count and kinds[same] == kinds[same - unit]:
                same += 1
            repeats = (same - start) // unit
            if repeats < 2:
                continue
            suffix = count - start - unit * repeats
            best = min(best, (start + unit + suffix, suffix, unit, start, repeats))
    _, suffix, unit, start, repeats = best
    if not unit:
        return LayerPlan(range(count), 0, 0, range(count, count))
    return LayerPlan(range(start), unit, repeats, range(count - suffix, count))


def visible_entries(seq_len: int, ratio: int, limit: int | None = None) -> float:
    """Mean over queries t = 1..S of min(limit, floor(t / m)): entries of m tokens that a query attends to."""
    last = seq_len // ratio
    if limit is None or last <= limit:
        total = ratio * last * (last - 1) // 2 + last * (seq_len - last * ratio + 1)
    else:
        total = ratio * limit * (limit - 1) // 2 + limit * (seq_len - limit * ratio + 1)
    return total / seq_len
