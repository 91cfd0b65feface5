"""The lower rungs of the parity ladder against transformers, float32, forward and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.hyper_connections import HyperConnection, HyperHead, collapse, expand
from fathom.layers.norms import RMSNorm, rms_normalize
from fathom.layers.options import ComputeOptions
from fathom.layers.rope import apply_rope, rope_frequencies, rope_tables
from fathom.models.deepseek_v4.attention import (
    Attention,
    compressed_frequencies,
    make_layer_inputs,
)
from fathom.models.deepseek_v4.config import DeepseekV4Config
from tests.parity.reference import (
    causal_window_mask,
    copy,
    hf,
    hf_config,
    randomize,
    relative,
    small_config,
    torch,
)

pytestmark = pytest.mark.reference
SEEDS = (0, 1, 2)
POSITIONS = (0, 1, 127, 65535, 65536, 1048575)
FP32 = ComputeOptions(dtype="float32", query_chunk=64)


@pytest.mark.parametrize("seed", SEEDS)
def test_rms_norm(seed):
    torch.manual_seed(seed)
    theirs = hf.DeepseekV4RMSNorm(67)
    randomize(theirs, seed)
    theirs.weight.data = torch.randn(67)
    x = torch.randn(3, 5, 67, requires_grad=True)
    cotangent = torch.randn(3, 5, 67)
    y = theirs(x)
    (y * cotangent).sum().backward()
    ours = RMSNorm(nnx.Rngs(0), 67, eps=1e-6)
    copy(ours.weight, theirs.weight)
    graphdef, state = nnx.split(ours)
    y_ours, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.asarray(x.detach()))
    grads, grad_x = vjp(jnp.asarray(cotangent))
    assert relative(y_ours, y) < 1e-6
    assert relative(grads["weight"][...], theirs.weight.grad) < 1e-6
    assert relative(grad_x, x.grad) < 1e-6
    bare = hf.DeepseekV4UnweightedRMSNorm()(x)
    assert relative(rms_normalize(jnp.asarray(x.detach()), 1e-6), bare) < 1e-6


@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
def test_rope_and_yarn_tables_to_the_last_position(name):
    config = getattr(DeepseekV4Config, name)()
    theirs = hf.DeepseekV4RotaryEmbedding(hf_config(config))
    positions = [p for p in POSITIONS if p < config.max_position_embeddings]
    mine = {
        "main": rope_frequencies(config.rope_head_dim, config.rope_theta),
        "compress": compressed_frequencies(config),
    }
    for kind, frequencies in mine.items():
        expected = getattr(theirs, f"{kind}_inv_freq").numpy()
        # One ulp of a frequency is 0.06 radians at the last position, so the bits must be the same.
        np.testing.assert_array_equal(frequencies, expected)
        cos, sin = theirs(torch.zeros(1), torch.tensor([positions]), layer_type=kind)
        cos_ours, sin_ours = rope_tables(jnp.array([positions]), frequencies)
        np.testing.assert_allclose(cos_ours, cos.numpy(), atol=2e-7, rtol=0)
        np.testing.assert_allclose(sin_ours, sin.numpy(), atol=2e-7, rtol=0)


def test_yarn_ramp_is_that_of_the_release():
    config = DeepseekV4Config.flash()
    plain = rope_frequencies(64, 160000.0)
    ratio = plain / compressed_frequencies(config)
    assert np.all(ratio[:16] == 1) and ratio[16] > 1  # low = 15
    assert np.all(np.abs(ratio[25:] - 16) < 1e-5) and ratio[24] < 16  # high = 25


@pytest.mark.parametrize("seed", SEEDS)
def test_apply_rope_turns_trailing_interleaved_pairs(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 11, 24)
    angles = torch.randn(2, 11, 4)
    theirs = hf.apply_rotary_pos_emb(x, angles.cos(), angles.sin())
    tables = (jnp.cos(jnp.asarray(angles))[:, None], jnp.sin(jnp.asarray(angles))[:, None])
    ours = apply_rope(jnp.asarray(x), tables)
    assert relative(ours, theirs) < 1e-6
    assert relative(apply_rope(ours, tables, inverse=True), x) < 1e-6


def _connection(config: DeepseekV4Config) -> HyperConnection:
    return HyperConnection(
        nnx.Rngs(0),
        num_streams=config.hc_mult,
        hidden_size=config.hidden_size,
        iterations=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        stddev=0.02,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_hyper_connection(seed):
    config = small_config()
    theirs = hf.DeepseekV4HyperConnection(hf_config(config))
    randomize(theirs, seed)
    torch.manual_seed(seed)
    streams = torch.randn(2, 13, config.hc_mult, config.hidden_size, requires_grad=True)
    sublayer = torch.randn(2, 13, config.hidden_size)
    cotangent = torch.randn(2, 13, config.hc_mult, config.hidden_size)
    post, comb, collapsed = theirs(streams)
    # As the reference's decoder layer writes the streams back.
    new = post.unsqueeze(-1) * (sublayer * collapsed).unsqueeze(-2)
    new = new + torch.matmul(comb.transpose(-1, -2), streams)
    (new * cotangent).sum().backward()

    ours = _connection(config)
    for name in ("fn", "base", "scale"):
        copy(getattr(ours, name), getattr(theirs, name))
    graphdef, state = nnx.split(ours)

    def forward(state, streams):
        mixing = nnx.merge(graphdef, state)(streams)
        x = collapse(mixing.pre_nBS, streams)
        return expand(mixing, jnp.asarray(sublayer) * x, streams), (x, mixing)

    out, vjp, (x, mixing) = jax.vjp(forward, state, jnp.asarray(streams.detach()), has_aux=True)
    grads, grad_streams = vjp(jnp.asarray(cotangent))
    assert relative(x, collapsed) < 1e-6
    assert relative(jnp.moveaxis(mixing.post_nBS, 0, -1), post) < 1e-6
    assert relative(jnp.moveaxis(mixing.comb_nnBS, (0, 1), (2, 3)), comb) < 1e-6
    assert relative(out, new) < 1e-6
    assert relative(grad_streams, streams.grad) < 5e-6
    for name in ("fn", "base", "scale"):
        assert relative(grads[name][...], getattr(theirs, name).grad) < 1e-5, name


def test_the_mixing_matrix_is_used_transposed():
    """comb[i, j] carries old stream i into new stream j; the other direction is visibly different."""
    config = small_config()
    ours = _connection(config)
    streams = jax.random.normal(jax.random.key(0), (1, 3, 4, config.hidden_size))
    ours.scale[...] = jnp.full(3, 5.0)
    mixing = ours(streams)
    zero = jnp.zeros((1, 3, config.hidden_size))
    right = jnp.einsum("ijbs,bsid->bsjd", mixing.comb_nnBS, streams)
    wrong = jnp.einsum("jibs,bsid->bsjd", mixing.comb_nnBS, streams)
    out = expand(mixing, zero, streams)
    assert relative(out, right) < 1e-6
    assert relative(out, wrong) > 1e-2
    np.testing.assert_allclose(mixing.comb_nnBS.sum(0), 1, atol=1e-5)
    # Rows were normalised one step before the columns; with logits this spread they are still converging.
    np.testing.assert_allclose(mixing.comb_nnBS.sum(1), 1, atol=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_hyper_head(seed):
    config = small_config()
    theirs = hf.DeepseekV4HyperHead(hf_config(config))
    randomize(theirs, seed)
    torch.manual_seed(seed)
    streams = torch.randn(2, 9, config.hc_mult, config.hidden_size, requires_grad=True)
    cotangent = torch.randn(2, 9, config.hidden_size)
    y = theirs(streams)
    (y * cotangent).sum().backward()
    ours = HyperHead(
        nnx.Rngs(0), num_streams=4, hidden_size=config.hidden_size, eps=1e-6, norm_eps=1e-6, stddev=0.02
    )
    for name in ("fn", "base", "scale"):
        copy(getattr(ours, name), getattr(theirs, f"hc_{name}"))
    graphdef, state = nnx.split(ours)
    out, vjp = jax.vjp(
        lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.asarray(streams.detach())
    )
    grads, grad_streams = vjp(jnp.asarray(cotangent))
    assert relative(out, y) < 1e-6
    assert relative(grad_streams, streams.grad) < 5e-6
    for name in ("fn", "base", "scale"):
        assert relative(grads[name][...], getattr(theirs, f"hc_{name}").grad) < 1e-5, name


def _copy_attention(ours: Attention, theirs) -> list[tuple[str, object, object, bool]]:
    """Copies the weights and lists (name, our path, their parameter, transposed) for the gradients."""
    pairs = [
        ("wq_a/weight", theirs.q_a_proj.weight, True),
        ("q_norm/weight", theirs.q_a_norm.weight, False),
        ("wq_b/weight", theirs.q_b_proj.weight, True),
        ("wkv/weight", theirs.kv_proj.weight, True),
        ("kv_norm/weight", theirs.kv_norm.weight, False),
        ("sink", theirs.sinks, False),
        ("wo_b/weight", theirs.o_b_proj.weight, True),
    ]

    def compressor(prefix, module):
        return [
            (f"{prefix}/wkv/weight", module.kv_proj.weight, True),
            (f"{prefix}/wgate/weight", module.gate_proj.weight, True),
            (f"{prefix}/ape", module.position_bias, False),
            (f"{prefix}/norm/weight", module.kv_norm.weight, False),
        ]

    if ours.kind != "sliding":
        pairs += compressor("compressor", theirs.compressor)
    if ours.kind == "csa":
        indexer = theirs.compressor.indexer
        pairs += compressor("indexer/compressor", indexer)
        pairs += [
            ("indexer/wq_b/weight", indexer.q_b_proj.weight, True),
            ("indexer/weights_proj/weight", indexer.scorer.weights_proj.weight, True),
        ]
    for path, tensor, transpose in pairs:
        variable = ours
        for part in path.split("/"):
            variable = getattr(variable, part)
        copy(variable, tensor, transpose)
    groups, latent = ours.config.o_groups, ours.config.o_lora_rank
    grouped = theirs.o_a_proj.weight.view(groups, latent, -1).transpose(1, 2)
    copy(ours.wo_a.weight, grouped)
    return pairs


CASES = [
    # kind, ratio, length: never a multiple of the ratio; CSA selects 16 of 50 or more; HCA has several blocks
    ("sliding", 0, 101),
    ("csa", 4, 203),
    ("csa", 4, 50),  # every visible entry selected
    ("csa", 2, 131),
    ("hca", 16, 203),
    ("hca", 128, 389),
    ("hca", 128, 101),  # no entry closes
]


VERSIONS = [("reference", False), ("masked", False), ("gathered", True)]


def _config(kind: str, ratio: int) -> DeepseekV4Config:
    csa, hca = (ratio if kind == "csa" else 4), (ratio if kind == "hca" else 16)
    return small_config(
        attention_kinds=("sliding", "csa", "hca"),
        compress_ratios=(0, csa, hca),
        router_kinds=("learned",) * 3,
    )


@functools.cache
def _forward_and_gradients(kind, ratio, length, implementation, packed):
    """Compiled once for all seeds: (state, x, cotangent) -> (output, state gradients, x gradient)."""
    config = _config(kind, ratio)
    options = dataclasses.replace(FP32, attention=implementation)
    graphdef, _ = nnx.split(Attention(nnx.Rngs(0), config, kind, ratio, options))

    def run(state, x, cotangent):
        tokens = jnp.zeros((2, length), jnp.int32)
        layout = (None, None)
        if packed:  # the general path, given one document per row
            layout = (jnp.broadcast_to(jnp.arange(length), (2, length)), tokens + 1)
        inputs = make_layer_inputs(config, tokens, make_documents(tokens, *layout))
        out, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x, inputs)[0], state, x)
        return out, *vjp(cotangent)

    return jax.jit(run)


@pytest.mark.parametrize(("kind", "ratio", "length"), CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_attention(kind, ratio, length, seed):
    config = _config(kind, ratio)
    reference_config = hf_config(config)
    theirs = hf.DeepseekV4Attention(reference_config, ("sliding", "csa", "hca").index(kind))
    randomize(theirs, seed)
    torch.manual_seed(100 + seed)
    x = torch.randn(2, length, config.hidden_size, requires_grad=True)
    positions = torch.arange(length)[None].expand(2, -1)
    rotary = hf.DeepseekV4RotaryEmbedding(reference_config)
    rope = {k: rotary(x, positions, layer_type=k) for k in ("main", "compress")}
    mask = causal_window_mask(length, config.sliding_window, 2)
    y, _ = theirs(x, rope, positions, mask)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()

    ours = Attention(nnx.Rngs(0), config, kind, ratio, FP32)
    pairs = _copy_attention(ours, theirs)
    state = nnx.state(ours)
    for version in VERSIONS:
        run = _forward_and_gradients(kind, ratio, length, *version)
        out, grads, grad_x = run(state, jnp.asarray(x.detach()), jnp.asarray(cotangent))
        assert relative(out, y) < 5e-6, version
        assert relative(grad_x, x.grad) < 5e-6, version
        for path, tensor, transpose in pairs:
            mine = functools.reduce(lambda node, part: node[part], path.split("/"), grads)[...]
            if tensor.grad is None:  # the indexer: selection has no gradient
                assert not np.any(mine), (path, version)
                continue
            expected = tensor.grad.T if transpose else tensor.grad
            assert relative(mine, expected) < 1e-5, (path, version)
