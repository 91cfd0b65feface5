"""Storing named weights in fewer bits than they have, because somebody asked for these."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

TARGETS = {"bf16": ("BF16", ("F32", "F16")), "fp32": ("F32", ("F64",)), "i32": ("I32", ("I64",))}
"""Asked for -> (dtype as spelled in files, dtypes it may be applied to)."""


class Narrowing:
    """Rules "NAME=DTYPE"; NAME is a native tensor name or a shell pattern of some.

    Args:
      rules: as given. names: of all weights.

    Raises:
      ValueError: listing every rule that is malformed or matches nothing.
    """

    def __init__(self, rules: Sequence[str], names: Iterable[str] = ()):
        names = list(names)
        self._targets: dict[str, str] = {}
        problems = []
        for rule in rules:
            pattern, separator, target = rule.rpartition("=")
            if not separator or target not in TARGETS:
                problems.append(f"{rule!r}: expected NAME=DTYPE with a dtype of {', '.join(TARGETS)}")
                continue
            matched = fnmatch.filter(names, pattern)
            if not matched:
                near = difflib.get_close_matches(pattern, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                problems.append(f"{rule!r}: no weight has this name{hint}")
            self._targets |= dict.fromkeys(matched, target)
        if problems:
            raise ValueError("narrow: " + "; ".join(problems))

    def apply(self, name: str, dtype: str) -> str:
        """The dtype a weight shall have, given the one it would have.

        Raises:
          ValueError: when the rule does not fit the dtype (a float asked to become an integer).
        """
        if name not in self._targets:
            return dtype
        spelled, allowed = TARGETS[self._targets[name]]
        if dtype == spelled:
            return dtype
        if dtype not in allowed:
            raise ValueError(f"narrow: {name} is {dtype}, which cannot become {spelled}")
        return spelled
