"""DeepSeek-V4's Hub table: the published inventory, what the transforms mean, every spelling of the names."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.safetensors_io import SafetensorsCheckpoint
from fathom.hub import HubTensor, Layout
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, native_arrays, normalise_name
from tests.checkpoints.folders import GOLDEN, random_tensors

CONFIGS = {name: getattr(DeepseekV4Config, name)() for name in ("flash", "pro", "tiny")}
CONFIGS["golden"] = DeepseekV4Config.from_hf_config(GOLDEN)


@pytest.fixture(scope="module")
def tables() -> dict[str, list[HubTensor]]:
    return {name: hub_tensors(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize(
    ("name", "count", "num_bytes"),
    [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)],
)
def test_published_inventory(tables, name, count, num_bytes):
    stored = [tensor for entry in tables[name] for tensor in entry.stored()]
    assert len({tensor.name for tensor in stored}) == len(stored) == count
    assert sum(tensor.num_bytes for tensor in stored) == num_bytes


def test_published_counts_per_layer(tables):
    stored = [tensor.name for entry in tables["flash"] for tensor in entry.stored()]

    def count(prefix: str) -> int:
        return sum(name.startswith(prefix) for name in stored)

    found = [count("layers.0."), count("layers.3."), count("layers.2."), count("mtp.0.")]
    assert found == [1565, 1569, 1576, 1575]


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("layers.0.attn.wq_a.weight", "F8_E4M3", (1536, 7168)),
        ("layers.0.attn.wq_a.scale", "F8_E8M0", (12, 56)),
        ("layers.0.attn.wq_b.scale", "F8_E8M0", (512, 12)),
        ("layers.0.attn.wo_a.weight", "F8_E4M3", (16384, 4096)),
        ("layers.0.attn.wo_a.scale", "F8_E8M0", (128, 32)),
        ("layers.0.attn.wo_b.weight", "F8_E4M3", (7168, 16384)),
        ("layers.0.attn.attn_sink", "F32", (128,)),
        ("layers.0.ffn.experts.383.w1.weight", "I8", (3072, 3584)),
        ("layers.0.ffn.experts.383.w1.scale", "F8_E8M0", (3072, 224)),
        ("layers.0.ffn.experts.0.w2.weight", "I8", (7168, 1536)),
        ("layers.0.ffn.experts.0.w2.scale", "F8_E8M0", (7168, 96)),
        ("layers.0.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.3.ffn.gate.bias", "F32", (384,)),
        ("layers.2.attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1536)),
        ("layers.2.attn.indexer.weights_proj.weight", "BF16", (64, 7168)),
        ("layers.2.attn.indexer.compressor.wkv.weight", "BF16", (256, 7168)),
        ("layers.2.attn.indexer.compressor.ape", "F32", (4, 256)),
        ("layers.2.attn.compressor.wgate.weight", "BF16", (1024, 7168)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.3.attn.compressor.ape", "F32", (128, 512)),
        ("layers.3.attn.compressor.wkv.weight", "BF16", (512, 7168)),
        ("layers.60.hc_attn_fn", "F32", (24, 28672)),
        ("hc_head_fn", "F32", (4, 28672)),
        ("mtp.0.e_proj.weight", "F8_E4M3", (7168, 7168)),
        ("mtp.0.hc_head_scale", "F32", (1,)),
    ],
)
def test_published_shapes_of_pro(tables, name, dtype, shape):
    stored = {tensor.name: tensor for entry in tables["pro"] for tensor in entry.stored()}
    assert (stored[name].dtype, stored[name].shape) == (dtype, shape)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_any_layout_is_a_bijection(view, random):
    order = list(range(len(view)))
    random.shuffle(order)
    layout = Layout(tuple(view), tuple(order))
    hub = np.arange(math.prod(view))
    ours = layout.to_ours(hub)
    assert ours.shape == layout.our_shape
    np.testing.assert_array_equal(layout.to_hub(ours, hub.shape), hub)


def test_what_the_transforms_mean(tables):
    """The contractions of the reference on the Hub's matrices, against ours on the transformed
    ones."""
    config = CONFIGS["golden"]
    by_name = {tensor.name: tensor for tensor in tables["golden"]}
    arrays = random_tensors(config)

    def both(name: str) -> tuple[np.ndarray, np.ndarray]:
        hub = arrays[name].astype(np.float64)
        return hub, by_name[name].to_ours(hub)

    rng = np.random.default_rng(0)
    groups, heads, dim = config.o_groups, config.num_heads, config.head_dim
    qr = rng.normal(size=(3, config.q_lora_rank))
    hub, ours = both("layers.2.attn.wq_b.weight")
    expected = (qr @ hub.T).reshape(3, heads, dim)
    np.testing.assert_allclose(np.einsum("sr,rnh->snh", qr, ours), expected)

    out = rng.normal(size=(3, groups, heads * dim // groups))
    hub, ours = both("layers.2.attn.wo_a.weight")
    low = np.einsum("sgd,grd->sgr", out, hub.reshape(groups, config.o_lora_rank, -1))
    np.testing.assert_allclose(np.einsum("sgd,gdr->sgr", out, ours), low)
    hub, ours = both("layers.2.attn.wo_b.weight")
    expected = low.reshape(3, -1) @ hub.T
    np.testing.assert_allclose(np.einsum("sgr,grd->sd", low, ours), expected)

    streams = rng.normal(size=(3, config.hc_mult, config.hidden_size))
    hub, ours = both("layers.2.hc_attn_fn")
    expected = streams.reshape(3, -1) @ hub.T
    np.testing.assert_allclose(np.einsum("snd,mnd->sm", streams, ours), expected)

    x = rng.normal(size=(3, config.hidden_size))
    for name in ("layers.2.ffn.experts.3.w1.weight", "head.weight", "layers.2.ffn.gate.weight"):
        hub, ours = both(name)
        np.testing.assert_allclose(x @ ours, x @ hub.T)


def test_a_wrong_shape_names_the_tensor(tables):
    tensor = tables["tiny"][1]
    with pytest.raises(
        ValueError, match=r"head.weight: found shape \(2, 2\), expected \(264, 128\)"
    ):
        tensor.to_ours(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"head.weight: found our shape \(2, 2\)"):
        tensor.to_hub(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("spelled", "native"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.attn.compressor.norm.weight", "layers.7.attn.compressor.norm.weight"),
        ("model.layers.7.self_attn.kv_norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.kv_proj.weight", "layers.7.attn.wkv.weight"),
        ("model.layers.7.self_attn.sinks", "layers.7.attn.attn_sink"),
        (
            "model.layers.7.self_attn.compressor.kv_proj.weight",
            "layers.7.attn.compressor.wkv.weight",
        ),
        (
            "model.layers.7.self_attn.compressor.indexer.kv_norm.weight",
            "layers.7.attn.indexer.compressor.norm.weight",
        ),
        (
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.7.attn.indexer.weights_proj.weight",
        ),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias"),
        ("model.layers.7.mlp.experts.12.up_proj.weight", "layers.7.ffn.experts.12.w3.weight"),
        (
            "model.layers.7.mlp.shared_experts.gate_proj.weight",
            "layers.7.ffn.shared_experts.w1.weight",
        ),
        ("model.layers.7.self_attn.q_b_proj.weight_scale_inv", "layers.7.attn.wq_b.scale"),
        ("model.layers.7.ffn_hc.scale", "layers.7.hc_ffn_scale"),
    ],
)
def test_other_spellings(spelled, native):
    assert normalise_name(spelled) == native


def test_native_names_stay(tables):
    for name in ("flash", "golden"):
        assert all(normalise_name(tensor.name) == tensor.name for tensor in tables[name])


def test_golden_gradients_cover_every_trained_weight(tables):
    """The golden file names gradients by transformers' modules, experts fused."""
    golden = np.load(GOLDEN / "expected_plain.npz")
    shapes = {tensor.name: tensor.shape for tensor in tables["golden"]}
    found = {}
    for name in golden.files:
        if name.startswith("grad:"):
            for native, array in native_arrays(name.removeprefix("grad:"), golden[name]):
                assert native not in found
                found[native] = array.shape
    assert found == {name: shapes[name] for name in found}
    left = {name for name in set(shapes) - set(found) if not name.startswith("mtp.")}
    assert all(".indexer." in name or name.endswith(("tid2eid", "gate.bias")) for name in left), (
        left
    )


def test_golden_file_holds_exactly_the_table(tables):
    checkpoint = SafetensorsCheckpoint(GOLDEN)
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert found == {tensor.name: tensor.shape for tensor in tables["golden"]}
