"""DeepSeek-V4: the ModelSpec of each released size and of the tiny one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from fathom.layers.losses import language_model_loss
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.formulas import flops_per_token, num_params
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, native_pieces
from fathom.models.deepseek_v4.model import DeepseekV4
from fathom.models.deepseek_v4.sharding import PRESETS
from fathom.zoo import ModelSpec

ROUTER_BIAS_SUFFIX = ("ffn", "router", "bias")


def build(config: DeepseekV4Config, rngs: nnx.Rngs, options: ComputeOptions) -> DeepseekV4:
    """The model with random weights."""
    return DeepseekV4(config, rngs, options)


def update_router_bias(state: nnx.State, aux: dict[str, Any], speed: float) -> nnx.State:
    """Auxiliary-loss-free balancing: each expert's bias moves by `speed` towards the mean load.

    Args:
      state: the model's non-Param variables; only router biases change.
      aux: the loss's aux; "expert_load" maps block path -> token counts [..., E] of the whole batch.
      speed: step of the bias (V4: 0.001).
    """
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if path[-len(ROUTER_BIAS_SUFFIX) :] != ROUTER_BIAS_SUFFIX:
            continue
        load = aux["expert_load"]["/".join(map(str, path[: -len(ROUTER_BIAS_SUFFIX)]))]
        error = jnp.mean(load, axis=-1, keepdims=True) - load
        flat[path] = variable.replace(variable.get_value() + speed * jnp.sign(error))
    return nnx.from_flat_state(flat)


def frozen(path: tuple, stage: str) -> bool:
    """The language-model loss never reaches the indexer, so weight decay must not erode it either."""
    return "indexer" in path


def make_spec(name: str, config: DeepseekV4Config) -> ModelSpec:
    """A ModelSpec of the V4 family at any size."""
    return ModelSpec(
        name=name,
        config=config,
        build=build,
        loss=language_model_loss,
        sharding_presets=PRESETS,
        num_params=num_params,
        flops_per_token=flops_per_token,
        update_state=update_router_bias,
        frozen=frozen,
        config_from_hf=DeepseekV4Config.from_hf_config,
        config_to_hf=DeepseekV4Config.to_hf_config,
        hub_tensors=hub_tensors,
        hub_model_type="deepseek_v4",
        hub_pieces=native_pieces,
    )


def flash() -> ModelSpec:
    """DeepSeek-V4-Flash."""
    return make_spec("deepseek-v4-flash", DeepseekV4Config.flash())


def pro() -> ModelSpec:
    """DeepSeek-V4-Pro."""
    return make_spec("deepseek-v4-pro", DeepseekV4Config.pro())


def tiny() -> ModelSpec:
    """A small V4 that uses every feature of the real ones."""
    return make_spec("deepseek-v4-tiny", DeepseekV4Config.tiny())
