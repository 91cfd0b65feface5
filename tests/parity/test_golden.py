"""The golden case, made with the official inference code: streams of every layer, logits, MTP, gradients.

`tests/data/v4_tiny` holds a checkpoint with native names, outputs without and with the FP8/FP4 simulation, and the
cross-entropy's gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fathom
from fathom.cli import main
from fathom.layers.documents import make_documents
from fathom.layers.losses import LossWeights, count_targets, language_model_loss
from fathom.models.deepseek_v4.attention import make_layer_inputs
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, native_arrays
from tests.parity.gradients import too_far

GOLDEN = Path(__file__).parents[1] / "data" / "v4_tiny"
LAYERS = 6


@pytest.fixture(scope="module")
def golden():
    return {name: np.load(GOLDEN / f"expected_{name}.npz") for name in ("plain", "sim")}


@pytest.fixture(scope="module")
def models():
    return {mode: fathom.load(GOLDEN, simulate_quant=mode == "sim") for mode in ("plain", "sim")}


@pytest.mark.parametrize("mode", ["plain", "sim"])
def test_fathom_logits_equals_the_official_code(mode, golden, tmp_path):
    expected = golden[mode]
    ids, out = tmp_path / "ids.npy", tmp_path / "out.npz"
    np.save(ids, expected["input_ids"])
    command = ["logits", str(GOLDEN), "--tokens", str(ids), "--out", str(out), "--streams", "--dtype", "fp32"]
    if mode == "plain":
        assert main(command) == 0
    else:
        # A rounding that falls the other way is a step of the quantisation, so this is the program that people run,
        # compiled with LLVM's optimisation, and not that of the other tests.
        command = [sys.executable, "-m", "fathom", *command, "--simulate-quant"]
        done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    written = np.load(out)
    names = {f"hidden_streams_{i}": f"hidden_streams_{i}" for i in range(LAYERS)}
    names |= {"logits": "logits", "mtp_logits": "mtp_logits_ids_rolled_left"}
    assert set(written.files) == set(names)
    for ours, theirs in names.items():
        assert written[ours].dtype == np.float32
        np.testing.assert_allclose(written[ours], expected[theirs], atol=2e-5, rtol=0, err_msg=ours)


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_simulated_quantisation_layer_by_layer(layer, golden, models):
    """From the golden layer's input, so that a rounding that falls the other way cannot spread."""
    expected = golden["sim"]
    model = models["sim"]
    tokens = jnp.asarray(expected["input_ids"])
    inputs = make_layer_inputs(model.config, tokens, make_documents(tokens, None, None))
    before = jnp.asarray(expected[f"hidden_streams_{layer - 1}"])
    after, _ = jax.jit(lambda s: model.layer(layer)(s, inputs))(before)
    np.testing.assert_allclose(after, expected[f"hidden_streams_{layer}"], atol=1e-3, rtol=0)
    plain, _ = jax.jit(lambda s: models["plain"].layer(layer)(s, inputs))(before)
    assert np.abs(plain - expected[f"hidden_streams_{layer}"]).max() > 1e-3  # the simulation matters


def test_gradients_of_the_cross_entropy(golden, models):
    expected, model = golden["plain"], models["plain"]
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    batch = {"tokens": jnp.asarray(expected["input_ids"])}

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return language_model_loss(model, batch, LossWeights(mtp=0.0, balance=0.0), count_targets(batch))

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(aux["loss/main"], expected["hf_ce_loss"], rtol=1e-6)
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}
    ours = {}
    for tensor in hub_tensors(model.config):
        if tensor.path in flat:
            ours[tensor.name] = tensor.to_hub(flat[tensor.path][tensor.index])
    theirs = {}
    for name in expected.files:
        if name.startswith("grad:"):
            theirs |= dict(native_arrays(name.removeprefix("grad:"), expected[name]))
    assert len(theirs) > 200
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(params)}
    tensors = [tensor for tensor in hub_tensors(model.config) if tensor.path in flat]
    weights = {tensor.name: tensor.to_hub(flat[tensor.path][tensor.index]) for tensor in tensors}
    assert too_far(ours, theirs, weights) == {}
    # What the reference gives no gradient gets exactly zero here: the indexer, and MTP at weight 0.
    for name in set(ours) - set(theirs):
        assert "indexer" in name or name.startswith("mtp."), name
        assert not np.any(ours[name]), name
