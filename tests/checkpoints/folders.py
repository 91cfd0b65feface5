"""Hub-format folders for the tests, made from a config with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors

GOLDEN = Path(__file__).parents[1] / "data" / "v4_tiny"


def random_tensors(config: DeepseekV4Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Native name -> float32 (or int64) array of every weight of a model."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in hub_tensors(config):
        if tensor.storage == "i64":
            tensors[tensor.name] = rng.integers(0, tensor.limit, tensor.shape)
        else:
            tensors[tensor.name] = 0.1 * rng.normal(size=tensor.shape).astype(np.float32)
    return tensors
