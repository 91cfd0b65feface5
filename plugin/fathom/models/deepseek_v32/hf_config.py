"""The Hub's `config.json` of DeepSeek-V3.2 in every spelling, to and from `DeepseekV32Config`.

The one place that knows the Hub's field names: DeepSeek's `config.json`, what `transformers` saves, and the native
`inference/config_671B_v3.2.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.models.deepseek_v32.config import DeepseekV32Config, MscaleYarn, mscale_of
from fathom.models.hub_fields import Fields, write_plain

# Hub field -> our field, the plain numbers that must be there.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "nope_head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "v_head_dim": "value_head_dim",
    "index_n_heads": "index_num_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_top_k",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_groups",
    "topk_group": "groups_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
# Absent in some files; the dataclass's defaults are the released values.
_OPTIONAL = {
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# The native inference config -> Hub field; the other names are the same.
_NATIVE_NAMES = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
}
# What the native file leaves to the released code's defaults, which for this model are the checkpoint's values.
_NATIVE_ROPE = {
    "original_seq_len": 4096,
    "rope_factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
# The model is defined for these values only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v32",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, 0),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
# Written for nobody: `transformers` either derives these or does not take them.
_NOT_WRITTEN = ("mlp_bias", "rope_interleave")
# Keys of these files that say nothing about the architecture.
_IGNORED = ("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "quantization_config")
_KIND_OF_TYPE = {"dense": "dense", "sparse": "moe"}
_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_TYPE.items()}
_LAYER_TYPE = "indexed_attention"


def read(source: Mapping[str, Any] | str | Path) -> DeepseekV32Config:
    """Reads a Hub config: a dict, a JSON file or the folder that holds `config.json`.

    Raises:
      ValueError: listing every unknown key, missing field, unsupported value and contradiction at once; or naming
        the one number that is out of range.
      OSError: when the file cannot be read.
    """
    fields = Fields(source, _to_hub_names)
    ours = fields.take_plain(_FIXED, _REQUIRED, _OPTIONAL)
    ours["ffn_kinds"] = _schedule(fields)
    ours["num_mtp_layers"] = fields.take("num_nextn_predict_layers", 0)
    ours |= _rope(fields)
    _derived(fields, ours)
    return fields.finish("DeepSeek-V3.2", DeepseekV32Config, ours, _IGNORED)


def _to_hub_names(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translates the native inference config; every other file is returned as it is."""
    if "dim" not in raw or "hidden_size" in raw:
        return raw
    hub = {_NATIVE_NAMES.get(name, name): value for name, value in raw.items()}
    rope = {name: hub.pop(name, default) for name, default in _NATIVE_ROPE.items()}
    hub["rope_scaling"] = {
        "type": "yarn",
        "factor": rope["rope_factor"],
        "original_max_position_embeddings": rope["original_seq_len"],
        "beta_fast": rope["beta_fast"],
        "beta_slow": rope["beta_slow"],
        "mscale": rope["mscale"],
        "mscale_all_dim": rope["mscale"],
    }
    # This file describes a server, so it leaves out the rest.
    hub.setdefault("rope_theta", 10000.0)
    hub.setdefault("rms_norm_eps", 1e-6)
    if isinstance(rope["original_seq_len"], int) and isinstance(rope["rope_factor"], int | float):
        hub.setdefault("max_position_embeddings", int(rope["original_seq_len"] * rope["rope_factor"]))
    return hub


def _schedule(fields: Fields) -> tuple[str, ...]:
    """Which layers are dense, from first_k_dense_replace, mlp_layer_types or both."""
    count, dense = fields.require("num_hidden_layers"), fields.take("first_k_dense_replace")
    types, layer_types = fields.take("mlp_layer_types"), fields.take("layer_types")
    if type(count) is not int or count < 1:
        fields.problems.append(f"num_hidden_layers: found {count!r}, expected a positive integer")
        return ()
    if layer_types is not None and list(layer_types) != [_LAYER_TYPE] * count:
        fields.problems.append(
            f"layer_types: found {layer_types!r}, expected {_LAYER_TYPE!r} for each of {count} layers"
        )
    if types is not None:
        known = isinstance(types, list | tuple) and all(entry in _KIND_OF_TYPE for entry in types)
        if not known or len(types) != count:
            fields.problems.append(
                f"mlp_layer_types: found {types!r}, expected one of {sorted(_KIND_OF_TYPE)} for each of {count} layers"
            )
            return ()
        # `transformers` writes both, and goes by the types alone.
        return tuple(_KIND_OF_TYPE[entry] for entry in types)
    if type(dense) is not int or dense < 0:
        fields.problems.append(
            f"first_k_dense_replace: found {dense!r} and no mlp_layer_types; add one, the schedule is not guessed"
        )
        return ()
    dense = min(dense, count)
    return ("dense",) * dense + ("moe",) * (count - dense)


