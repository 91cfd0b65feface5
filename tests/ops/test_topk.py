"""Top-k by bisection takes what a stable sort takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops.topk import bisected_topk


def rows(kind: str, entries: int) -> np.ndarray:
    rng = np.random.default_rng(entries)
    scores = rng.standard_normal((2, 5, entries)).astype(np.float32)
    if kind == "tied":
        scores = np.round(scores)  # among them 0.0 and -0.0
    if kind == "constant":
        scores[:] = -3.5
    if kind == "tiny":
        scores *= 1e-42  # subnormal
    if kind == "special":
        which = rng.integers(0, 6, scores.shape)
        for number, value in enumerate((np.inf, -np.inf, 0.0, -0.0)):
            scores[which == number] = value
    if kind == "hidden":
        scores[rng.random(scores.shape) < 0.9] = -np.inf
    return scores


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "tiny", "special", "hidden"])
@pytest.mark.parametrize(("entries", "keep"), [(1, 1), (37, 1), (37, 36), (37, 37), (300, 64), (1025, 512)])
def test_takes_what_a_stable_sort_takes(kind, entries, keep):
    scores = rows(kind, entries)
    got = np.asarray(jax.jit(bisected_topk, static_argnums=1)(scores, keep))
    for row, found in zip(scores.reshape(-1, entries), got.reshape(-1, keep), strict=True):
        best = np.argsort(-row, kind="stable")[:keep]
        best = np.sort(best[row[best] > -np.inf])
        np.testing.assert_array_equal(found, [*best, *[-1] * (keep - len(best))])


def test_nan_is_taken_for_the_largest_and_left_out():
    """As it is where a row is sorted: `exact_topk` lists what scores above -inf, and NaN does not."""
    scores = jnp.asarray([[[1.0, jnp.nan, 3.0, 2.0, jnp.nan]]])
    np.testing.assert_array_equal(bisected_topk(scores, 3), [[[2, -1, -1]]])
