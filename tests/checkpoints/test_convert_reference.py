"""What we export, read by `transformers`; what PyTorch decodes of a native folder, against what we decode."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import fathom
from checkpoints_tools.convert import Request, convert
from checkpoints_tools.hub_source import HubSource
from checkpoints_tools.safetensors_writer import write_folder
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from tests.checkpoints.folders import native_tensors

torch = pytest.importorskip("torch", reason="compares with PyTorch")
transformers = pytest.importorskip("transformers", reason="loads exports with transformers")

pytestmark = pytest.mark.reference

TINY = DeepseekV4Config.tiny()
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A native folder whose weights are of a size that a model can have."""
    tensors = native_tensors(TINY)
    for name, array in tensors.items():
        if name.endswith(".scale") and array.dtype == ml_dtypes.float8_e8m0fnu:
            codes = tensors[name.replace(".scale", ".weight")]
            # FP8 codes of random bits are about 100, FP4 codes about 3: weights come out near 0.1.
            byte = 117 if codes.dtype == ml_dtypes.float8_e4m3fn else 122
            tensors[name] = np.full(array.shape, byte, np.uint8).view(array.dtype)
        elif "norm" in name and array.ndim == 1:
            tensors[name] = (1 + array.astype(np.float32)).astype(array.dtype)
    path = tmp_path_factory.mktemp("native") / "hub"
    config = {**TINY.to_hf_config(), "expert_dtype": "fp4"}
    write_folder(path, tensors, config=config, max_shard_bytes=1 << 20)
    return path


def test_pytorch_decodes_to_the_same_bits(native):
    source = HubSource(native)
    seen = set()
    for tensor in hub_tensors(TINY):
        stored = source.stored[tensor.name]
        if stored.kind == "plain" or tensor.storage in seen and ".experts.0." not in tensor.name:
            continue
        seen.add(tensor.storage)
        codes, scales = source.read_codes(tensor)
        factors = torch.from_numpy(scales.view(np.uint8).copy()).view(torch.float8_e8m0fnu).float()
        if stored.kind == "fp8":
            values = torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn).float()
            block = (128, 128)
        else:
            packed = codes.view(np.uint8)
            pairs = np.stack([FP4_VALUES[packed & 15], FP4_VALUES[packed >> 4]], axis=-1)
            values, block = torch.from_numpy(pairs.reshape(tensor.shape)), (1, 32)
        for axis, size in enumerate(block):
            factors = factors.repeat_interleave(size, dim=axis).narrow(axis, 0, tensor.shape[axis])
        expected = values * factors
        np.testing.assert_array_equal(tensor.to_hub(source.read(tensor)), expected.numpy(), err_msg=tensor.name)
        ours = tensor.to_hub(source.read(tensor, np.dtype(ml_dtypes.bfloat16)))
        wanted = expected.bfloat16().view(torch.int16).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(ours).view(np.int16), wanted, err_msg=tensor.name)
    assert seen == {"fp8", "fp4"}


@pytest.mark.parametrize("through", ["hub", "checkpoint"])
def test_transformers_loads_an_export_and_computes_the_same(tmp_path, native, through):
    source = native
    if through == "checkpoint":
        source = tmp_path / "step"
        assert convert(Request(native, source, "orbax", "native")).complete
    assert convert(Request(source, tmp_path / "hub", "hf", "fp32")).complete
    reference, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "hub", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 90))
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    model = fathom.load(source if through == "checkpoint" else tmp_path / "hub")
    found = jax.jit(lambda ids: model(ids).logits)(tokens.astype(np.int32))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5, rtol=0)
