"""DeepSeek-V4: the ModelSpec of each released size and of the tiny one.

The model itself is imported when it is built: what reads only configs and tensor tables needs no jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.formulas import flops_per_token, num_params, step_flops
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, native_pieces
from fathom.models.deepseek_v4.sharding import PRESETS
from fathom.models.training import frozen, loss, route, update_state
from fathom.zoo import ModelSpec

if TYPE_CHECKING:
    from flax import nnx

    from fathom.layers.options import ComputeOptions
    from fathom.models.deepseek_v4.model import DeepseekV4


def build(config: DeepseekV4Config, rngs: nnx.Rngs, options: ComputeOptions) -> DeepseekV4:
    """The model with random weights."""
    from fathom.models.deepseek_v4.model import DeepseekV4

    return DeepseekV4(config, rngs, options)


def make_spec(name: str, config: DeepseekV4Config) -> ModelSpec:
    """A ModelSpec of the V4 family at any size."""
    return ModelSpec(
        name=name,
        config=config,
        build=build,
        loss=loss,
        sharding_presets=PRESETS,
        num_params=num_params,
        flops_per_token=flops_per_token,
        step_flops=step_flops,
        update_state=update_state,
        route=route,
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
