"""Routers, experts and balance statistics against transformers and against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers.balance_loss import sequence_balance_loss
from fathom.layers.expert_rows import swiglu
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.param import HashTable, RouterBias
from fathom.layers.router import (
    HashRouter,
    LearnedRouter,
    Routing,
    balanced_hash_table,
    expert_load,
    sqrt_softplus,
)

B, S, D, F, E, K, V = 2, 37, 48, 40, 8, 3, 61
SCALE, LIMIT = 2.5, 0.6
SEEDS = (0, 1, 2)
KINDS = ("learned", "hash")


def build(kind, seed, limit=LIMIT):
    rngs = nnx.Rngs(seed)
    common = dict(hidden_size=D, init_std=0.3)
    routing = dict(num_experts=E, top_k=K, scale=SCALE)
    if kind == "hash":
        router = HashRouter(rngs, vocab_size=V, **routing, **common)
    else:
        router = LearnedRouter(rngs, **routing, **common)
        # Large enough that selection by score alone would differ.
        router.bias[...] = jax.random.normal(jax.random.key(seed), (E,))
    experts = Experts(rngs, intermediate_size=F, num_experts=E, limit=limit, **common)
    return MoE(router, experts, SharedExpert(rngs, intermediate_size=F, limit=limit, **common))


def inputs(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, S, D)).astype(np.float32)
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    cotangent = rng.standard_normal((B, S, D)).astype(np.float32)
    return x, tokens, cotangent


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(want)


# Parity with transformers


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")


def reference_block(reference, model, kind):
    """The transformers block with the model's weights."""
    import torch
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        routed_scaling_factor=SCALE,
        swiglu_limit=LIMIT,
        vocab_size=V,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        mlp_layer_types=["hash_moe" if kind == "hash" else "moe"],
    )
    config._experts_implementation = "eager"
    block = reference.DeepseekV4SparseMoeBlock(config, 0).float()

    def tensor(value):
        return torch.from_numpy(np.array(value))

    experts, shared = model.experts, model.shared
    gate_up = jnp.concatenate([experts.w1[...], experts.w3[...]], axis=-1).mT
    state = {
        "gate.weight": tensor(model.router.weight[...].T),
        "experts.gate_up_proj": tensor(gate_up),
        "experts.down_proj": tensor(experts.w2[...].mT),
        "shared_experts.gate_proj.weight": tensor(shared.w1.weight[...].T),
        "shared_experts.up_proj.weight": tensor(shared.w3.weight[...].T),
        "shared_experts.down_proj.weight": tensor(shared.w2.weight[...].T),
    }
    if kind == "hash":
        state["gate.tid2eid"] = tensor(model.router.tid2eid[...]).long()
    else:
        state["gate.e_score_correction_bias"] = tensor(model.router.bias[...])
    block.load_state_dict(state, strict=True)
    return block


def reference_grads(block, x):
    """Our tree's gradients out of the torch module, in our layouts."""
    grad = {name: p.grad.numpy() for name, p in block.named_parameters()}
    gate_up = np.swapaxes(grad["experts.gate_up_proj"], 1, 2)
    return {
        "x": x.grad.numpy(),
        "router.weight": grad["gate.weight"].T,
        "experts.w1": gate_up[..., :F],
        "experts.w3": gate_up[..., F:],
        "experts.w2": np.swapaxes(grad["experts.down_proj"], 1, 2),
        "shared.w1": grad["shared_experts.gate_proj.weight"].T,
        "shared.w3": grad["shared_experts.up_proj.weight"].T,
        "shared.w2": grad["shared_experts.down_proj.weight"].T,
    }


def our_output_and_grads(model, x, tokens, cotangent):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        y, stats = nnx.merge(graph, params, rest)(x, tokens)
        return jnp.sum(y * cotangent), (y, stats)

    (_, (y, stats)), (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, x
    )
    return (
        y,
        stats,
        {
            "x": dx,
            "router.weight": grads["router"]["weight"][...],
            **{f"experts.{w}": grads["experts"][w][...] for w in ("w1", "w2", "w3")},
            **{f"shared.{w}": grads["shared"][w]["weight"][...] for w in ("w1", "w2", "w3")},
        },
    )


