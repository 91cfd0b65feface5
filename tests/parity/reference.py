"""Bridges to the PyTorch reference: building its modules at our configs' sizes, and copying weights over."""

from __future__ import annotations

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch comparisons need torch")
pytest.importorskip("transformers", reason="the PyTorch comparisons need transformers")

from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf  # noqa: E402
from transformers.models.deepseek_v4.configuration_deepseek_v4 import (  # noqa: E402
    DeepseekV4Config as HFConfig,
)

from fathom.models.deepseek_v4.config import DeepseekV4Config  # noqa: E402

__all__ = [
    "causal_window_mask",
    "copy",
    "double_precision",
    "hf",
    "hf_config",
    "randomize",
    "relative",
    "small_config",
    "torch",
]


def small_config(**changes) -> DeepseekV4Config:
    """The tiny config with changes, for one property of a test at a time."""
    return dataclasses.replace(DeepseekV4Config.tiny(), **changes)


def hf_config(config: DeepseekV4Config) -> HFConfig:
    """The reference's config of the same model, running its eager attention in float32."""
    reference = HFConfig(**config.to_hf_config())
    reference._attn_implementation = "eager"
    reference._experts_implementation = "eager"
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


@contextlib.contextmanager
def double_precision():
    """Runs the reference in float64 throughout, its casts to float32 included.

    Its own float32 gradients are off by up to 1e-4 where long sums cancel (mHC's scales), so gradients are held
    against this instead: the tolerance then measures our rounding alone.
    """
    to, softmax = torch.Tensor.to, torch.Tensor.softmax

    def widen(value):
        return torch.float64 if value is torch.float32 else value

    patches = {
        "float": torch.Tensor.double,
        "to": lambda x, *a, **k: to(x, *map(widen, a), **{n: widen(v) for n, v in k.items()}),
        "softmax": lambda x, dim, dtype=None: softmax(x, dim, dtype=widen(dtype)),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in patches.items():
            patch.setattr(torch.Tensor, name, replacement)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
