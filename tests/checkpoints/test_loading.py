"""`fathom.load`: every tensor lands where it belongs, or the load says what is wrong; runs keep how they computed;
on a mesh a plain call runs sharded."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fathom
from checkpoints_tools.safetensors_io import SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import write_folder
from fathom.layers.options import ComputeOptions
from fathom.mesh import make_mesh
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from fathom.recipe import Recipe
from fathom.train.checkpoint import Checkpoints
from fathom.train.checkpoint_model import load_model, options_of
from fathom.train.manifest import describe_run
from fathom.train.state import TrainState, seed_to_rng
from tests.checkpoints.folders import GOLDEN, random_tensors
from tests.models.small import random_model, small_config

TINY = DeepseekV4Config.tiny()
TABLE = {tensor.name: tensor for tensor in hub_tensors(TINY)}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(TINY)


def weights(model: nnx.Module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


def mixture(name: str) -> str:
    """A native name as transformers' save_pretrained spells it."""
    if name == "head.weight":
        return name
    name = name.replace(".attn.kv_norm.", ".attn.norm.")
    name = {"embed.weight": "embed_tokens.weight"}.get(name, name)
    return "model." + name.replace("hc_head_", "hc_head.hc_")


def check_every_weight(model: nnx.Module, tensors: dict[str, np.ndarray]) -> None:
    found = weights(model)
    for name, array in tensors.items():
        tensor = TABLE[name]
        ours = found[tensor.path][tensor.index]
        np.testing.assert_array_equal(tensor.to_hub(ours), array, err_msg=name)


def test_every_tensor_lands_where_it_belongs(tmp_path, tensors):
    write_folder(tmp_path, tensors, config=TINY.to_hf_config(), max_shard_bytes=2**20)
    model = fathom.load(tmp_path)
    check_every_weight(model, tensors)
    assert {str(value.dtype) for value in weights(model).values()} == {"float32", "int32"}


def test_on_a_mesh_the_weights_are_the_same_and_cut(tmp_path, tensors):
    write_folder(tmp_path, tensors, config=TINY.to_hf_config())
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    model = fathom.load(tmp_path, mesh=mesh)
    check_every_weight(model, tensors)
    w1 = model.repeated[0].ffn.experts.w1[...]
    assert w1.addressable_shards[0].data.size * 8 == w1.size


def test_bf16_leaves_float32_and_tables_alone(tmp_path, tensors):
    write_folder(tmp_path, tensors, config=TINY.to_hf_config())
    found = weights(fathom.load(tmp_path, dtype="bf16"))
    for name, array in tensors.items():
        tensor = TABLE[name]
        ours = tensor.to_hub(found[tensor.path][tensor.index])
        if tensor.storage not in ("f32", "i64"):
            array = array.astype(ml_dtypes.bfloat16)
            assert ours.dtype == ml_dtypes.bfloat16, name
        np.testing.assert_array_equal(ours, array, err_msg=name)


def test_half_precision_files_are_widened_exactly(tmp_path, tensors):
    kinds = {"bf16": ml_dtypes.bfloat16, "fp8": np.float16, "fp4": np.float16}
    stored = {
        name: array.astype(kinds.get(TABLE[name].storage, array.dtype))
        for name, array in tensors.items()
    }
    write_folder(tmp_path, stored, config=TINY.to_hf_config())
    check_every_weight(fathom.load(tmp_path), stored)


def test_float32_weights_stored_narrower_are_reported(tmp_path, tensors, caplog):
    stored = {
        name: array if array.dtype == np.int64 else array.astype(ml_dtypes.bfloat16)
        for name, array in tensors.items()
    }
    write_folder(tmp_path, stored, config=TINY.to_hf_config())
    with caplog.at_level(logging.WARNING):
        fathom.load(tmp_path)
    assert "belong in float32" in caplog.text


def transformers_folder(path, tensors) -> dict[str, np.ndarray]:
    main = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    spelled = {mixture(name): array for name, array in main.items()}
    write_folder(path, spelled, config=TINY.to_hf_config())
    return main


def test_a_folder_that_transformers_saved_has_no_mtp(tmp_path, tensors, caplog):
    main = transformers_folder(tmp_path, tensors)
    with caplog.at_level(logging.WARNING):
        model = fathom.load(tmp_path)
    assert "multi-token prediction" in caplog.text
    assert model.config == dataclasses.replace(TINY, num_mtp_layers=0)
    check_every_weight(model, main)
    assert len(model.mtp) == 0