@pytest.mark.reference
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_transformers(reference, kind, seed):
    import torch

    model = build(kind, seed)
    x, tokens, cotangent = inputs(seed)
    y, stats, grads = our_output_and_grads(model, x, tokens, cotangent)

    block = reference_block(reference, model, kind)
    x_ref = torch.from_numpy(x).requires_grad_()
    y_ref = block(x_ref, torch.from_numpy(tokens).long())
    (y_ref * torch.from_numpy(cotangent)).sum().backward()

    assert relative(y, y_ref.detach().numpy()) < 1e-5
    want = reference_grads(block, x_ref)
    assert set(grads) == set(want)
    for name, value in want.items():
        assert np.linalg.norm(value) > 1e-3, f"{name}: nothing to compare"
        assert relative(grads[name], value) < 5e-5, name
    assert float(stats.load.sum()) == B * S * K
    assert (stats.balance is None) == (kind == "hash")


@pytest.mark.reference
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_router_equals_transformers(reference, kind, seed):
    import torch

    model = build(kind, seed)
    x, tokens, _ = inputs(seed)
    routing = jax.jit(model.router)(x, tokens)
    gate = reference_block(reference, model, kind).gate
    args = (torch.from_numpy(x), torch.from_numpy(tokens).long())[: 2 if kind == "hash" else 1]
    with torch.no_grad():
        logits, weights, indices = (t.numpy() for t in gate(*args))
    # The reference leaves the order of a token's experts open.
    order, ours = np.argsort(indices, 1), np.asarray(routing.indices_BSK).reshape(-1, K)
    our_order = np.argsort(ours, 1)
    np.testing.assert_array_equal(
        np.take_along_axis(ours, our_order, 1), np.take_along_axis(indices, order, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.weights_BSK).reshape(-1, K), our_order, 1),
        np.take_along_axis(weights, order, 1),
        rtol=1e-5,
    )
    scores = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
    np.testing.assert_allclose(routing.scores_BSE.reshape(-1, E), scores, rtol=1e-5)


# What the parity tests rely on


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cases_exercise_bias_and_clamp(seed):
    model, (x, tokens, _) = build("learned", seed), inputs(seed)
    routing = model.router(x, tokens)
    by_score = np.sort(np.asarray(jax.lax.top_k(routing.scores_BSE, K)[1]), -1)
    chosen = np.sort(np.asarray(routing.indices_BSK), -1)
    changed = np.mean(np.any(by_score != chosen, axis=-1))
    assert changed > 0.2
    # Each of the two paths clamps.
    free, args = build("learned", seed, limit=None), (x, routing.indices_BSK, routing.weights_BSK)
    assert relative(jax.jit(model.experts)(*args), jax.jit(free.experts)(*args)) > 0.1
    assert relative(model.shared(x), free.shared(x)) > 0.1


def test_clamp_is_one_sided_on_the_gate():
    gate, up = jnp.asarray([-50.0, -3.0, 3.0]), jnp.asarray([-3.0, 3.0, 0.5])
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    want = [silu(-50.0) * -2, silu(-3.0) * 2, silu(2.0) * 0.5]
    np.testing.assert_allclose(swiglu(gate, up, 2.0), want, rtol=1e-5)
    for off in (None, 0.0):
        np.testing.assert_allclose(swiglu(gate, up, off), silu(gate) * up, rtol=1e-5)


def test_weight_is_applied_before_the_down_projection():
    """In bfloat16 the two orders round differently; the released code weighs before w2."""
    model, (x, tokens, _) = build("learned", 0), inputs(0)
    x = jnp.asarray(x, jnp.bfloat16)
    routing = model.router(x, tokens)
    got = jax.jit(model.experts)(x, routing.indices_BSK, routing.weights_BSK)
    experts = model.experts

    def one(e):
        w1, w3, w2 = (w[...][e].astype(jnp.bfloat16) for w in (experts.w1, experts.w3, experts.w2))
        gate = jnp.dot(x, w1, preferred_element_type=jnp.float32)
        up = jnp.dot(x, w3, preferred_element_type=jnp.float32)
        hidden = jax.nn.silu(jnp.minimum(gate, LIMIT)) * jnp.clip(up, -LIMIT, LIMIT)
        share = jnp.where(routing.indices_BSK == e, routing.weights_BSK, 0).sum(-1)[..., None]
        down = lambda h: jnp.dot(  # noqa: E731
            h.astype(jnp.bfloat16), w2, preferred_element_type=jnp.float32
        )
        return down(hidden * share), down(hidden) * share

    before, after = (sum(parts) for parts in zip(*map(one, range(E)), strict=True))
    assert got.dtype == jnp.float32
    # A product that falls on a rounding boundary may round the other way.
    assert relative(got, before) < 1e-4 < 1e-3 < relative(got, after)


