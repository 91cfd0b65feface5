"""Which documents are trained on and which are held out: by their keys, or by counting where there are too many."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """The documents of the two splits, rising; lazy where they can be computed."""

    train: Sequence[int] | np.ndarray
    holdout: Sequence[int] | np.ndarray


def split_by_keys(keys: np.ndarray, share: float) -> Split:
    """Holds out the documents with the smallest keys.

    So a document stays on its side when others are added, and copies of it are on the same side.

    Args:
      keys: [num_documents] uint64, evenly spread. share: at least 0, below 1.
    """
    if not share:
        return Split(range(len(keys)), range(0))
    held_out = keys < np.uint64(int(share * 2**64))
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))


def split_by_grid(counts: Sequence[int], offsets: Sequence[int], share: float) -> Split:
    """Holds out an even grid of each file's records: of 0.01, every hundredth. Nothing is stored for a record.

    With the share as the fraction a / b, the record p of a file is held out when floor((p + offset) a / b) rises
    from it to the next one. So a record stays on its side when other files are added, or records behind it; and what
    1 / b holds out, a / b does too.

    Args:
      counts: of each file's records. offsets: of each file, a number that is the file's alone.
      share: at least 0, below 1, taken as it is written: 0.1 is a tenth.
    """
    if not share:
        return Split(range(sum(counts)), range(0))
    fraction = Fraction(repr(float(share)))
    return Split(_Grid(counts, offsets, fraction, False), _Grid(counts, offsets, fraction, True))


class _Grid(Sequence):
    """One side of `split_by_grid`: the i-th document is found by arithmetic, in integers, exact for any position."""

    def __init__(self, counts: Sequence[int], offsets: Sequence[int], share: Fraction, held_out: bool):
        self._a, self._b, self._held_out = share.numerator, share.denominator, held_out
        self._offsets = [offset % self._b for offset in offsets]
        own = (
            self._before(count + offset) - self._before(offset)
            for count, offset in zip(counts, self._offsets, strict=True)
        )
        self._starts = list(itertools.accumulate(own, initial=0))  # in this split
        self._firsts = list(itertools.accumulate(counts, initial=0))  # in all documents

    def _before(self, x: int) -> int:
        """Points of this side below x: floor(x a / b) on the grid, the others off it."""
        on_grid = x * self._a // self._b
        return on_grid if self._held_out else x - on_grid

    def _point(self, i: int) -> int:
        """The point, the inverse of `_before`, with i of its side before it."""
        if self._held_out:
            return -(-(i + 1) * self._b // self._a) - 1
        return i * self._b // (self._b - self._a)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file = bisect.bisect_right(self._starts, index) - 1
        offset = self._offsets[file]
        position = self._point(self._before(offset) + index - self._starts[file]) - offset
        return self._firsts[file] + position
