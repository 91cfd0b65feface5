"""What holds of every model's Hub table: it fills the model, its transforms are exact, other spellings come apart."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from checkpoints_tools.safetensors_io import SafetensorsCheckpoint
from fathom import zoo
from fathom.hub import group_by_path
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4.hf_mapping import native_arrays, native_pieces
from fathom.models.deepseek_v32.hf_mapping import hub_arrays, hub_pieces
from fathom.models.hub_rows import layer_place
from tests.checkpoints.folders import GOLDEN, random_tensors

NAMES = ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v4-tiny", "deepseek-v3.2", "deepseek-v3.2-tiny")
SPECS = {name: zoo.get(name) for name in NAMES}
SPECS["golden"] = SPECS["deepseek-v4-tiny"].with_config(SPECS["deepseek-v4-tiny"].config_from_hf(GOLDEN))


@pytest.mark.parametrize("name", SPECS)
def test_table_fills_every_parameter_of_the_model_once(name):
    """Paths, shapes and kept dtypes against the model itself, built without memory at full size."""
    spec = SPECS[name]
    options = ComputeOptions(dtype="bfloat16", param_dtype="bfloat16")
    state = nnx.state(nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), options)))
    found = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    table = spec.hub_tensors(spec.config)
    places = group_by_path(table)
    assert sum(map(len, places.values())) == len(table)
    assert set(places) == set(found)
    for path, parts in places.items():
        first = next(iter(parts.values()))
        lead = found[path].shape[: len(first.index)]
        assert lead + first.our_shape == found[path].shape, path
        assert set(parts) == set(np.ndindex(*lead)), path
        dtype = {"f32": "float32", "i64": "int32"}.get(first.storage, "bfloat16")
        assert found[path].dtype == dtype, path


@pytest.mark.parametrize("name", SPECS)
def test_every_layer_has_its_own_place(name):
    config = SPECS[name].config
    assert len({layer_place(config, layer) for layer in range(config.num_layers)}) == config.num_layers


def test_layers_live_where_the_plan_says():
    flash, v32 = SPECS["deepseek-v4-flash"].config, SPECS["deepseek-v3.2"].config
    assert layer_place(flash, 2) == layer_place(v32, 2) == (("prefix", 2), ())
    assert layer_place(flash, 42) == (("repeated", 1), (19,))
    assert layer_place(v32, 60) == (("repeated", 0), (57,))
    odd = dataclasses.replace(
        SPECS["deepseek-v4-tiny"].config,
        attention_kinds=("csa", "hca") * 2 + ("sliding",),
        compress_ratios=(4, 16) * 2 + (0,),
        router_kinds=("learned",) * 5,
    )
    assert layer_place(odd, 3) == (("repeated", 1), (1,))
    assert layer_place(odd, 4) == (("suffix", 0), ())


@pytest.mark.parametrize("name", ["deepseek-v4-tiny", "golden", "deepseek-v3.2-tiny"])
def test_transforms_are_exact_inverses(name):
    spec = SPECS[name]
    arrays = random_tensors(spec.config)
    for tensor in spec.hub_tensors(spec.config):
        array = arrays[tensor.name]
        ours = tensor.to_ours(array)
        assert (ours.shape, ours.dtype) == (tensor.our_shape, array.dtype)
        np.testing.assert_array_equal(tensor.to_hub(np.ascontiguousarray(ours)), array)


@pytest.mark.parametrize(
    ("pieces", "arrays", "experts", "names"),
    [
        (native_pieces, native_arrays, "layers.1.ffn.experts", ("w1", "w2", "w3")),
        (hub_pieces, hub_arrays, "model.layers.1.mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    ],
    ids=["v4", "v3.2"],
)
def test_fused_experts_are_taken_apart(pieces, arrays, experts, names):
    name = "model.layers.1.mlp.experts.{}_proj"
    gate_up, down = np.arange(2 * 6 * 4).reshape(2, 6, 4), np.arange(2 * 4 * 3).reshape(2, 4, 3)
    found = dict(arrays(name.format("gate_up"), gate_up)) | dict(arrays(name.format("down"), down))
    assert len(found) == 6
    for expert in range(2):
        wanted = (gate_up[expert, :3], down[expert], gate_up[expert, 3:])
        for matrix, array in zip(names, wanted, strict=True):
            np.testing.assert_array_equal(found[f"{experts}.{expert}.{matrix}.weight"], array)
    with pytest.raises(ValueError, match="experts, rows, columns"):
        pieces(name.format("gate_up"), (2, 5, 4))


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "theirs", "spelled"),
    [
        ("deepseek-v4-tiny", "DeepseekV4", ".attn.norm.weight"),
        ("deepseek-v3.2-tiny", "DeepseekV32", ".self_attn.kv_a_layernorm.weight"),
    ],
)
def test_names_that_transformers_saves(name, theirs, spelled, tmp_path):
    transformers = pytest.importorskip("transformers", reason="saves a folder with transformers")
    torch = pytest.importorskip("torch", reason="saves a folder with PyTorch")
    spec = SPECS[name]
    config = dataclasses.replace(spec.config, num_mtp_layers=0)
    with torch.device("cpu"):
        their_config = getattr(transformers, f"{theirs}Config")(**config.to_hf_config())
        reference = getattr(transformers, f"{theirs}ForCausalLM")(their_config)
    reference.save_pretrained(tmp_path)
    assert spec.config_from_hf(tmp_path) == config
    expected = {tensor.name: tensor.shape for tensor in spec.hub_tensors(config)}
    saved = SafetensorsCheckpoint(tmp_path).tensors
    assert any(saved_name.endswith(spelled) for saved_name in saved)
    found = {name: info.shape for key, info in saved.items() for name, _ in spec.hub_pieces(key, info.shape)}
    assert found == expected
    modules = {}
    for key, weight in reference.state_dict().items():
        modules |= dict(spec.hub_pieces(key, tuple(weight.shape)))
    assert set(modules) == set(expected)
    assert jax.device_count() == 8  # the reference left jax's devices alone
