"""Which documents are held out: by counting, exactly, wherever a record lies."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from fathom.train.selection import split_by_grid, split_by_keys

COUNTS = (0, 7, 1, 0, 0, 40, 3, 100, 0)
OFFSETS = (5, 2**64 - 1, 0, 1, 2, 987_654_321, 12, 2**63 + 7, 3)
SHARES = (0.001, 0.003, 0.01, 0.2, 0.25, 0.3333, 0.4, 0.5, 0.75, 0.999, 1e-300, 0.1 + 0.2)


def by_definition(counts, offsets, share) -> tuple[list[int], list[int]]:
    """Record by record, as `split_by_grid` says what it does."""
    h, sides, number = Fraction(repr(share)), ([], []), 0
    for count, offset in zip(counts, offsets, strict=True):
        for p in range(count):
            sides[(p + 1 + offset) * h // 1 > (p + offset) * h // 1].append(number)
            number += 1
    return sides


@pytest.mark.parametrize("share", SHARES)
def test_the_grid_is_what_its_definition_says(share):
    split = split_by_grid(COUNTS, OFFSETS, share)
    assert tuple(map(list, split)) == by_definition(COUNTS, OFFSETS, share)
    assert [len(side) for side in split] == [len(list(side)) for side in split]
    for side in split:
        for outside in (-1, len(side)):
            with pytest.raises(IndexError):
                side[outside]


def test_no_holdout_is_everything():
    for split in (split_by_grid(COUNTS, OFFSETS, 0.0), split_by_keys(np.zeros(151, np.uint64), 0)):
        assert split.train == range(151) and len(split.holdout) == 0


@pytest.mark.parametrize("share", [0.4, 0.003, 0.001, 1 / 3])
def test_shares_are_exact_far_from_the_beginning(share):
    """No drift: in 1e12 records, counts to one record and positions to the spacing of the grid."""
    count = 10**12
    train, held = split_by_grid([count], [2**64 - 3], share)
    assert len(train) + len(held) == count and abs(len(held) - Fraction(repr(share)) * count) < 1
    spacing = 1 / Fraction(repr(share))
    for i in (0, 1, len(held) // 2, len(held) - 2):
        assert abs(held[i + 1] - held[i] - spacing) < 1
        assert abs(held[i] - held[0] - i * spacing) < 1
    # Around a held-out record lie those of the other side, each once.
    at = held[len(held) // 2]
    others = {train[int(at * (1 - share)) + i] for i in range(-5, 6)}
    assert at not in others and len(others) == 11


def test_a_record_stays_on_its_side():
    """Whatever other files there are, and when records come behind it; 1/5 is part of 2/5."""
    counts, offsets = (40, 100), (987_654_321, 7)

    def held(counts, offsets, share=0.4, skip=0):
        return {i - skip for i in split_by_grid(counts, offsets, share).holdout}

    alone = held(counts, offsets)
    assert {i for i in held((3, *counts), (1, *offsets), skip=3) if i >= 0} == alone
    assert {i for i in held((40, 150), offsets) if i < 140} == alone
    assert held(counts, offsets, 0.2) < alone


def test_equal_files_hold_out_different_positions():
    """Files with fewer records than the grid is wide: some have one, with a share of 0.01 about one in ten of these."""
    rng = np.random.default_rng(0)
    counts = [10] * 2000
    held = split_by_grid(counts, rng.integers(0, 2**63, 2000).tolist(), 0.01).holdout
    assert 160 < len(held) < 240
    assert {i % 10 for i in held} == set(range(10))


def test_nothing_is_stored_for_a_record():
    files = 320
    tracemalloc.start()
    try:
        split = split_by_grid([10**8] * files, list(range(files)), 0.003)
        assert len(split.train) + len(split.holdout) == 32 * 10**9
        assert split.train[len(split.train) - 1] >= 32 * 10**9 - 2
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_keys():
    keys = np.array([0, 2**63, 2**62, 2**64 - 1], np.uint64)
    train, held = split_by_keys(keys, 0.5)
    assert train.tolist() == [1, 3] and held.tolist() == [0, 2]
