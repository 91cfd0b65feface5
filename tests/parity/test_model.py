"""Top of the parity ladder: whole layers and whole models against transformers, float32, three seeds.

The reference saves its weights with `save_pretrained`; `fathom.load` reads that folder. Logits within 2e-5 absolute,
every parameter's gradient of the cross-entropy within the limits of `gradients.py`. The length is no multiple of any
ratio, the indexer selects 6 of up to 31 entries, HCA has several blocks, the clamp and YaRN are active.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fathom
from fathom.layers.documents import make_documents
from fathom.layers.losses import LossWeights, count_targets, language_model_loss
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v4.attention import make_layer_inputs
from fathom.models.deepseek_v4.hf_mapping import hub_tensors, native_arrays
from fathom.models.deepseek_v4.model import make_block
from tests.parity.gradients import too_far
from tests.parity.reference import (
    causal_window_mask,
    double_precision,
    hf,
    hf_config,
    randomize,
    relative,
    small_config,
    torch,
)

# In one worker, which compiles each schedule and layer once for all seeds.
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("v4 parity")]
LENGTH = 125
SEEDS = (0, 1, 2)
SCHEDULES = {
    # unrolled layers of every kind, hash and learned
    "unrolled": dict(kinds="sliding csa hca".split(), ratios=(0, 4, 16), routers=("hash", "hash", "learned")),
    # a prefix, a scanned unit and a suffix; another CSA ratio
    "scanned": dict(
        kinds="sliding hca csa hca csa hca".split(),
        ratios=(0, 8, 2, 8, 2, 8),
        routers=("hash", *["learned"] * 5),
    ),
}


@functools.cache
def config_of(schedule: str):
    chosen = SCHEDULES[schedule]
    return small_config(
        attention_kinds=tuple(chosen["kinds"]),
        compress_ratios=chosen["ratios"],
        router_kinds=chosen["routers"],
        hidden_size=96,
        sliding_window=20,
        index_top_k=6,
        # About 2% of the activations are clamped. At a limit that clamps half of them, one in some hundred thousand
        # lies within a rounding of the corner, where the gradient jumps and no two programs agree.
        swiglu_limit=2.5,
        num_mtp_layers=0,
        vocab_size=131,
    )


def reference_model(schedule: str, seed: int):
    config = config_of(schedule)
    model = hf.DeepseekV4ForCausalLM(hf_config(config))
    randomize(model, seed)
    # Logits of trained size: the head's rows of unit norm would make them ten times larger.
    model.lm_head.weight.data *= 0.3
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            rows = [torch.randperm(config.num_experts, generator=generator) for _ in range(len(buffer))]
            buffer.copy_(torch.stack(rows)[:, : buffer.shape[1]])
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def reference_gradients(model, ids):
    """The reference's output, and its gradients by native name; zero where it has none (the indexer)."""
    model.zero_grad(set_to_none=True)
    ids = torch.from_numpy(ids)
    out = model(ids, labels=ids)
    out.loss.backward()
    gradients = {}
    for name, weight in model.named_parameters():
        value = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients |= {key: part.copy() for key, part in native_arrays(name, value.numpy())}
    return out, gradients


def native_weights(model) -> dict[str, np.ndarray]:
    """Weights by native name."""
    named = [(name, weight.detach().numpy()) for name, weight in model.named_parameters()]
    return {key: part.copy() for name, value in named for key, part in native_arrays(name, value)}


@functools.cache
def compiled(schedule: str):
    """Forward and gradients for any weights of a schedule, compiled once."""
    config = config_of(schedule)
    spec = fathom.zoo.get("deepseek-v4-tiny").with_config(config)
    options = ComputeOptions(dtype="float32", query_chunk=48)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options)))

    def run(params, rest, tokens):
        batch = {"tokens": tokens}

        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            weights = LossWeights(mtp=0.0, balance=0.0)
            return language_model_loss(model, batch, weights, count_targets(batch))[0]

        logits = nnx.merge(graphdef, params, rest)(tokens).logits
        return logits, *jax.value_and_grad(loss)(params)

    return jax.jit(run)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", SEEDS)
def test_whole_model(schedule, seed, tmp_path):
    config = config_of(schedule)
    theirs = reference_model(schedule, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, LENGTH))
    theirs.save_pretrained(tmp_path)
    out, _ = reference_gradients(theirs, ids)
    weights = native_weights(theirs)
    with double_precision():
        _, exact = reference_gradients(theirs.double(), ids)

    ours = fathom.load(tmp_path)
    _, params, rest = nnx.split(ours, nnx.Param, ...)
    logits, loss, grads = compiled(schedule)(params, rest, jnp.asarray(ids))
    assert np.abs(logits).max() > 1  # an absolute tolerance means something
    np.testing.assert_allclose(logits, out.logits.detach(), atol=2e-5, rtol=0)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-6)

    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}
    mine = {t.name: t.to_hub(flat[t.path][t.index]) for t in hub_tensors(ours.config) if t.path in flat}
    assert set(mine) == set(exact) and len(exact) > 100
    assert too_far(mine, exact, weights) == {}


@functools.cache
def compiled_layer(index: int):
    """(weights, streams, cotangent, inputs) -> (streams after, gradient of streams), compiled once for all seeds."""
    config, options = config_of("unrolled"), ComputeOptions(dtype="float32")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_block(nnx.Rngs(0), config, options, index)))

    def run(state, streams, cotangent, inputs):
        out, vjp = jax.vjp(lambda x: nnx.merge(graphdef, state)(x, inputs)[0], streams)
        return out, vjp(cotangent)[0]

    return jax.jit(run)


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_layer(seed, tmp_path):
    """One decoder layer of each kind alone, streams in and streams out, with gradients of the streams."""
    config = config_of("unrolled")
    theirs = reference_model("unrolled", seed)
    theirs.save_pretrained(tmp_path)
    ours = fathom.load(tmp_path)
    torch.manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (2, LENGTH))
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    blank = torch.zeros(2, LENGTH, config.hidden_size)
    rope = {k: theirs.model.rotary_emb(blank, positions, layer_type=k) for k in ("main", "compress")}
    mask = causal_window_mask(LENGTH, config.sliding_window, 2)
    tokens = jnp.asarray(ids)
    inputs = make_layer_inputs(config, tokens, make_documents(tokens, None, None))
    for index, layer in enumerate(theirs.model.layers):
        streams = torch.randn(2, LENGTH, config.hc_mult, config.hidden_size, requires_grad=True)
        cotangent = torch.randn_like(streams)
        y = layer(
            streams, input_ids=ids, position_embeddings=rope, position_ids=positions, attention_mask=mask
        )
        (y * cotangent).sum().backward()
        run = compiled_layer(index)
        state = nnx.state(ours.layer(index))
        out, grad = run(state, jnp.asarray(streams.detach()), jnp.asarray(cotangent), inputs)
        assert relative(out, y) < 5e-6, index
        assert relative(grad, streams.grad) < 5e-6, index