def test_partial_mtp_is_an_error(tmp_path, tensors):
    spelled = {mixture(name): array for name, array in tensors.items()}
    del spelled["model.mtp.0.enorm.weight"]
    write_folder(tmp_path, spelled, config=TINY.to_hf_config())
    with pytest.raises(ValueError, match=r"mtp.0.enorm.weight: missing, expected shape \[128\]"):
        fathom.load(tmp_path)


def test_a_native_folder_without_mtp_is_an_error(tmp_path, tensors):
    main = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    write_folder(tmp_path, main, config=TINY.to_hf_config())
    with pytest.raises(ValueError, match="mtp.0.h_proj.weight: missing"):
        fathom.load(tmp_path)


def test_all_problems_are_listed_at_once(tmp_path, tensors):
    stored = dict(tensors)
    del stored["layers.3.ffn.experts.7.w2.weight"]
    stored["layers.0.attn.wq_b.weight"] = stored["layers.0.attn.wq_b.weight"].T
    stored["layers.9.attn.wq_b.weight"] = np.zeros(2, np.float32)
    stored["layers.0.attn.wkv.scale"] = np.zeros((1, 1), np.float32)
    stored["layers.1.ffn.gate.tid2eid"] = stored["layers.1.ffn.gate.tid2eid"].astype(np.float32)
    stored["norm.weight"] = stored["norm.weight"].astype(np.float64)
    stored["lm_head.weight"] = stored["head.weight"]
    write_folder(tmp_path, stored, config=TINY.to_hf_config())
    with pytest.raises(ValueError) as error:
        fathom.load(tmp_path)
    for text in (
        "layers.3.ffn.experts.7.w2.weight: missing, expected shape [128, 96]",
        "layers.0.attn.wq_b.weight: found shape [64, 320], expected [320, 64]",
        "layers.9.attn.wq_b.weight: left over",
        "layers.0.attn.wkv.scale: left over",
        "layers.1.ffn.gate.tid2eid: found dtype F32, expected I64 or I32",
        "norm.weight: found dtype F64, expected F32 or BF16 or F16",
        "head.weight: found twice",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("bad", [-1, 8])
def test_hash_tables_out_of_range_are_refused(tmp_path, tensors, bad):
    table = tensors["layers.0.ffn.gate.tid2eid"].copy()
    table[5, 1] = bad
    stored = tensors | {"layers.0.ffn.gate.tid2eid": table}
    write_folder(tmp_path, stored, config=TINY.to_hf_config())
    with pytest.raises(ValueError, match="tid2eid: found values .* expected 0 to 7"):
        fathom.load(tmp_path)


def test_a_quantised_weight_is_decoded_and_needs_its_scales(tmp_path, tensors):
    name = "layers.0.attn.wq_a.weight"
    codes = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), 0.5, ml_dtypes.float8_e8m0fnu)
    stored = {name: codes, "layers.0.attn.wq_a.scale": scale}
    write_folder(tmp_path, tensors | stored, config=TINY.to_hf_config())
    check_every_weight(fathom.load(tmp_path), tensors | {name: codes.astype(np.float32) / 2})
    stored["layers.0.ffn.experts.0.w1.weight"] = np.zeros((96, 64), np.int8)
    del stored["layers.0.attn.wq_a.scale"]
    write_folder(tmp_path, tensors | stored, config=TINY.to_hf_config())
    with pytest.raises(ValueError, match="3 problems") as error:
        fathom.load(tmp_path)
    for text in (
        f"wq_a.scale: missing, and {name} is stored as fp8",
        "experts.0.w1.scale: missing, and layers.0.ffn.experts.0.w1.weight is stored as fp4",
        "experts.0.w1.weight: found dtype I8, expected F32 as 7 of the 8 weights beside it",
    ):
        assert text in str(error.value)


def test_other_models_and_missing_pieces_are_refused(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        fathom.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="dtype: found 'fp8'"):
        fathom.load(tmp_path, dtype="fp8")
    write_folder(tmp_path, {"x": np.zeros(1)})
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        fathom.load(tmp_path)
    with pytest.raises(ValueError, match="found a file"):
        fathom.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama', supported: deepseek_v32, deepseek_v4"):
        fathom.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not readable"):
        fathom.load(tmp_path)


def test_golden_weights_load_unchanged():
    model = fathom.load(GOLDEN)
    stored = SafetensorsCheckpoint(GOLDEN)
    found = weights(model)
    for tensor in hub_tensors(DeepseekV4Config.from_hf_config(GOLDEN)):
        ours = tensor.to_hub(found[tensor.path][tensor.index])
        np.testing.assert_array_equal(ours, stored.read(tensor.name), err_msg=tensor.name)


# --- Runs, and calls on a mesh --------------------------------------------------------------------

