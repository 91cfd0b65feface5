"""V3.2's blocks against transformers, float32, forward and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v32.attention import (
    Attention,
    apply_rope_halves,
    main_frequencies,
    main_tables,
    make_layer_inputs,
)
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.hf_mapping import hub_arrays, hub_tensors
from fathom.models.deepseek_v32.model import make_ffn
from tests.models.small import FAST_COMPILE
from tests.parity.reference import randomize, relative, torch

modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
from transformers.models.deepseek_v32.configuration_deepseek_v32 import (  # noqa: E402
    DeepseekV32Config as HFConfig,
)

pytestmark = pytest.mark.reference
SEEDS = (0, 1, 2)
LENGTHS = (19, 75)  # below and above the top-k of 20, and above the 32 positions from which YaRN stretches


def small_config(**changes) -> DeepseekV32Config:
    """The tiny config with widths that all differ, three layers, and no MTP, which the reference lacks."""
    sizes = dict(
        hidden_size=96,
        intermediate_size=112,
        kv_lora_rank=40,
        nope_head_dim=24,
        value_head_dim=20,
        index_top_k=20,
        ffn_kinds=("dense", "moe", "moe"),
        num_experts_per_tok=3,
        rope_scaling=dataclasses.replace(
            DeepseekV32Config.tiny().rope_scaling, original_max_position_embeddings=32
        ),
        max_position_embeddings=1280,
        num_mtp_layers=0,
        vocab_size=131,
    )
    return dataclasses.replace(DeepseekV32Config.tiny(), **{**sizes, **changes})


def hf_config(config: DeepseekV32Config) -> HFConfig:
    """The reference's config of the same model, running its eager attention in float32."""
    reference = HFConfig(**config.to_hf_config())
    reference._attn_implementation = "eager"
    reference._experts_implementation = "eager"
    return reference


