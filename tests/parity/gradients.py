"""How far a gradient may be from the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

RELATIVE = 5e-5
"""Relative L2 error of a parameter's gradient."""
ROUNDINGS = 4 * 2.0**-23
"""What float32 leaves of a sum, in parts of its terms: four roundings. Measured: 1.5e-7, and the reference's own
float32 1.3e-7 (scripts/bench/parity.py --models)."""


def error_limits(weights: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The L2 error allowed to each gradient, by native names.

    RELATIVE of its norm; but a mixing factor of mHC is one number whose gradient is a sum over all tokens and streams,
    and where its terms cancel the sum is as inexact as they are. The factor only ever multiplies its rows of `fn`, so
    that its gradient is their scalar product with their own gradient, over the factor: the product of the two norms is
    the size of the terms. Before layer 0, which reads equal streams, they cancel to a ten-thousandth, and the
    reference's float32 is off by 1e-4 of the sum itself.
    """
    limits = {name: RELATIVE * float(np.linalg.norm(gradient)) for name, gradient in exact.items()}
    for name in exact:
        if name.endswith(("_scale",)) and name.removesuffix("scale") + "fn" in exact:
            limits[name] = max(limits[name], ROUNDINGS * terms_size(weights, exact, name))
    return limits


def terms_size(weights: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], name: str) -> float:
    """L2 norm over the factors `name` of the size of the terms that their gradients sum."""
    fn = name.removesuffix("scale") + "fn"
    factors, rows = np.abs(np.asarray(weights[name], np.float64)), len(exact[fn])
    streams = math.isqrt(rows + 1) - 1  # rows = streams + streams + streams^2, for pre, post and comb
    cuts = [streams, 2 * streams] if len(factors) == 3 else []
    norms = [
        [float(np.linalg.norm(part)) for part in np.split(np.asarray(of[fn], np.float64), cuts)]
        for of in (weights, exact)
    ]
    return float(np.linalg.norm(np.prod(norms, axis=0) / factors))