SMALL = small_config(("csa",) * 2, num_hash=2)
"""One scanned block with a hash router, and the MTP block with a learned one."""
LENGTH = 40


def save_run(folder, model=(), train=()) -> None:
    """A step folder of a run that trained the small model, with random weights."""
    names = ("attention_kinds", "compress_ratios", "router_kinds", "hidden_size", "q_lora_rank")
    config = {name: getattr(SMALL, name) for name in (*names, "moe_intermediate_size")}
    values = {
        "name": "small",
        "model": {"name": "deepseek-v4-tiny", "dtype": "float32", "config": config, **dict(model)},
        "data": {"path": ".", "sequence_length": LENGTH, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 1, **dict(train)},
    }
    recipe = Recipe.model_validate(values)
    assert recipe.model_spec().config == SMALL
    _, params, rest = random_model(SMALL)
    state = TrainState(params, rest, {"count": jax.numpy.ones(3)}, jax.numpy.int32(1), seed_to_rng(0))
    about = describe_run(recipe.to_dict(), recipe.model_spec(), make_mesh({"fsdp": 8}), {})
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, [], about)


def test_a_run_is_loaded_as_it_computed_unless_told_otherwise(tmp_path):
    save_run(tmp_path, {"simulate_quant": True, "query_chunk": 16}, {"stage": "dense"})
    saved = ComputeOptions("float32", simulate_quant=True, query_chunk=16, stage="dense")
    assert load_model(tmp_path).options == saved
    assert fathom.load(tmp_path).options == saved
    assert fathom.load(tmp_path, simulate_quant=False).options == dataclasses.replace(saved, simulate_quant=False)
    bf16 = dataclasses.replace(saved, dtype="bfloat16", param_dtype="bfloat16")
    assert fathom.load(tmp_path, dtype="bf16").options == bf16
    # A conversion's recipe says no more than this.
    converted = {"recipe": {"model": {"dtype": "bfloat16", "param_dtype": "bfloat16"}}}
    assert options_of(converted) == ComputeOptions("bfloat16", "bfloat16")


@pytest.mark.parametrize(("kind", "rows", "pieces"), [("hub", 8, 8), ("run", 6, 2), ("run", 3, 1)])
def test_a_plain_call_on_a_mesh_runs_sharded(tmp_path, kind, rows, pieces):
    if kind == "hub":
        write_folder(tmp_path, random_tensors(SMALL), config=SMALL.to_hf_config())
    else:
        save_run(tmp_path)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (rows, LENGTH)).astype(np.int32)
    one = fathom.load(tmp_path)
    expected = np.asarray(jax.jit(lambda ids: one(ids).logits)(tokens))
    model = fathom.load(tmp_path, make_mesh({"fsdp": 4, "expert": 2}))
    assert isinstance(model, type(one)) and type(model).__name__ == "DeepseekV4"
    before = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}

    logits = model(tokens).logits
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)
    # 6 rows are cut by the expert axis alone, 3 by none.
    assert logits.addressable_shards[0].data.shape[0] == rows // pieces and len(logits.devices()) == 8
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable.get_value() is before[path], path
    assert len(model.repeated) == 1
    for block in model.repeated:
        w1 = block.ffn.experts.w1[...]
        assert w1.addressable_shards[0].data.size * 8 == w1.size

    if rows == 8:
        traced = jax.jit(lambda ids: model(ids, return_streams=True))(tokens)
        assert traced.logits.addressable_shards[0].data.shape[0] == 1 and len(traced.streams) == 2
        assert np.linalg.norm(traced.logits - expected) < 1e-5 * np.linalg.norm(expected)
    with pytest.raises(ValueError, match=r"token id 264 at \[0, 3\] is outside the vocabulary \[0, 264\)"):
        model(np.where(np.arange(LENGTH) == 3, 264, tokens))


@pytest.mark.reference
def test_a_folder_saved_by_transformers_itself(tmp_path):
    transformers = pytest.importorskip("transformers", reason="saves a folder with transformers")
    torch = pytest.importorskip("torch", reason="the reference model runs in PyTorch")
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(**TINY.to_hf_config())
    config._attn_implementation = "eager"
    reference = transformers.DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in reference.state_dict().items():
        if name.endswith("tid2eid"):
            rows = torch.rand((len(value), 8), generator=generator).argsort(-1)[:, :2]
            value.copy_(rows)
        elif value.is_floating_point():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 264, (1, 75))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    model = fathom.load(tmp_path)
    found = jax.jit(lambda ids: model(ids).logits)(tokens.astype(np.int32))
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5, rtol=0)
