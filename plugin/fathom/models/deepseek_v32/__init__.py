"""DeepSeek-V3.2: the ModelSpec of the released size and of the tiny one.

The model itself is imported when it is built: what reads only configs and tensor tables needs no jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.formulas import flops_per_token, num_params, step_flops
from fathom.models.deepseek_v32.hf_mapping import hub_copies, hub_pieces, hub_tensors
from fathom.models.deepseek_v32.sharding import PRESETS
from fathom.models.training import frozen, loss, route, update_state
from fathom.zoo import ModelSpec

if TYPE_CHECKING:
    from flax import nnx

    from fathom.layers.options import ComputeOptions
    from fathom.models.deepseek_v32.model import DeepseekV32


def build(config: DeepseekV32Config, rngs: nnx.Rngs, options: ComputeOptions) -> DeepseekV32:
    """The model with random weights."""
    from fathom.models.deepseek_v32.model import DeepseekV32

    return DeepseekV32(config, rngs, options)


def make_spec(name: str, config: DeepseekV32Config) -> ModelSpec:
    """A ModelSpec of the V3.2 family at any size."""
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
        config_from_hf=DeepseekV32Config.from_hf_config,
        config_to_hf=DeepseekV32Config.to_hf_config,
        hub_tensors=hub_tensors,
        hub_model_type="deepseek_v32",
        hub_pieces=hub_pieces,
        hub_copies=hub_copies,
    )


def v32() -> ModelSpec:
    """DeepSeek-V3.2."""
    return make_spec("deepseek-v3.2", DeepseekV32Config.v32())


def tiny() -> ModelSpec:
    """A small V3.2 that uses every feature of the real one."""
    return make_spec("deepseek-v3.2-tiny", DeepseekV32Config.tiny())