def _rope(fields: Fields) -> dict[str, Any]:
    """RoPE given as rope_theta and rope_scaling, or as one rope_parameters."""
    tables = fields.take_tables("rope_scaling", "rope_parameters")
    if tables is None:
        return {}
    scaling, parameters = tables
    theta = fields.agree(
        "rope_theta",
        [("rope_theta", fields.take("rope_theta")), ("rope_parameters.rope_theta", parameters.get("rope_theta"))],
    )
    if theta is None:
        fields.problems.append("rope_theta: missing")
    places = {"rope_scaling": scaling, "rope_parameters": parameters}
    yarns = [_yarn(fields, place, table) for place, table in places.items() if table]
    if len(yarns) == 2 and yarns[0] != yarns[1]:
        fields.problems.append("rope_scaling and rope_parameters disagree about YaRN; remove one")
    return {"rope_theta": theta, "rope_scaling": yarns[0] if yarns else None}


def _yarn(fields: Fields, place: str, table: Mapping[str, Any]) -> MscaleYarn | None:
    """The YaRN numbers of one table, None for plain RoPE."""
    numbers = fields.yarn_numbers(place, table, beside=("rope_theta",))
    if numbers is None:
        return None
    if numbers.pop("truncate", True) is not True:
        fields.problems.append(f"{place}.truncate: supported True only")
    partial = numbers.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        fields.problems.append(f"{place}.partial_rotary_factor: found {partial!r}, supported 1 only")
    factor = numbers.pop("attention_factor", None)
    # mscale and mscale_all_dim are not guessed: the released code and `transformers` differ where one is missing.
    yarn = fields.make_yarn(place, numbers, MscaleYarn)
    if yarn is None:
        return None
    amplitude = mscale_of(yarn.factor, yarn.mscale) / mscale_of(yarn.factor, yarn.mscale_all_dim)
    if factor not in (None, amplitude):
        fields.problems.append(
            f"{place}.attention_factor: found {factor!r}, mscale and mscale_all_dim give {amplitude}"
        )
    return yarn


def _derived(fields: Fields, ours: Mapping[str, Any]) -> None:
    """Keys whose values follow from others must have those values."""

    def number(name: str) -> int:
        return ours[name] if type(ours[name]) is int else 0

    rope, nope = number("rope_head_dim"), number("nope_head_dim")
    expected = {
        "num_key_value_heads": number("num_heads"),
        "qk_head_dim": nope + rope,
        "head_dim": rope,
        "num_local_experts": number("num_experts"),
    }
    for name, value in expected.items():
        found = fields.take(name)
        if found is not None and found != value:
            fields.problems.append(f"{name}: found {found!r}, expected {value} from the other fields")


def write(config: DeepseekV32Config) -> dict[str, Any]:
    """The Hub's spelling, JSON-ready, without the storage keys (dtype, quantization_config).

    `read(write(config)) == config` for every config.
    """
    hub: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_heads,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "rope_theta": config.rope_theta,
        "use_cache": True,
    }
    hub |= {name: values[0] for name, values in _FIXED.items() if name not in _NOT_WRITTEN}
    hub |= write_plain(config, _REQUIRED | _OPTIONAL)
    if config.rope_scaling is not None:
        hub["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    dense = config.ffn_kinds.count("dense")
    hub["first_k_dense_replace"] = dense
    if config.ffn_kinds != ("dense",) * dense + ("moe",) * (config.num_layers - dense):
        hub["mlp_layer_types"] = [_TYPE_OF_KIND[kind] for kind in config.ffn_kinds]
    return hub
