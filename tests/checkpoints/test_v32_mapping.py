"""DeepSeek-V3.2's Hub table and config: the published inventory, what the transforms mean, every spelling."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx

import fathom
from checkpoints_tools.convert import Request, convert
from checkpoints_tools.safetensors_io import NUMPY_DTYPES, SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import write_folder
from checkpoints_tools.verify import verify
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.hf_mapping import COPIES, hub_pieces, hub_tensors
from tests.checkpoints.folders import assert_same_bytes, random_tensors

CONFIGS = {"released": DeepseekV32Config.v32(), "tiny": DeepseekV32Config.tiny()}
# DeepSeek's config.json of V3.2, the architecture's part.
RELEASED = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# The names of the released inference code.
NATIVE = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}


# Configs


def test_every_spelling_of_the_released_config():
    released = CONFIGS["released"]
    assert DeepseekV32Config.from_hf_config(RELEASED) == released
    native = DeepseekV32Config.from_hf_config(NATIVE)
    assert native == dataclasses.replace(released, num_mtp_layers=0)  # that file does not speak of MTP
    types = {k: v for k, v in RELEASED.items() if k not in ("first_k_dense_replace", "rope_theta", "rope_scaling")}
    types |= {
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
        "layer_types": ["indexed_attention"] * 61,
        "rope_parameters": {**RELEASED["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0},
        "head_dim": 64,
        "qk_head_dim": 192,
    }
    assert DeepseekV32Config.from_hf_config(types) == released


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, tmp_path):
    config = CONFIGS[name]
    others = [
        config,
        dataclasses.replace(config, rope_scaling=None, eos_token_id=(1, 2), num_mtp_layers=0),
        dataclasses.replace(config, ffn_kinds=("moe", "dense", "moe")),
    ]
    for written in others:
        (tmp_path / "config.json").write_text(json.dumps(written.to_hf_config()))
        assert DeepseekV32Config.from_hf_config(tmp_path) == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_hash_layers=3), "unknown keys: n_hash_layers"),
        (dict(scoring_func="softmax"), "scoring_func: found 'softmax', supported 'sigmoid' only"),
        (dict(topk_method="greedy"), "topk_method: found 'greedy'"),
        (dict(index_topk=None), "index_topk: missing"),
        (dict(q_lora_rank=None), "q_lora_rank: missing"),
        (dict(first_k_dense_replace=None), "the schedule is not guessed"),
        (dict(layer_types=["full_attention"] * 61), "layer_types: found"),
        (dict(num_key_value_heads=8), "num_key_value_heads: found 8, expected 128"),
        (dict(n_group=7), "num_experts 256 is not divisible by num_groups 7"),
        (dict(num_experts_per_tok=129), "num_experts_per_tok 129 is more than the 128 experts of 4 groups"),
        (dict(index_topk=0), "index_top_k: found 0"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "expected 'yarn' or 'default'"),
        (dict(rope_parameters={"rope_theta": 5e4}), "rope_theta gives 10000, rope_parameters.rope_theta gives 50000.0"),
    ],
)
def test_what_is_not_known_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepseekV32Config.from_hf_config({k: v for k, v in {**RELEASED, **changes}.items() if v is not None})


@pytest.mark.parametrize("missing", ["mscale", "mscale_all_dim"])
def test_yarn_without_its_scales_is_refused(missing):
    """The released code and transformers read a missing one differently."""
    scaling = {k: v for k, v in RELEASED["rope_scaling"].items() if k != missing}
    with pytest.raises(ValueError, match="rope_scaling: found keys"):
        DeepseekV32Config.from_hf_config({**RELEASED, "rope_scaling": scaling})


# The table


def test_published_inventory():
    """The published number of elements, scales included, and the names, dtypes and shapes of single tensors."""
    stored = {tensor.name: tensor for entry in hub_tensors(CONFIGS["released"]) for tensor in entry.stored()}
    copies = 2 * 129280 * 7168  # the multi-token-prediction layer's embedding and head
    assert sum(math.prod(tensor.shape) for tensor in stored.values()) + copies == 685_396_921_376
    for name, dtype, shape in (
        ("model.embed_tokens.weight", "BF16", (129280, 7168)),
        ("model.layers.0.self_attn.q_b_proj.weight", "F8_E4M3", (24576, 1536)),
        ("model.layers.0.self_attn.q_b_proj.weight_scale_inv", "F32", (192, 12)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "F8_E4M3", (576, 7168)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", (5, 56)),
        ("model.layers.0.self_attn.kv_b_proj.weight", "F8_E4M3", (32768, 512)),
        ("model.layers.0.self_attn.o_proj.weight", "F8_E4M3", (7168, 16384)),
        ("model.layers.0.mlp.gate_proj.weight", "F8_E4M3", (18432, 7168)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "F32", (256,)),
        ("model.layers.3.mlp.experts.255.down_proj.weight_scale_inv", "F32", (56, 16)),
        ("model.layers.60.self_attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1536)),
        ("model.layers.60.self_attn.indexer.wk.weight_scale_inv", "F32", (1, 56)),
        ("model.layers.60.self_attn.indexer.k_norm.bias", "F32", (128,)),
        ("model.layers.61.eh_proj.weight", "BF16", (7168, 14336)),
        ("model.layers.61.shared_head.norm.weight", "BF16", (7168,)),
        ("model.layers.61.mlp.experts.0.up_proj.weight", "F8_E4M3", (2048, 7168)),
        ("lm_head.weight", "BF16", (129280, 7168)),
    ):
        assert (stored[name].dtype, stored[name].shape) == (dtype, shape), name
    assert stored["model.layers.3.mlp.experts.255.down_proj.weight_scale_inv"].num_bytes == 4 * 56 * 16


def test_what_the_transforms_mean():
    """The contractions of the reference on the Hub's matrices, against ours on the transformed ones."""
    config = CONFIGS["tiny"]
    arrays, table = random_tensors(config), {t.name: t for t in hub_tensors(config)}
    rng, prefix = np.random.default_rng(1), "model.layers.2.self_attn."
    heads, width = config.num_heads, config.nope_head_dim + config.value_head_dim
    c = rng.standard_normal((3, config.kv_lora_rank))
    name = prefix + "kv_b_proj.weight"
    expected = (c @ arrays[name].T).reshape(3, heads, width)
    np.testing.assert_allclose(np.einsum("tr,rnh->tnh", c, table[name].to_ours(arrays[name])), expected)
    out = rng.standard_normal((3, heads, config.value_head_dim))
    name = prefix + "o_proj.weight"
    expected = out.reshape(3, -1) @ arrays[name].T
    np.testing.assert_allclose(np.einsum("tnv,nvd->td", out, table[name].to_ours(arrays[name])), expected)