# Scores and selection


def test_sqrt_softplus_values_and_gradients():
    x = np.asarray([-300.0, -104.0, -50.0, -20.001, -19.999, -1.0, 0.0, 1.0, 30.0, 1e4])
    value, grad = jax.vmap(jax.value_and_grad(sqrt_softplus))(jnp.asarray(x, jnp.float32))
    want = np.sqrt(np.logaddexp(x, 0.0))
    np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-38)
    sigmoid = np.exp(-np.logaddexp(0.0, -x))
    np.testing.assert_allclose(grad, sigmoid / (2 * want), rtol=1e-5, atol=1e-38)


def test_router_is_float32_from_bfloat16_inputs():
    """Two experts whose logits differ by less than bfloat16 resolves are still told apart."""
    router = LearnedRouter(
        nnx.Rngs(0), hidden_size=2, num_experts=2, top_k=1, scale=1.0, init_std=1.0
    )
    router.weight[...] = jnp.asarray([[4.0, 4.0], [0.0, 2.0**-10]])
    routing = router(jnp.ones((1, 1, 2), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32))
    assert routing.scores_BSE.dtype == routing.weights_BSK.dtype == jnp.float32
    assert routing.indices_BSK.tolist() == [[[1]]]


def test_ties_go_to_the_lowest_expert_and_bias_never_weighs():
    router = LearnedRouter(
        nnx.Rngs(0), hidden_size=4, num_experts=6, top_k=2, scale=1.5, init_std=0.0
    )
    x, tokens = jnp.ones((1, 3, 4)), jnp.zeros((1, 3), jnp.int32)
    assert router(x, tokens).indices_BSK.tolist() == [[[0, 1]] * 3]
    router.bias[...] = jnp.asarray([0.0, 0.0, 5.0, 0.0, 5.0, 5.0])
    routing = router(x, tokens)
    assert routing.indices_BSK.tolist() == [[[2, 4]] * 3]
    np.testing.assert_allclose(routing.weights_BSK, 0.75)
    assert type(router.bias) is RouterBias and router.bias[...].dtype == jnp.float32


def test_bias_has_no_gradient():
    model, (x, tokens, _) = build("learned", 0), inputs(0)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(rest):
        y, stats = nnx.merge(graph, params, rest)(x, tokens)
        return jnp.sum(y) + stats.balance

    assert not np.any(np.asarray(jax.tree.leaves(jax.grad(loss)(rest))[0]))


def test_top_k_outside_the_number_of_experts_is_refused():
    common = dict(hidden_size=4, num_experts=6, scale=1.0, init_std=1.0)
    with pytest.raises(ValueError, match="found 7, expected 1 to num_experts = 6"):
        LearnedRouter(nnx.Rngs(0), top_k=7, **common)
    with pytest.raises(ValueError, match="found 0"):
        HashRouter(nnx.Rngs(0), top_k=0, vocab_size=9, **common)


# Hash tables


