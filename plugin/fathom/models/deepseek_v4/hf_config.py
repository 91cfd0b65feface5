"""The Hub's `config.json` of DeepSeek-V4 in every spelling, to and from `DeepseekV4Config`.

The one place that knows the Hub's field names: DeepSeek's `config.json` (all revisions, DSpark
included), what `transformers` saves, and the native `inference/config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.models.config_parts import YarnScaling
from fathom.models.deepseek_v4.config import (
    DeepseekV4Config,
    DsparkConfig,
    kinds_of_ratios,
)
from fathom.models.hub_fields import Fields, write_plain

# Hub field -> our field, the plain numbers that must be there.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "sliding_window",
    "index_n_heads": "index_num_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_top_k",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_shared_experts": "num_shared_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
# Absent in some files; the dataclass's defaults are the released values.
_OPTIONAL = {
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# `inference/config.json` -> Hub field; the other names are the same.
_NATIVE_NAMES = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
}
# The model is defined for these values only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, 0),
    "router_jitter_noise": (0.0, 0),
    "tie_word_embeddings": (False,),
}
_KIND_OF_TYPE = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_TYPE.items()}
_ROUTER_OF_TYPE = {"hash_moe": "hash", "moe": "learned"}
_TYPE_OF_ROUTER = {kind: name for name, kind in _ROUTER_OF_TYPE.items()}
_DSPARK_KEYS = {f"dspark_{field.name}": field.name for field in dataclasses.fields(DsparkConfig)}


def read(source: Mapping[str, Any] | str | Path) -> DeepseekV4Config:
    """Reads a Hub config: a dict, a JSON file or the folder that holds `config.json`.

    Raises:
      ValueError: listing every unknown key, missing field, unsupported value and contradiction at
        once; or naming the one number that is out of range.
      OSError: when the file cannot be read.
    """
    fields = Fields(source, _to_hub_names)
    ours = fields.take_plain(_FIXED, _REQUIRED, _OPTIONAL)
    ours |= _schedule(fields)
    ours |= _rope(fields, ours["head_dim"])
    ours["expert_dtype"] = _expert_dtype(fields)
    return fields.finish("DeepSeek-V4", DeepseekV4Config, ours)


def _to_hub_names(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translates `inference/config.json`; every other file is returned as it is."""
    if "dim" not in raw or "hidden_size" in raw:
        return raw
    hub = {_NATIVE_NAMES.get(name, name): value for name, value in raw.items()}
    length, factor = hub.pop("original_seq_len", 0), hub.pop("rope_factor", None)
    beta_fast, beta_slow = hub.pop("beta_fast", 32), hub.pop("beta_slow", 1)
    if length:
        hub["rope_scaling"] = {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
        }
    # This file describes a server, so it leaves out what the released models share.
    hub.setdefault("rms_norm_eps", 1e-6)
    hub.setdefault("hc_eps", 1e-6)
    if isinstance(length, int) and isinstance(factor, int | float):
        hub.setdefault("max_position_embeddings", int(length * factor))
    return hub