def randomize_all(module, seed: int) -> None:
    """`randomize`, and router biases large enough to change the selection and the groups."""
    randomize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.data = 1 + 0.2 * torch.randn(weight.shape, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def fill(module: nnx.Module, reference, config: DeepseekV32Config, hub: str, path: tuple) -> nnx.State:
    """The state of one of our modules, which sits at `path` of a layer, with the weights of the reference's."""
    by_name = {t.name: t for t in hub_tensors(config)}
    prefix = f"model.layers.{config.num_layers - 1}."
    state = nnx.state(module)
    flat = {p: np.zeros(v.get_value().shape, np.float32) for p, v in nnx.to_flat_state(state)}
    weights = dict(reference.named_parameters()) | dict(reference.named_buffers())
    for name, value in weights.items():
        for native, array in hub_arrays(f"{prefix}{hub}.{name}", value.detach().numpy()):
            tensor = by_name[native]
            place = tensor.path[tensor.path.index(path[0]) + 1 :]
            flat[place][tensor.index[1:]] = tensor.to_ours(array)
    values = {p: v.replace(jnp.asarray(flat[p])) for p, v in nnx.to_flat_state(state)}
    return nnx.from_flat_state(values)


def grads_by_name(state: nnx.State, reference, config: DeepseekV32Config, hub: str, path: tuple):
    """(name, our gradient, the reference's) of every parameter of a module."""
    by_name = {t.name: t for t in hub_tensors(config)}
    prefix = f"model.layers.{config.num_layers - 1}."
    flat = {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(state)}
    for name, weight in reference.named_parameters():
        value = np.zeros(weight.shape, np.float32) if weight.grad is None else weight.grad.numpy()
        for native, array in hub_arrays(f"{prefix}{hub}.{name}", value):
            tensor = by_name[native]
            place = tensor.path[tensor.path.index(path[0]) + 1 :]
            yield native, tensor.to_hub(flat[place][tensor.index[1:]]), array


def causal_mask(length: int):
    """The additive mask that the reference's attention takes."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, -1, -1)


@pytest.mark.parametrize("config", [DeepseekV32Config.v32(), small_config()], ids=["released", "small"])
def test_rope_and_yarn_tables_to_the_last_position(config):
    theirs = modeling.DeepseekV32RotaryEmbedding(hf_config(config))
    # One ulp: the reference divides by the product of factor and power, ours by one after the other, which is the same
    # only for factors that are powers of two. At the last position that is 6e-7 radians.
    np.testing.assert_allclose(main_frequencies(config), theirs.inv_freq.numpy(), rtol=1.2e-7, atol=0)
    positions = [p for p in (0, 1, 31, 4095, 4096, 163839) if p < config.max_position_embeddings]
    cos, sin = theirs(torch.zeros(1), torch.tensor([positions]))
    half = config.rope_head_dim // 2
    ours = main_tables(config, jnp.array([positions]))
    np.testing.assert_allclose(ours[0], cos.numpy()[..., :half], atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours[1], sin.numpy()[..., :half], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mscale", [(1.0, 1.0), (0.707, 1.3)])
def test_mscale_of_tables_and_of_the_softmax(mscale):
    yarn = dataclasses.replace(small_config().rope_scaling, mscale=mscale[0], mscale_all_dim=mscale[1])
    config = small_config(rope_scaling=yarn)
    theirs = modeling.DeepseekV32Attention(hf_config(config), 0)
    assert config.softmax_scale == pytest.approx(theirs.scaling, rel=1e-12)
    rotary = modeling.DeepseekV32RotaryEmbedding(hf_config(config))
    assert config.rope_amplitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
    cos, _ = rotary(torch.zeros(1), torch.arange(9)[None])
    ours, _ = main_tables(config, jnp.arange(9)[None])
    np.testing.assert_allclose(ours, cos.numpy()[..., : config.rope_head_dim // 2], rtol=1e-6)
    plain = dataclasses.replace(config, rope_scaling=None)
    assert plain.softmax_scale == (config.nope_head_dim + config.rope_head_dim) ** -0.5


def test_released_softmax_scale():
    # 192^-0.5 (0.1 ln 40 + 1)^2
    assert DeepseekV32Config.v32().softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_indexer_rope_turns_leading_halves(seed):
    torch.manual_seed(seed)
    x, angles = torch.randn(2, 11, 3, 24), torch.randn(2, 11, 4)
    doubled = torch.cat([angles, angles], dim=-1)
    theirs, _ = modeling.apply_rotary_pos_emb(x[..., :8], x[..., :8], doubled.cos(), doubled.sin(), unsqueeze_dim=2)
    tables = (jnp.cos(jnp.asarray(angles))[:, :, None], jnp.sin(jnp.asarray(angles))[:, :, None])
    ours = apply_rope_halves(jnp.asarray(x), tables)
    assert relative(ours[..., :8], theirs) < 1e-6
    np.testing.assert_array_equal(ours[..., 8:], x[..., 8:])


def attention_pair(seed: int, length: int):
    """The reference's attention with random weights, its inputs, and the same weights as our state."""
    config = small_config()
    theirs = modeling.DeepseekV32Attention(hf_config(config), 0)
    randomize_all(theirs, seed)
    torch.manual_seed(seed)
    x = torch.randn(2, length, config.hidden_size, requires_grad=True)
    rope = modeling.DeepseekV32RotaryEmbedding(hf_config(config))(x, torch.arange(length)[None])
    ours = nnx.eval_shape(lambda: Attention(nnx.Rngs(0), config, ComputeOptions(dtype="float32")))
    return config, theirs, x, rope, fill(ours, theirs, config, "self_attn", ("attn",))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_indexer_scores_and_selection(seed, length):
    config, theirs, x, rope, state = attention_pair(seed, length)
    seen = {}

    def keep(scores, keep, dim):
        seen["scores"] = scores
        return topk(scores, keep, dim=dim)

    topk = torch.Tensor.topk
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", keep)
        qr = theirs.q_a_layernorm(theirs.q_a_proj(x))
        indices = theirs.indexer(x, qr, rope, causal_mask(length)[:, 0], None)
    attention = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: Attention(nnx.Rngs(0), config, ComputeOptions(dtype="float32"))))[0], state
    )
    x, qr = jnp.asarray(x.detach()), jnp.asarray(qr)
    inputs = make_layer_inputs(config, x[..., 0].astype(jnp.int32), make_documents(x[..., 0], None, None))
    projections = attention.indexer.project(x, qr, inputs)
    products = np.maximum(np.einsum("bsnh,beh->bsne", projections.q_BSNH, projections.k_BEH), 0)
    scores = np.einsum("bsne,bsn->bse", products, projections.weights_BSN)
    causal = np.tril(np.ones((length, length), bool))
    assert relative(scores[:, causal], seen["scores"].numpy()[:, causal]) < 2e-6
    selection = attention.indexer(x, qr, inputs).selection
    if length <= config.index_top_k:
        assert type(selection).__name__ == "VisibleRange"
        return
    ours = np.asarray(selection.indices_BSK)
    for row in range(2):
        for query in range(length):
            # The reference fills up with tokens that its mask hides.
            want = {int(i) for i in indices[row, query] if i <= query}
            assert {int(i) for i in ours[row, query] if i >= 0} == want, (row, query)