@pytest.mark.parametrize("vocab,top_k,experts", [(64, 2, 8), (61, 3, 8), (1000, 6, 256), (5, 4, 4)])
def test_hash_table_is_balanced_and_distinct(vocab, top_k, experts):
    table = np.asarray(balanced_hash_table(jax.random.key(0), vocab, top_k, experts))
    assert table.shape == (vocab, top_k) and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < experts
    assert all(len(set(row)) == top_k for row in table)
    # Whole runs use each expert exactly K times, the last partial run at most K times.
    count = np.bincount(table.ravel(), minlength=experts)
    runs = vocab // experts
    assert count.min() >= runs * top_k and count.max() <= -(-vocab // experts) * top_k


def test_hash_tables_differ_by_layer_and_build_abstractly():
    rngs = nnx.Rngs(0)
    args = dict(hidden_size=4, num_experts=8, top_k=2, scale=1.0, vocab_size=64, init_std=1.0)
    first, second = HashRouter(rngs, **args), HashRouter(rngs, **args)
    assert type(first.tid2eid) is HashTable
    assert np.mean(np.asarray(first.tid2eid[...]) != np.asarray(second.tid2eid[...])) > 0.5
    abstract = nnx.eval_shape(lambda: HashRouter(nnx.Rngs(0), **args))
    assert abstract.tid2eid.get_value().shape == (64, 2)
    inside_jit = jax.jit(lambda: nnx.state(HashRouter(nnx.Rngs(0), **args)))()
    np.testing.assert_array_equal(inside_jit["tid2eid"][...], first.tid2eid[...])


# Balance statistics


def numpy_balance(scores, indices, segments):
    """Sequence-wise balance loss per document, times the document's tokens, in float64."""
    total, num_experts, top_k = 0.0, scores.shape[-1], indices.shape[-1]
    for row in range(scores.shape[0]):
        start = 0
        while start < scores.shape[1]:
            end = start
            while end < scores.shape[1] and segments[row, end] == segments[row, start]:
                end += 1
            if segments[row, start] != 0:
                share = scores[row, start:end].astype(np.float64)
                share /= share.sum(-1, keepdims=True)
                tokens = end - start
                chosen = np.bincount(indices[row, start:end].ravel(), minlength=num_experts)
                f = num_experts / (top_k * tokens) * chosen
                total += tokens * np.sum(f * share.mean(0))
            start = end
    return total


PACKINGS = {
    "one document": [1] * S,
    "packed": [1] * 5 + [2] + [3] * 20 + [4] * 11,
    "padding at the end": [1] * 9 + [2] * 20 + [0] * 8,
    "padding between": [1] * 9 + [0] * 3 + [2] * 20 + [0] * 5,
    "ids not ascending": [4] * 9 + [2] * 20 + [7] * 8,
    "only padding": [0] * S,
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_balance_loss_equals_numpy(packing):
    model, (x, tokens, _) = build("learned", 1), inputs(1)
    routing = model.router(x, tokens)
    segments = np.asarray([PACKINGS[packing], [1] * 30 + [0] * 7], np.int32)
    got = jax.jit(sequence_balance_loss)(routing, jnp.asarray(segments))
    scores, indices = np.asarray(routing.scores_BSE), np.asarray(routing.indices_BSK)
    want = numpy_balance(scores, indices, segments)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    load = expert_load(routing.indices_BSK, segments > 0, E)
    np.testing.assert_array_equal(load, np.bincount(indices[segments > 0].ravel(), minlength=E))


def test_balance_loss_without_segments_and_at_balance():
    model, (x, tokens, _) = build("learned", 2), inputs(2)
    routing = model.router(x, tokens)
    ones = jnp.ones((B, S), jnp.int32)
    whole, packed = (sequence_balance_loss(routing, s) for s in (None, ones))
    np.testing.assert_allclose(whole, packed, rtol=1e-6)
    # Perfectly even choices cost exactly one per token whatever the scores.
    even = jnp.arange(8 * 2, dtype=jnp.int32).reshape(1, 8, 2) % 4
    scores = jax.random.uniform(jax.random.key(0), (1, 8, 4), minval=0.1)
    loss = sequence_balance_loss(Routing(even, jnp.ones((1, 8, 2)), scores), None)
    np.testing.assert_allclose(loss, 8.0, rtol=1e-6)


def test_balance_gradient_flows_through_scores_only():
    model, (x, tokens, _) = build("learned", 0), inputs(0)
    routing = model.router(x, tokens)
    segments = np.tile(np.asarray(PACKINGS["padding at the end"], np.int32), (B, 1))

    def loss(scores):
        return sequence_balance_loss(routing._replace(scores_BSE=scores), jnp.asarray(segments))

    got = np.asarray(jax.jit(jax.grad(loss))(routing.scores_BSE))
    assert not np.any(got[segments == 0])
    scores, indices = np.asarray(routing.scores_BSE, np.float64), np.asarray(routing.indices_BSK)
    want, step = np.zeros_like(scores), 1e-6
    for place in [(0, 0, 0), (0, 8, 3), (1, 9, 7), (1, 28, 2)]:
        for sign in (1, -1):
            moved = scores.copy()
            moved[place] += sign * step
            want[place] += sign * numpy_balance(moved, indices, segments) / (2 * step)
        np.testing.assert_allclose(got[place], want[place], rtol=1e-4, atol=1e-6)
