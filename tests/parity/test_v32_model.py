"""Top of V3.2's parity ladder: whole layers and whole models against transformers, float32, three seeds.

The reference saves its weights with `save_pretrained`; `fathom.load` reads that folder. Logits within 2e-5 absolute,
every parameter's gradient of the cross-entropy within 5e-5 relative L2; the indexer's is exactly zero in both.
"""

from __future__ import annotations

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fathom
from fathom.layers.documents import make_documents
from fathom.layers.losses import LossWeights, count_targets, language_model_loss
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v32.attention import make_layer_inputs
from fathom.models.deepseek_v32.hf_mapping import hub_arrays, hub_tensors
from fathom.models.deepseek_v32.model import make_block
from tests.models.small import FAST_COMPILE
from tests.parity.reference import relative, torch
from tests.parity.test_v32_blocks import (
    LENGTHS,
    causal_mask,
    hf_config,
    modeling,
    randomize_all,
    small_config,
)

pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("v32 parity")]
# Not seed 2: of its 150 queries one has two scores 7e-7 apart at the edge of its top-k, which rounding orders.
SEEDS = (0, 1, 3)


def reference_model(seed: int):
    model = modeling.DeepseekV32ForCausalLM(hf_config(small_config()))
    randomize_all(model, seed)
    # Logits of trained size: the head's rows of unit norm would make them ten times larger.
    model.lm_head.weight.data *= 0.3
    return model.eval()


@functools.cache
def pair(seed: int):
    """(the reference, the same weights as `fathom.load` reads them from the folder that it saves)."""
    theirs = reference_model(seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = fathom.load(folder)
    assert ours.config == small_config()
    return theirs, ours


@functools.cache
def compiled(attention: str):
    """Forward and gradients for any weights, compiled once per length."""
    config = small_config()
    spec = fathom.zoo.get("deepseek-v3.2-tiny").with_config(config)
    options = ComputeOptions(dtype="float32", query_chunk=32, attention=attention)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options)))

    def run(params, rest, tokens):
        batch = {"tokens": tokens}

        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            weights = LossWeights(mtp=0.0, balance=0.0)
            return language_model_loss(model, batch, weights, count_targets(batch))[0]

        logits = nnx.merge(graphdef, params, rest)(tokens).logits
        return logits, *jax.value_and_grad(loss)(params)

    return jax.jit(run, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_whole_model(seed, length):
    config, (theirs, ours) = small_config(), pair(seed)
    theirs.zero_grad(set_to_none=True)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    out = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    out.loss.backward()
    expected = {}
    for name, weight in theirs.named_parameters():
        value = torch.zeros_like(weight) if weight.grad is None else weight.grad
        expected |= {key: part for key, part in hub_arrays(name, value.numpy())}

    _, params, rest = nnx.split(ours, nnx.Param, ...)
    # Short: all at once, expanded, everything selected. Long: by chunks, absorbed, the 20 selected tokens gathered.
    attention = "auto" if length <= config.index_top_k else "gathered"
    logits, loss, grads = compiled(attention)(params, rest, jnp.asarray(ids))
    assert np.abs(logits).max() > 1  # an absolute tolerance means something
    np.testing.assert_allclose(logits, out.logits.detach(), atol=2e-5, rtol=0)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-6)
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}
    mine = {t.name: t.to_hub(flat[t.path][t.index]) for t in hub_tensors(config) if t.path in flat}
    assert set(mine) == set(expected) and len(expected) > 80
    for name, value in expected.items():
        if ".indexer." in name:
            assert not mine[name].any() and not value.any(), name
            continue
        error = relative(mine[name], value)
        assert error < 5e-5, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_layers(seed):
    """A dense layer and a layer with experts alone, hidden states in and out, with gradients of the states."""
    config, (theirs, ours), length = small_config(), pair(seed), LENGTHS[1]
    tokens = jnp.zeros((2, length), jnp.int32)
    inputs = make_layer_inputs(config, tokens, make_documents(tokens, None, None))
    rope = theirs.model.rotary_emb(torch.zeros(2, length, 1), torch.arange(length)[None])
    torch.manual_seed(seed)
    for index in (0, 2):
        x = torch.randn(2, length, config.hidden_size, requires_grad=True)
        cotangent = torch.randn_like(x)
        y = theirs.model.layers[index](x, attention_mask=causal_mask(length), position_embeddings=rope)
        (y * cotangent).sum().backward()
        state = nnx.state(ours.layer(index))
        out, grad = compiled_layer(index)(state, jnp.asarray(x.detach()), jnp.asarray(cotangent), inputs)
        assert relative(out, y) < 5e-6, index
        assert relative(grad, x.grad) < 5e-6, index


@functools.cache
def compiled_layer(index: int):
    config, options = small_config(), ComputeOptions(dtype="float32")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_block(nnx.Rngs(0), config, options, index)))

    def run(state, x, cotangent, inputs):
        out, vjp = jax.vjp(lambda x: nnx.merge(graphdef, state)(x, inputs)[0], x)
        return out, vjp(cotangent)[0]

    return jax.jit(run, compiler_options=FAST_COMPILE)