@functools.cache
def compiled_attention(form: str, implementation: str):
    config = small_config()
    options = ComputeOptions(dtype="float32", query_chunk=32, mla_form=form, attention=implementation)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Attention(nnx.Rngs(0), config, options)))

    def run(state, x, cotangent):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)
        inputs = make_layer_inputs(config, tokens, make_documents(tokens, None, None))
        out, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x, inputs)[0], state, x)
        return out, *vjp(cotangent)

    return jax.jit(run, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize(
    ("form", "implementation", "length"),
    [("expanded", "masked", LENGTHS[1]), ("absorbed", "gathered", LENGTHS[1]), ("auto", "auto", LENGTHS[0])],
)
def test_attention_in_both_forms(form, implementation, length):
    for seed in SEEDS:
        config, theirs, x, rope, state = attention_pair(seed, length)
        cotangent = torch.randn(2, length, config.hidden_size)
        y, _ = theirs(x, rope, causal_mask(length))
        (y * cotangent).sum().backward()
        out, grads, grad_x = compiled_attention(form, implementation)(
            state, jnp.asarray(x.detach()), jnp.asarray(cotangent)
        )
        assert relative(out, y) < 5e-6
        assert relative(grad_x, x.grad) < 5e-6
        for name, mine, expected in grads_by_name(grads, theirs, config, "self_attn", ("attn",)):
            if ".indexer." in name:
                assert not mine.any() and not expected.any(), name
            else:
                assert np.linalg.norm(expected) > 1e-3, name
                assert relative(mine, expected) < 1e-5, name


@functools.cache
def compiled_ffn(kind: str):
    config = small_config()
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_ffn(nnx.Rngs(0), config, kind, "float32")))

    def run(state, x, cotangent):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)

        def forward(state, x):
            module = nnx.merge(graphdef, state)
            return module(x) if kind == "dense" else module(x, tokens)[0]

        routing = None if kind == "dense" else nnx.merge(graphdef, state).router(x, tokens)
        out, vjp = jax.vjp(forward, state, x)
        return out, *vjp(cotangent), routing

    return jax.jit(run, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_router_dense_and_moe_layer(kind, seed):
    config = small_config()
    reference = hf_config(config)
    theirs = modeling.DeepseekV32MLP(reference) if kind == "dense" else modeling.DeepseekV32MoE(reference)
    randomize_all(theirs, seed)
    ours = nnx.eval_shape(lambda: make_ffn(nnx.Rngs(0), config, kind, "float32"))
    # `fill` looks a module up in the last layer; a dense one needs a model that ends with it.
    last = dataclasses.replace(config, ffn_kinds=(*config.ffn_kinds, kind)) if kind == "dense" else config
    state = fill(ours, theirs, last, "mlp", ("ffn",))
    torch.manual_seed(seed)
    x = torch.randn(2, 37, config.hidden_size, requires_grad=True)
    cotangent = torch.randn_like(x)
    y = theirs(x)
    (y * cotangent).sum().backward()
    out, grads, grad_x, routing = compiled_ffn(kind)(state, jnp.asarray(x.detach()), jnp.asarray(cotangent))
    assert relative(out, y) < 2e-6
    assert relative(grad_x, x.grad) < 5e-6
    for name, mine, expected in grads_by_name(grads, theirs, last, "mlp", ("ffn",)):
        assert np.linalg.norm(expected) > 1e-3 or not mine.any(), name
        assert relative(mine, expected) < 1e-5, name
    if kind == "moe":
        with torch.no_grad():
            _, weights, indices = (part.numpy() for part in theirs.gate(x))
        mine, order = np.asarray(routing.indices_BSK).reshape(-1, 3), np.argsort(indices, axis=1)
        own = np.argsort(mine, axis=1)
        np.testing.assert_array_equal(np.take_along_axis(mine, own, 1), np.take_along_axis(indices, order, 1))
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(routing.weights_BSK).reshape(-1, 3), own, 1),
            np.take_along_axis(weights, order, 1),
            rtol=1e-5,
        )
        # The bias and the groups decide: neither plain scores nor ungrouped ones would select the same.
        scores = np.asarray(routing.scores_BSE).reshape(-1, config.num_experts)
        biased = scores + theirs.gate.e_score_correction_bias.numpy()
        for values in (scores, biased):
            other = np.sort(np.argsort(-values, axis=1)[:, :3], axis=1)
            assert (other != np.sort(mine, axis=1)).any()