def _int_list(fields: Fields, name: str) -> list[int] | None:
    value = fields.take(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or any(type(entry) is not int for entry in value):
        fields.problems.append(f"{name}: found {value!r}, expected a list of integers")
        return None
    return list(value)


def _type_list(fields: Fields, name: str, known: Mapping[str, str]) -> list[str] | None:
    value = fields.take(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or any(entry not in known for entry in value):
        fields.problems.append(f"{name}: found {value!r}, expected a list of {sorted(known)}")
        return None
    return [known[entry] for entry in value]


def _schedule(fields: Fields) -> dict[str, Any]:
    """Attention kinds, ratios, routers and multi-token prediction."""
    count = fields.require("num_hidden_layers")
    ratios = _int_list(fields, "compress_ratios")
    kinds = _type_list(fields, "layer_types", _KIND_OF_TYPE)
    rates = _rates(fields)
    routers = _type_list(fields, "mlp_layer_types", _ROUTER_OF_TYPE)
    num_hash = fields.take("num_hash_layers")
    if type(count) is not int or count < 1:
        fields.problems.append(f"num_hidden_layers: found {count!r}, expected a positive integer")
        return {}
    if ratios is None and kinds is None:
        fields.problems.append(
            "compress_ratios and layer_types: both missing; add one, the schedule is not guessed"
        )
        return {}
    for name, entries in (("compress_ratios", ratios), ("layer_types", kinds)):
        if entries is not None and len(entries) < count:
            fields.problems.append(
                f"{name}: {len(entries)} entries, expected at least num_hidden_layers {count}"
            )
            return {}
    trailing = max(len(ratios or []), len(kinds or [])) - count
    if any((ratios or [])[count:]) or any(kind != "sliding" for kind in (kinds or [])[count:]):
        fields.problems.append(
            f"entries after the first {count} layers: found {(ratios or kinds)[count:]}, expected "
            "sliding ones (ratio 0), for multi-token prediction"
        )
    ours = _layers(fields, ratios and ratios[:count], kinds and kinds[:count], rates)
    ours["router_kinds"] = _routers(fields, count, routers, num_hash)
    return ours | _mtp(fields, trailing)


def _rates(fields: Fields) -> dict[str, int]:
    """Given compression rates by attention kind."""
    rates = fields.take("compress_rates")
    if rates is not None and not (isinstance(rates, Mapping) and set(rates) <= set(_KIND_OF_TYPE)):
        fields.problems.append(
            f"compress_rates: found {rates!r}, expected a rate for each of {sorted(_KIND_OF_TYPE)}"
        )
        rates = None
    given = {}
    for kind in ("csa", "hca"):
        places = [
            ("compress_rates", (rates or {}).get(_TYPE_OF_KIND[kind])),
            (f"compress_rate_{kind}", fields.take(f"compress_rate_{kind}")),
        ]
        value = fields.agree(f"compression rate of {kind}", places)
        if value is not None:
            given[kind] = value
    return given


def _layers(
    fields: Fields, ratios: list[int] | None, kinds: list[str] | None, rates: dict[str, int]
) -> dict[str, Any]:
    if kinds is None:
        kinds = list(kinds_of_ratios(tuple(ratios)))
    if ratios is None:
        # 4 and 128 are what the reference takes when a file gives layer_types alone.
        by_kind = {"sliding": 0, "csa": 4, "hca": 128} | rates
        ratios = [by_kind[kind] for kind in kinds]
    else:
        for index, (kind, ratio) in enumerate(zip(kinds, ratios, strict=True)):
            if kind in rates and rates[kind] != ratio:
                fields.problems.append(
                    f"compress_ratios[{index}]: found {ratio}, but the compression rate of "
                    f"{_TYPE_OF_KIND[kind]} is {rates[kind]}"
                )
    return {"attention_kinds": tuple(kinds), "compress_ratios": tuple(ratios)}


def _routers(
    fields: Fields, count: int, routers: list[str] | None, num_hash: Any
) -> tuple[str, ...]:
    if num_hash is not None and (type(num_hash) is not int or num_hash < 0):
        fields.problems.append(f"num_hash_layers: found {num_hash!r}, expected 0 or more")
        return ()
    if routers is None and num_hash is None:
        fields.problems.append("num_hash_layers and mlp_layer_types: both missing; add one")
        return ()
    by_count = None
    if num_hash is not None:
        num_hash = min(num_hash, count)
        by_count = ["hash"] * num_hash + ["learned"] * (count - num_hash)
    places = [("mlp_layer_types", routers), ("num_hash_layers", by_count)]
    return tuple(fields.agree("router kinds", places))


def _mtp(fields: Fields, trailing: int) -> dict[str, Any]:
    """Multi-token prediction from num_nextn_predict_layers and the schedule's `trailing`
    entries."""
    declared = fields.take("num_nextn_predict_layers")
    given = {key: fields.take(key) for key in _DSPARK_KEYS}
    if all(value is None for value in given.values()):
        places = [("num_nextn_predict_layers", declared), ("the schedule", trailing or None)]
        number = fields.agree("number of multi-token-prediction layers", places)
        return {"num_mtp_layers": number or 0, "mtp_kind": "mtp"}
    missing = [key for key, value in given.items() if value is None]
    if missing:
        fields.problems.append(f"DSpark keys missing: {', '.join(missing)}")
        return {}
    # DSpark has one stage per trailing entry, whatever the older key says.
    number = trailing or declared
    if trailing and declared not in (None, 1, trailing) or not number:
        fields.problems.append(
            f"num_nextn_predict_layers: found {declared!r} with {trailing} trailing schedule "
            "entries and DSpark keys, expected one schedule entry per DSpark stage"
        )
    try:
        dspark = DsparkConfig(**{_DSPARK_KEYS[key]: value for key, value in given.items()})
    except (ValueError, TypeError) as error:
        fields.problems.append(str(error))
        return {}
    return {"num_mtp_layers": number, "mtp_kind": "dspark", "dspark": dspark}


def _rope(fields: Fields, head_dim: Any) -> dict[str, Any]:
    """RoPE given flat (rope_theta, compress_rope_theta, rope_scaling) or nested (main,
    compress)."""
    tables = fields.take_tables("rope_scaling", "rope_parameters")
    if tables is None:
        return {}
    scaling, parameters = tables
    main, compress, flat_theta = {}, {}, None
    if "main" in parameters or "compress" in parameters:
        main, compress = parameters.get("main"), parameters.get("compress")
        if set(parameters) != {"main", "compress"} or not (
            isinstance(main, Mapping) and isinstance(compress, Mapping)
        ):
            fields.problems.append(
                f"rope_parameters: found keys {sorted(parameters)}, expected objects main and "
                "compress"
            )
            return {}
        if _yarn(fields, "rope_parameters.main", main) is not None:
            fields.problems.append("rope_parameters.main: found YaRN, expected plain RoPE there")
    else:
        compress = {key: value for key, value in parameters.items() if key != "rope_theta"}
        flat_theta = parameters.get("rope_theta")
    yarns = [
        ("rope_scaling", _yarn(fields, "rope_scaling", scaling)),
        ("rope_parameters", _yarn(fields, "rope_parameters", compress)),
    ]
    ours = {"rope_scaling": fields.agree("YaRN", yarns)}
    if scaling and compress and None in (yarns[0][1], yarns[1][1]) and ours["rope_scaling"]:
        fields.problems.append("rope_scaling and rope_parameters disagree about YaRN")
    nested = (("rope_theta", main), ("compress_rope_theta", compress))
    for (name, table), other in zip(nested, (flat_theta, None), strict=True):
        places = [
            (name, fields.take(name)),
            ("rope_parameters", table.get("rope_theta")),
            ("rope_parameters.rope_theta", other),
        ]
        ours[name] = fields.agree(name, places)
        if ours[name] is None:
            fields.problems.append(f"{name}: missing")
    factors = [fields.take("partial_rotary_factor")]
    factors += [table.get("partial_rotary_factor") for table in (main, compress)]
    ours["rope_head_dim"] = _rope_width(fields, head_dim, factors)
    return ours


def _rope_width(fields: Fields, head_dim: Any, factors: list[Any]) -> int | None:
    """qk_rope_head_dim is a width and partial_rotary_factor the same width over head_dim: either,
    never their product."""
    places = [("qk_rope_head_dim", fields.take("qk_rope_head_dim"))]
    for factor in factors:
        if factor is None or type(head_dim) is not int:
            continue
        width = head_dim * factor if isinstance(factor, int | float) else -1
        if width <= 0 or abs(width - round(width)) > 1e-6:
            fields.problems.append(
                f"partial_rotary_factor: found {factor!r} of head_dim {head_dim}, expected a whole "
                "number of channels"
            )
            continue
        places.append((f"partial_rotary_factor {factor} of head_dim {head_dim}", round(width)))
    width = fields.agree("rotary channels per head", places)
    if width is None:
        fields.problems.append("qk_rope_head_dim and partial_rotary_factor: both missing; add one")
    return width


def _yarn(fields: Fields, place: str, table: Mapping[str, Any]) -> YarnScaling | None:
    """The YaRN numbers of one rope table, None for plain RoPE."""
    numbers = fields.yarn_numbers(place, table, beside=("rope_theta", "partial_rotary_factor"))
    if numbers is None:
        return None
    # The reference scales neither cosines nor logits, whatever YaRN's usual formula says.
    for key, only in (("attention_factor", 1), ("truncate", True)):
        value = numbers.pop(key, only)
        if value != only:
            fields.problems.append(f"{place}.{key}: found {value!r}, supported {only!r} only")
    return fields.make_yarn(place, numbers, YarnScaling)


def _expert_dtype(fields: Fields) -> str | None:
    quantization = fields.take("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        fields.problems.append(f"quantization_config: found {quantization!r}, expected an object")
        quantization = None
    places = [
        ("expert_dtype", fields.take("expert_dtype")),
        ("quantization_config.expert_dtype", (quantization or {}).get("expert_dtype")),
    ]
    return fields.agree("expert_dtype", places)


def write(config: DeepseekV4Config) -> dict[str, Any]:
    """The Hub's native spelling, JSON-ready, without the storage keys (dtype, quantization_config).

    `read(write(config)) == config` for every config. A schedule of other ratios than 0, 4 (csa) and
    128 (hca) is written as `transformers` spells it; one with several ratios of one kind, which
    `transformers` has no spelling for, as layer_types beside compress_ratios.
    """
    hub: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "qk_rope_head_dim": config.rope_head_dim,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "use_cache": True,
    }
    hub |= {name: values[0] for name, values in _FIXED.items() if name not in _TRANSFORMERS_ONLY}
    hub |= write_plain(config, _REQUIRED | _OPTIONAL)
    if config.rope_scaling is not None:
        hub["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    if config.expert_dtype is not None:
        hub["expert_dtype"] = config.expert_dtype
    if config.dspark is not None:
        hub |= write_plain(config.dspark, _DSPARK_KEYS)
    return hub | _write_schedule(config)


_TRANSFORMERS_ONLY = ("mlp_bias", "router_jitter_noise")


def _write_schedule(config: DeepseekV4Config) -> dict[str, Any]:
    num_hash = config.router_kinds.count("hash")
    if config.router_kinds == ("hash",) * num_hash + ("learned",) * (config.num_layers - num_hash):
        hub: dict[str, Any] = {"num_hash_layers": num_hash}
    else:
        hub = {"mlp_layer_types": [_TYPE_OF_ROUTER[kind] for kind in config.router_kinds]}
    rates = {"csa": set(), "hca": set(), "sliding": set()}
    for kind, ratio, _ in config.layer_kinds:
        rates[kind].add(ratio)
    with_mtp = list(config.compress_ratios) + [0] * config.num_mtp_layers
    if rates["csa"] <= {4} and rates["hca"] <= {128}:
        return hub | {"compress_ratios": with_mtp}
    hub["layer_types"] = [_TYPE_OF_KIND[kind] for kind in config.attention_kinds]
    if len(rates["csa"]) > 1 or len(rates["hca"]) > 1:
        return hub | {"compress_ratios": with_mtp}
    default = {"csa": {4}, "hca": {128}}
    hub["compress_rates"] = {
        _TYPE_OF_KIND[kind]: min(rates[kind] or default[kind]) for kind in ("csa", "hca")
    }
    return hub