def test_copies_hold_no_weight():
    for copy in COPIES:
        assert hub_pieces(f"model.layers.61.{copy}", (129280, 7168)) == []
    assert hub_pieces("model.embed_tokens.weight", (4, 2)) == [("model.embed_tokens.weight", ())]


def released_folder(folder, config: DeepseekV32Config) -> dict[str, np.ndarray]:
    """A folder as DeepSeek releases it: FP8 with float32 block scales, and MTP's copies of embedding and head.

    Returns the values that its weights stand for.
    """
    rng, files, values = np.random.default_rng(0), {}, {}
    for tensor in hub_tensors(config):
        weight, *scales = tensor.stored()
        value = (0.05 * rng.standard_normal(weight.shape)).astype(NUMPY_DTYPES[weight.dtype])
        if scales:
            assert scales[0].name == f"{tensor.name}_scale_inv"
            factors = (0.5 + rng.random(scales[0].shape)).astype(np.float32)
            files[scales[0].name] = factors
            full = np.kron(factors, np.ones((128, 128), np.float32))[: weight.shape[0], : weight.shape[1]]
            values[tensor.name] = value.astype(np.float32) * full
        else:
            values[tensor.name] = value.astype(np.float32)
        files[tensor.name] = value
    if config.num_mtp_layers:
        prefix = f"model.layers.{config.num_layers}."
        files |= {prefix + copy: files[name] for copy, name in COPIES.items()}
    write_folder(folder, files, config=config.to_hf_config(), max_shard_bytes=1 << 20)
    return values


def test_a_released_folder_loads(tmp_path):
    """Two tiles of 128 and more in some matrices."""
    config = dataclasses.replace(CONFIGS["tiny"], hidden_size=200)
    values = released_folder(tmp_path, config)
    model = fathom.load(tmp_path)
    assert model.config == config
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}
    for tensor in hub_tensors(config):
        got = tensor.to_hub(flat[tensor.path][tensor.index])
        np.testing.assert_array_equal(got, values[tensor.name], err_msg=tensor.name)


def test_a_released_folder_converts_there_and_back_byte_for_byte(tmp_path):
    released_folder(tmp_path / "hub", CONFIGS["tiny"])
    assert convert(Request(tmp_path / "hub", tmp_path / "step", "orbax")).complete
    assert convert(Request(tmp_path / "step", tmp_path / "again", "hf")).complete
    files = SafetensorsCheckpoint(tmp_path / "hub")
    assert any(name.endswith("shared_head.head.weight") for name in files.tensors)
    assert_same_bytes(tmp_path / "again", {name: files.read(name) for name in files.tensors})
    assert verify(tmp_path / "again") == []


def test_a_copy_that_is_none_is_refused(tmp_path):
    released_folder(tmp_path / "hub", CONFIGS["tiny"])
    found = SafetensorsCheckpoint(tmp_path / "hub")
    files = {name: found.read(name) for name in found.tensors}
    name = f"model.layers.{CONFIGS['tiny'].num_layers}.embed_tokens.weight"
    files[name] = np.ascontiguousarray(files[name][::-1])
    write_folder(tmp_path / "other", files, config=CONFIGS["tiny"].to_hf_config())
    with pytest.raises(ValueError, match="embed_tokens.weight: differs from model.embed_tokens.weight"):
        convert(Request(tmp_path / "other", tmp_path / "step", "orbax"))
    assert not (tmp_path / "step").exists()
