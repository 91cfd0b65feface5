"""Bridges to the PyTorch reference: building its modules at our configs' sizes, and copying weights over."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch comparisons need torch")
pytest.importorskip("transformers", reason="the PyTorch comparisons need transformers")

from transformers.models.deepseek_v4.configuration_deepseek_v4 import (  # noqa: E402
    DeepseekV4Config as HFConfig,
)

from fathom.models.deepseek_v4.config import DeepseekV4Config  # noqa: E402

KIND_NAMES = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def small_config(**changes) -> DeepseekV4Config:
    """The tiny config with changes, for one property of a test at a time."""
    return dataclasses.replace(DeepseekV4Config.tiny(), **changes)


def hf_config(config: DeepseekV4Config) -> HFConfig:
    """The reference's config of the same model, running its eager attention in float32."""
    reference = HFConfig(**config.to_hf_config())
    reference._attn_implementation = "eager"
    return reference


def randomize(module, seed: int) -> None:
    """Random weights well away from their initial values, so that every term shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            weight.data = 1 + 0.2 * noise
        elif weight.ndim > 1:
            fan_in = weight.shape[-1]
            weight.data = noise * fan_in**-0.5
        else:
            weight.data = 0.5 * noise


def copy(weight, tensor, transpose: bool = False) -> None:
    """Copies a reference tensor into one of our variables, transposing [out, in] kernels if asked."""
    value = tensor.detach().numpy()
    value = value.T if transpose else value
    weight[...] = jnp.asarray(np.ascontiguousarray(value).reshape(weight.shape))


def relative(ours, theirs) -> float:
    """Relative L2 error of ours against theirs."""
    ours = np.asarray(ours, np.float64).ravel()
    theirs = np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs, np.float64).ravel()
    norm = np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs) / norm) if norm else float(np.linalg.norm(ours))


def causal_window_mask(length: int, window: int, batch: int):
    """The additive sliding-window mask that the reference's attention takes."""
    index = torch.arange(length)
    distance = index[:, None] - index[None, :]
    mask = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf)
    return mask[None, None].expand(batch, 1, length, length)
