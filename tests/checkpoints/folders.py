"""Hub-format folders for the tests, made from a config with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoints_tools.safetensors_io import NUMPY_DTYPES, SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import write_folder
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.hf_mapping import hub_tensors as v32_hub_tensors

GOLDEN = Path(__file__).parents[1] / "data" / "v4_tiny"


def random_tensors(config: DeepseekV4Config | DeepseekV32Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Native name -> float32 (or int64) array of every weight of a model."""
    rng = np.random.default_rng(seed)
    tensors = {}
    table = v32_hub_tensors if isinstance(config, DeepseekV32Config) else hub_tensors
    for tensor in table(config):
        if tensor.storage == "i64":
            tensors[tensor.name] = rng.integers(0, tensor.limit, tensor.shape)
        else:
            tensors[tensor.name] = 0.1 * rng.normal(size=tensor.shape).astype(np.float32)
    return tensors


def native_tensors(
    config: DeepseekV4Config, seed: int = 0, *, fp8_scale: str = "F8_E8M0"
) -> dict[str, np.ndarray]:
    """Name -> array of every tensor of a released folder: FP8 and FP4 codes with their scales, BF16, F32, I64.

    Args:
      fp8_scale: dtype of the scales of FP8 weights; the -Base releases have F32.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in hub_tensors(config):
        for stored in tensor.stored():
            dtype = NUMPY_DTYPES[stored.dtype]
            if stored.dtype == "I64":
                array = rng.integers(0, tensor.limit, stored.shape)
            elif stored.dtype == "F8_E4M3":
                codes = rng.integers(0, 256, stored.shape, np.uint8)
                array = np.where(codes & 0x7F == 0x7F, codes - 1, codes).view(dtype)  # no NaN
            elif stored.dtype == "I8":
                array = rng.integers(0, 256, stored.shape, np.uint8).view(dtype)
            elif stored.dtype == "F8_E8M0" and tensor.storage == "fp8" and fp8_scale == "F32":
                array = (0.5 + rng.random(stored.shape)).astype(np.float32) / 2048
            elif stored.dtype == "F8_E8M0":
                array = rng.integers(112, 118, stored.shape, np.uint8).view(dtype)
            else:
                array = (0.1 * rng.standard_normal(stored.shape)).astype(dtype)
            tensors[stored.name] = array
    return tensors


def native_folder(
    path: Path, config: DeepseekV4Config, *, max_shard_bytes: int = 1 << 20, **kwargs
) -> dict[str, np.ndarray]:
    """Writes `native_tensors` as several shards; returns them."""
    tensors = native_tensors(config, **kwargs)
    hub_config = {**config.to_hf_config(), "expert_dtype": config.expert_dtype or "fp4"}
    write_folder(path, tensors, config=hub_config, max_shard_bytes=max_shard_bytes)
    (path / "tokenizer.json").write_text('{"a": 1}')
    return tensors


def assert_same_bytes(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Every tensor of a folder has the dtype, shape and bytes of the given one, and there are no others."""
    found = SafetensorsCheckpoint(path)
    assert set(found.tensors) == set(tensors)
    for name, array in tensors.items():
        again = found.read(name)
        assert again.dtype == array.dtype and again.shape == array.shape, name
        assert again.tobytes() == array.tobytes(), name
