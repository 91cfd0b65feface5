"""How far a gradient may be from the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

RELATIVE = 5e-5
"""Relative L2 error of a parameter's gradient."""
OF_TERMS = 4 * 2.0**-23
"""What float32 may leave of a sum whose terms cancel, in parts of them: about three times the worst measured, ours
1.5e-7 and the reference's own float32 1.3e-7 (scripts/bench/parity.py --models)."""


def too_far(
    found: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative L2 error of each gradient that is not within its limit, by native names.

    The limit is RELATIVE; but a mixing factor of mHC is one number whose gradient is a sum over all tokens and streams,
    and where its terms cancel the sum is as inexact as they are: before layer 0, which reads equal streams, to a
    ten-thousandth, and the reference's own float32 is off by 1e-4 of the sum. There the limit is OF_TERMS of
    `terms_size`. The factors of one connection are one tensor, whose error is one norm, as everywhere.
    """
    beyond = {}
    for name, gradient in exact.items():
        error, norm = float(np.linalg.norm(found[name] - gradient)), float(np.linalg.norm(gradient))
        limit = RELATIVE * norm
        if name.endswith("_scale"):
            limit = max(limit, OF_TERMS * terms_size(weights, exact, name))
        if not error <= limit:
            beyond[name] = error / norm
    return beyond


def terms_size(weights: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], name: str) -> float:
    """A bound on the gradient of the mixing factors `name`, whatever cancels in it, as one L2 norm.

    A factor multiplies its rows of `fn` and nothing else, so that its gradient is their scalar product with their own
    gradient, over the factor; the bound is the product of the two norms, over the factor.
    """
    fn = name.removesuffix("scale") + "fn"
    factors, rows = np.abs(np.asarray(weights[name], np.float64)), len(exact[fn])
    streams = math.isqrt(rows + 1) - 1  # rows = streams + streams + streams^2, for pre, post and comb
    cuts = [streams, 2 * streams] if len(factors) == 3 else []
    norms = [
        [float(np.linalg.norm(part)) for part in np.split(np.asarray(of[fn], np.float64), cuts)]
        for of in (weights, exact)
    ]
    return float(np.linalg.norm(np.prod(norms, axis=0) / factors))
