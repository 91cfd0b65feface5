"""The loss that trains V4's indexers: against the formula in float64, and who learns from which loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.norms import rms_normalize
from fathom.layers.rope import apply_rope
from fathom.models.deepseek_v4.attention import Attention, LayerInputs, make_layer_inputs
from fathom.ops.indexer import indexer_scores
from tests.models.small import FP32, packed_rows, random_model, small_config, small_spec, value_and_grads

LENGTH = 75
ROWS = [(31, 44), (60, 7)]  # documents at offsets that no ratio divides, and padding
CONFIG = small_config(("sliding", "csa", "hca"))


def by_formula(layer: Attention, x, inputs: LayerInputs, warm: bool) -> float:
    """Sum over queries in float64, from the layer's own queries, entries and index projections."""
    c, rope = layer.config, inputs.rope["compress"]
    qr = layer.q_norm(layer.wq_a.contract("bsd,dr->bsr", x))
    q = rms_normalize(layer.wq_b.contract("bsr,rnh->bsnh", qr), c.rms_norm_eps)
    q = apply_rope(q, tuple(table[:, :, None] for table in rope))
    kv = apply_rope(layer.kv_norm(layer.wkv.contract("bsd,dh->bsh", x)), rope)
    windows = inputs.windows[layer.ratio]
    entries = apply_rope(layer.compressor(x, windows), inputs.entry_rope[layer.ratio])
    index = indexer_scores(*layer.indexer.project(x, qr, inputs))
    q, kv, entries, index, sink = (np.asarray(a, np.float64) for a in (q, kv, entries, index, layer.sink[...]))
    begin, end = np.asarray(windows.begin_BS), np.asarray(windows.end_BS)
    band = np.asarray(inputs.documents.band(c.sliding_window))
    total, scale = 0.0, c.head_dim**-0.5
    for b, s in np.ndindex(*begin.shape):
        seen = np.arange(begin[b, s], min(end[b, s], entries.shape[1]))
        if not warm:
            best = np.argsort(-index[b, s, seen], kind="stable")[: c.index_top_k]
            attended = seen[best]
        else:
            attended = seen
        if not attended.size:
            continue
        near = kv[b, s + 1 - band[b, s] : s + 1]
        p = np.zeros(attended.size)
        for n in range(c.num_heads):
            weights = np.exp(scale * entries[b, attended] @ q[b, s, n])
            denominator = weights.sum() + np.exp(scale * near @ q[b, s, n]).sum() + np.exp(sink[n])
            p += weights / denominator
        p /= p.sum()
        logits = index[b, s, attended]
        log_q = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        total += float(np.sum(p * (np.log(p) - log_q)))
    return total


@pytest.mark.parametrize("stage", ["indexer-warmup", "sparse"])
def test_the_layers_loss_is_the_formulas(stage):
    options = dataclasses.replace(FP32, stage=stage, indexer_loss=True)
    layer = nnx.merge(*random_model(CONFIG, options, seed=1)).layer(1).attn
    batch = packed_rows(ROWS, LENGTH, CONFIG.vocab_size)
    documents = make_documents(*(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segment_ids")))
    inputs = make_layer_inputs(CONFIG, jnp.asarray(batch["tokens"]), documents)
    x = jax.random.normal(jax.random.key(0), (len(ROWS), LENGTH, CONFIG.hidden_size))
    expected = by_formula(layer, x, inputs, warm=stage == "indexer-warmup")
    assert expected > 1
    assert float(layer(x, inputs)[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", ["indexer-warmup", "sparse"])
def test_the_indexers_loss_reaches_the_indexers_alone(stage):
    batch = packed_rows(ROWS, LENGTH, CONFIG.vocab_size)
    options = dataclasses.replace(FP32, stage=stage, indexer_loss=True)
    graphdef, params, rest = random_model(CONFIG, options)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return model.features(batch["tokens"], batch["positions"], batch["segment_ids"]).aux["indexer"]

    for path, grad in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.asarray(grad.get_value()).any() == ("indexer" in path), path


def test_the_models_loss_reaches_everything_else_and_adds_the_indexers():
    batch = packed_rows(ROWS, LENGTH, CONFIG.vocab_size)
    graphdef, params, rest = random_model(CONFIG, FP32)
    (plain, _), grads = jax.jit(value_and_grads(CONFIG))(params, rest, batch)
    for path, grad in nnx.to_flat_state(grads):
        assert np.asarray(grad.get_value()).any() == ("indexer" not in path), path
    graphdef, *_ = random_model(CONFIG, dataclasses.replace(FP32, indexer_loss=True))

    @jax.jit
    def loss(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        weights = LossWeights(mtp=0.3, balance=1e-2, indexer=0.5)
        return small_spec(CONFIG).loss(model, batch, weights, count_targets(batch))

    total, aux = loss(params, rest, batch)
    assert aux["loss/indexer"] > 0
    np.testing.assert_allclose(total, plain + 0.5 * aux["loss/indexer"], rtol=1e-6)
