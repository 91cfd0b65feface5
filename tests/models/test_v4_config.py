"""The architecture config: released numbers, every spelling of the Hub's file, the layer plan,
formulas."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.models.config_parts import YarnScaling, plan_layers
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.formulas import (
    attention_flops,
    attention_weights,
    compressor_weights,
    flops_per_token,
    indexer_flops,
    indexer_weights,
    num_params,
    visible_entries,
    window_keys,
)
from fathom.models.deepseek_v4.hf_mapping import hub_tensors

COMMON = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
FLASH = COMMON | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "routed_scaling_factor": 1.5,
    "index_topk": 512,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}
PRO = COMMON | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
}
DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}
NATIVE = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_mtp_layers": 1,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}
TYPE_OF = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def modern_flash() -> dict:
    """Flash as `transformers` saves it: layer types, rates, nested rope, both rotary spellings."""
    base = without(FLASH, "compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
    kinds = DeepseekV4Config.flash().attention_kinds
    return base | {
        "layer_types": [TYPE_OF[kind] for kind in kinds],
        "compress_rates": {TYPE_OF["csa"]: 4, TYPE_OF["hca"]: 128},
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "partial_rotary_factor": 0.125,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.125},
            "compress": {
                "rope_type": "yarn",
                "type": "yarn",
                "rope_theta": 1.6e5,
                "partial_rotary_factor": 0.125,
                "factor": 16,
                "original_max_position_embeddings": 65536,
                "beta_fast": 32,
                "beta_slow": 1,
                "attention_factor": 1.0,
            },
        },
        "dtype": "bfloat16",
        "mlp_bias": False,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "pad_token_id": None,
    }


def test_released_configs_equal_the_presets():
    assert DeepseekV4Config.from_hf_config(FLASH) == DeepseekV4Config.flash()
    assert DeepseekV4Config.from_hf_config(PRO) == DeepseekV4Config.pro()


def test_released_schedules():
    flash, pro = DeepseekV4Config.flash(), DeepseekV4Config.pro()
    assert [flash.attention_kinds.count(k) for k in ("sliding", "csa", "hca")] == [2, 21, 20]
    assert [pro.attention_kinds.count(k) for k in ("sliding", "csa", "hca")] == [0, 30, 31]
    assert flash.router_kinds == ("hash",) * 3 + ("learned",) * 40
    for config, repeats in ((flash, 20), (pro, 29)):
        plan = config.plan
        assert (plan.prefix, plan.unit, plan.repeats, len(plan.suffix)) == (range(3), 2, repeats, 0)


FLASH_SPELLINGS = {
    "first revision": without(FLASH, "expert_dtype"),
    "expert dtype inside": without(FLASH, "expert_dtype")
    | {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}},
    "betas left out": FLASH | {"rope_scaling": without(FLASH["rope_scaling"], "beta_fast", "beta_slow")},
    "no trailing entry": FLASH | {"compress_ratios": FLASH["compress_ratios"][:43]},
    "rope_type": FLASH
    | {"rope_scaling": without(FLASH["rope_scaling"], "type") | {"rope_type": "yarn"}},
    "flat rope_parameters": without(FLASH, "rope_scaling")
    | {"rope_parameters": FLASH["rope_scaling"] | {"rope_theta": 10000}},
    "width from the factor": without(FLASH, "qk_rope_head_dim") | {"partial_rotary_factor": 0.125},
    "both widths": FLASH | {"partial_rotary_factor": 0.125},
    "legacy rates": without(FLASH, "compress_ratios")
    | {
        "layer_types": [TYPE_OF[kind] for kind in DeepseekV4Config.flash().attention_kinds],
        "compress_rate_csa": 4,
        "compress_rate_hca": 128,
    },
    "types beside ratios": FLASH
    | {"layer_types": [TYPE_OF[kind] for kind in DeepseekV4Config.flash().attention_kinds]},
    "transformers": modern_flash(),
    "dtype": without(FLASH, "torch_dtype") | {"dtype": "bfloat16"},
    "inference/config.json": NATIVE,
}


@pytest.mark.parametrize("spelling", FLASH_SPELLINGS)
def test_every_spelling_gives_flash(spelling):
    config = DeepseekV4Config.from_hf_config(FLASH_SPELLINGS[spelling])
    expected = DeepseekV4Config.flash()
    if spelling == "first revision":
        expected = dataclasses.replace(expected, expert_dtype=None)
    assert config == expected


def test_dspark_entries_are_not_layers():
    ratios = FLASH["compress_ratios"][:43] + [0, 0, 0]
    config = DeepseekV4Config.from_hf_config(FLASH | DSPARK | {"compress_ratios": ratios})
    assert (config.num_layers, config.num_mtp_layers, config.mtp_kind) == (43, 3, "dspark")
    assert config.dspark.target_layer_ids == (40, 41, 42)
    assert DeepseekV4Config.from_hf_config(config.to_hf_config()) == config
    with pytest.raises(ValueError, match="dspark"):
        hub_tensors(config)


def test_reads_files_and_folders(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    assert DeepseekV4Config.from_hf_config(tmp_path) == DeepseekV4Config.flash()
    assert DeepseekV4Config.from_hf_config(tmp_path / "config.json") == DeepseekV4Config.flash()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ("{", "not readable"),
        ('{"vocab_size": 1, "vocab_size": 2}', "given twice: vocab_size"),
        ('{"hc_eps": NaN}', "NaN"),
        ("[" * 100000, "not readable"),
        (json.dumps(FLASH | {"zz": 1}), "unknown keys: zz"),
        (json.dumps(FLASH | {"hc_eps": 0}), "hc_eps: found 0"),
    ],
    ids=["list", "cut off", "doubled key", "nan", "nested", "unknown key", "out of range"],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        DeepseekV4Config.from_hf_config(tmp_path)
    assert "config.json" in str(error.value)


def nested(**changes) -> dict:
    config = modern_flash()
    compress = config["rope_parameters"]["compress"] | changes
    return config | {"rope_parameters": config["rope_parameters"] | {"compress": compress}}


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        (FLASH | {"zz": 1, "yy": 2}, ["unknown keys: yy, zz"]),
        (without(FLASH, "hidden_size", "o_groups"), ["hidden_size: missing", "o_groups: missing"]),
        (without(FLASH, "compress_ratios"), ["not guessed"]),
        (without(FLASH, "num_hash_layers"), ["num_hash_layers and mlp_layer_types"]),
        (FLASH | {"scoring_func": "sigmoid"}, ["scoring_func: found 'sigmoid'", "sqrtsoftplus"]),
        (FLASH | {"topk_method": "greedy"}, ["topk_method"]),
        (FLASH | {"hidden_act": "gelu"}, ["hidden_act"]),
        (FLASH | {"attention_bias": True}, ["attention_bias"]),
        (FLASH | {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        (FLASH | {"norm_topk_prob": False}, ["norm_topk_prob"]),
        (FLASH | {"norm_topk_prob": 1}, ["norm_topk_prob: found 1, supported True only"]),
        (FLASH | {"num_key_value_heads": 8}, ["num_key_value_heads: found 8"]),
        (FLASH | {"model_type": "deepseek_v41"}, ["deepseek_v41"]),
        (FLASH | {"num_hidden_layers": 45}, ["44 entries", "45"]),
        (FLASH | {"num_hidden_layers": 42}, ["[4, 0]"]),
        (FLASH | {"num_nextn_predict_layers": 2}, ["gives 2", "gives 1"]),
        (FLASH | {"partial_rotary_factor": 0.25}, ["gives 64", "gives 128"]),
        (FLASH | {"compress_rate_hca": 64}, ["compress_ratios[3]: found 128", "64"]),
        (FLASH | {"rope_scaling": FLASH["rope_scaling"] | {"attention_factor": 1.277}}, ["1.277"]),
        (FLASH | {"rope_scaling": FLASH["rope_scaling"] | {"mscale": 1.0}}, ["mscale"]),
        (FLASH | {"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'"]),
        (FLASH | {"rope_scaling": {"factor": 16}}, ["without type 'yarn'"]),
        (FLASH | {"rope_scaling": 16}, ["rope_scaling: found 16, expected an object or null"]),
        (FLASH | {"expert_dtype": "int4"}, ["expert_dtype: found 'int4'"]),
        (FLASH | {"dspark_block_size": 5}, ["dspark_markov_rank"]),
        (nested(attention_factor=None, mscale=2), ["mscale"]),
        (nested(rope_theta=1e4), ["compress_rope_theta", "160000", "10000"]),
        (nested(partial_rotary_factor=1.0), ["gives 64", "gives 512"]),
        (modern_flash() | {"num_hash_layers": 2}, ["router kinds"]),
        (FLASH | {"n_routed_experts": 10**9}, ["x num_experts"]),
        (FLASH | {"num_hidden_layers": 10**9}, ["44 entries"]),
        (FLASH | {"hc_eps": float("nan")}, ["hc_eps: found nan"]),
        (FLASH | {"hidden_size": "4096"}, ["hidden_size: found '4096'"]),
        (FLASH | {"use_cache": 3, "hc_mult": True}, ["hc_mult: found True"]),
        (FLASH | {"zz": 1, "hidden_act": "gelu", "swiglu_limit": None}, ["zz", "gelu", "swiglu"]),
    ],
)  # fmt: skip
def test_contradictions_and_unknowns_are_refused(config, messages):
    with pytest.raises(ValueError) as error:
        DeepseekV4Config.from_hf_config(config)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "o_groups": 4}, "num_heads 6 .* o_groups 4"),
        ({"rope_head_dim": 15}, "rope_head_dim 15"),
        ({"rope_head_dim": 96}, "rope_head_dim 96 is more than head_dim 80"),
        ({"index_head_dim": 8}, "rope_head_dim 16 is more than index_head_dim 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        ({"router_kinds": ("hash",) * 5}, "router_kinds has 5 .* 6"),
        ({"router_kinds": ("hash",) * 5 + ("softmax",)}, r"router_kinds\[5\]: found 'softmax'"),
        ({"attention_kinds": ("dense",) + ("csa",) * 5}, r"attention_kinds\[0\]: found 'dense'"),
        ({"compress_ratios": (0, 4, 16, 4, 16, 0)}, r"compress_ratios\[5\]: found 0"),
        ({"compress_ratios": (4, 4, 16, 4, 16, 4)}, r"compress_ratios\[0\]: found 4"),
        ({"compress_ratios": (0, 4, 5000, 4, 16, 4)}, "5000 .* 4096"),
        ({"max_position_embeddings": 32}, "original_max_position_embeddings 64 .* 32"),
        ({"mtp_kind": "dspark"}, "dspark"),
        ({"mtp_kind": "eagle"}, "mtp_kind: found 'eagle'"),
        ({"num_mtp_layers": -1}, "num_mtp_layers: found -1"),
        ({"hidden_size": 0}, "hidden_size: found 0"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps: found inf"),
        ({"rope_theta": "1e4"}, "rope_theta: found '1e4'"),
        ({"eos_token_id": 264}, "eos_token_id 264 .* 263"),
        ({"eos_token_id": (1, 999)}, "eos_token_id 999"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling: found keys"),
        ({"rope_scaling": 16}, "rope_scaling: found 16"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DeepseekV4Config.tiny(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 0.5},
        {"factor": math.nan},
        {"beta_slow": 32.0},
        {"original_max_position_embeddings": 0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_yarn_is_refused(changes):
    with pytest.raises(ValueError, match=f"rope_scaling.{next(iter(changes))[:4]}"):
        dataclasses.replace(YarnScaling(16.0, 64, 32.0, 1.0), **changes)


def test_a_recipe_override_of_lists_is_taken():
    config = dataclasses.replace(
        DeepseekV4Config.tiny(),
        compress_ratios=[0, 4, 8, 4, 8, 4],
        rope_scaling=dataclasses.asdict(YarnScaling(4.0, 32, 32.0, 1.0)),
    )
    assert config.compress_ratios == (0, 4, 8, 4, 8, 4)
    assert config.rope_scaling.factor == 4.0
    assert hash(config) == hash(dataclasses.replace(config))


@st.composite
def configs(draw) -> DeepseekV4Config:
    """Tiny with any schedule, several ratios of one kind included."""
    count = draw(st.integers(1, 9))
    kinds = draw(
        st.lists(st.sampled_from(("sliding", "csa", "hca")), min_size=count, max_size=count)
    )
    few = draw(st.sampled_from([(4,), (4, 128), (2, 8), (128,), (4, 8, 128)]))
    ratios = [0 if kind == "sliding" else draw(st.sampled_from(few)) for kind in kinds]
    routers = st.lists(st.sampled_from(("hash", "learned")), min_size=count, max_size=count)
    return dataclasses.replace(
        DeepseekV4Config.tiny(),
        attention_kinds=tuple(kinds),
        compress_ratios=tuple(ratios),
        router_kinds=tuple(draw(routers)),
        num_mtp_layers=draw(st.integers(0, 3)),
        expert_dtype=draw(st.sampled_from(("fp4", "fp8", None))),
        rope_scaling=draw(st.sampled_from((None, YarnScaling(16.0, 64, 32.0, 1.0)))),
        eos_token_id=draw(st.sampled_from((None, 1, (1, 2)))),
    )


@settings(max_examples=200, deadline=None)
@given(configs())
def test_hub_round_trip_of_any_schedule(config):
    through_json = json.loads(json.dumps(config.to_hf_config()))
    assert through_json == config.to_hf_config()
    assert DeepseekV4Config.from_hf_config(through_json) == config


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(tuple))
def test_plan_covers_every_layer_with_the_fewest_blocks(kinds):
    plan = plan_layers(kinds)
    scanned = [plan.layer_of(u, r) for r in range(plan.repeats) for u in range(plan.unit)]
    assert [*plan.prefix, *scanned, *plan.suffix] == list(range(len(kinds)))
    for u in range(plan.unit):
        assert len({kinds[plan.layer_of(u, r)] for r in range(plan.repeats)}) == 1
    assert plan.repeats >= 2 or (plan.unit == plan.repeats == 0)
    blocks = len(plan.prefix) + plan.unit + len(plan.suffix)
    possible = [len(kinds)]
    for start in range(len(kinds)):
        for unit in range(1, len(kinds)):
            for repeats in range(2, len(kinds) // unit + 1):
                run = kinds[start : start + unit * repeats]
                if run == kinds[start : start + unit] * repeats:
                    possible.append(len(kinds) - unit * (repeats - 1))
    assert blocks == min(possible)


def test_an_odd_last_layer_is_kept():
    plan = plan_layers(tuple("abxyxyx"))
    assert (plan.prefix, plan.unit, plan.repeats, plan.suffix) == (range(3), 2, 2, range(7, 7))
    plan = plan_layers(tuple("xyxyz"))
    assert (plan.prefix, plan.unit, plan.repeats, plan.suffix) == (range(0), 2, 2, range(4, 5))


@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
def test_parameter_formula_equals_the_tensor_table(name):
    config = getattr(DeepseekV4Config, name)()
    elements = sum(math.prod(t.shape) for t in hub_tensors(config) if t.storage != "i64")
    assert num_params(config).total == elements


def test_parameter_counts_are_the_published_ones():
    flash = dataclasses.replace(DeepseekV4Config.flash(), num_mtp_layers=0)
    assert round(num_params(flash).total / 1e9) == 284
    assert round(num_params(flash).active / 1e9) == 13
    pro = DeepseekV4Config.pro()
    assert round(num_params(pro).total / 1e12, 1) == 1.6
    assert round(num_params(pro).active / 1e9) == 49


@pytest.mark.parametrize(
    ("seq_len", "scores", "sparse", "hca"),
    [
        (4096, 8.4, 66.8, 18.6),  # the last hand-computed to 18.55
        (32768, 67.1, 81.8, 33.5),
        (131072, 268.4, 83.4, 83.9),
        (1048576, 2147.5, 83.8, 553.6),
    ],
)
def test_flash_attention_flops_by_hand(seq_len, scores, sparse, hca):
    """MFLOP per token and layer, forward, from sizes alone."""
    c = DeepseekV4Config.flash()
    assert 2e-6 * attention_weights(c) == pytest.approx(213.9, abs=0.05)
    extra = 2e-6 * (compressor_weights(c, "csa") + indexer_weights(c))
    assert extra == pytest.approx(38.3, abs=0.05)
    assert 2e-6 * compressor_weights(c, "hca") == pytest.approx(8.4, abs=0.05)
    found = 1e-6 * (indexer_flops(c, 4, seq_len) - 2 * indexer_weights(c))
    assert found == pytest.approx(scores, abs=0.1)
    assert 1e-6 * attention_flops(c, "csa", 4, seq_len) == pytest.approx(sparse, abs=0.1)
    assert 1e-6 * attention_flops(c, "hca", 128, seq_len) == pytest.approx(hca, abs=0.1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 12))
def test_means_over_queries_are_exact(seq_len, ratio, limit):
    queries = range(1, seq_len + 1)
    assert visible_entries(seq_len, ratio) == pytest.approx(
        sum(t // ratio for t in queries) / seq_len
    )
    capped = sum(min(limit, t // ratio) for t in queries) / seq_len
    assert visible_entries(seq_len, ratio, limit) == pytest.approx(capped)
    assert window_keys(seq_len, limit) == pytest.approx(
        sum(min(t, limit) for t in queries) / seq_len
    )


def test_training_flops_are_six_per_active_weight_plus_attention():
    c = dataclasses.replace(DeepseekV4Config.flash(), num_mtp_layers=0)
    per_token = flops_per_token(c, 4096)
    active = 6 * num_params(c).active
    attention = 3 * sum(attention_flops(c, kind, ratio, 4096) for kind, ratio, _ in c.layer_kinds)
    indexers = 21 * (indexer_flops(c, 4, 4096) - 6 * indexer_weights(c))
    assert per_token == pytest.approx(active + attention + indexers, rel=2e-3)
    with_mtp = flops_per_token(DeepseekV4Config.flash(), 4096)
    assert with_mtp > per_token + 6 * c.vocab_size * c.hidden_size
    with pytest.raises(ValueError, match="seq_len: found 0"):
        flops_per_token(c, 0)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
def test_transformers_reads_our_spelling_and_we_read_its(name):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers' DeepseekV4Config"
    )
    config = getattr(DeepseekV4Config, name)()
    theirs = transformers.DeepseekV4Config(**config.to_hf_config())
    assert theirs.layer_types == [TYPE_OF[kind] for kind in config.attention_kinds]
    assert theirs.mlp_layer_types.count("hash_moe") == config.router_kinds.count("hash")
    rates = {TYPE_OF[k]: r for k, r, _ in config.layer_kinds if k != "sliding"}
    assert {key: theirs.compress_rates[key] for key in rates} == rates
    assert theirs.qk_rope_head_dim == config.rope_head_dim
    compress = theirs.rope_parameters["compress"]
    assert (compress["rope_type"], compress["factor"]) == ("yarn", config.rope_scaling.factor)
    assert compress["rope_theta"] == config.compress_rope_theta
    assert theirs.rope_parameters["main"]["rope_type"] == "default"
    for diff in (True, False):
        saved = json.loads(theirs.to_json_string(use_diff=diff))
        assert DeepseekV4Config.from_hf_config(saved) == config
