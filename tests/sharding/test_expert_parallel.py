"""The MoE layer gives the same outputs, statistics and gradients on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from fathom.layers import moe
from fathom.layers.moe import Experts, MoE, SharedExpert
from fathom.layers.router import HashRouter, LearnedRouter
from fathom.mesh import (
    abstract_mesh,
    batch_sharding,
    make_mesh,
    partition_spec,
    sharding_scope,
    state_shardings,
)

RULES = {
    "embed": "fsdp",
    "expert": "expert",
    "expert_embed": "fsdp",
    "expert_mlp": "tensor",
    "mlp": "tensor",
    "router_experts": None,
    "hash_vocab": None,
    "act_batch": ("data", "fsdp", "expert"),
    "act_sequence": "context",
    "act_embed": None,
    "act_mlp": "tensor",
}
# Presets beyond the default one: experts over two axes that split tokens, expert width over an axis
# that splits tokens, and tokens whole over the expert axis.
RULES_TWO_AXES = {
    **RULES,
    "embed": None,
    "expert_embed": None,
    "expert": ("fsdp", "expert"),
    "act_batch": ("expert", "fsdp"),
}
RULES_WIDTH = {**RULES, "expert_mlp": "context", "mlp": "context"}
RULES_REPLICATED_TOKENS = {**RULES, "act_batch": ("data", "fsdp")}
MESHES = {
    "fsdp 8": ({"fsdp": 8}, RULES),
    "data 2 fsdp 4": ({"data": 2, "fsdp": 4}, RULES),
    "fsdp 2 expert 4": ({"fsdp": 2, "expert": 4}, RULES),
    "fsdp 4 tensor 2": ({"fsdp": 4, "tensor": 2}, RULES),
    "expert 8": ({"expert": 8}, RULES),
    "expert 2 context 2 fsdp 2": ({"expert": 2, "context": 2, "fsdp": 2}, RULES),
    "experts over two axes": ({"fsdp": 2, "expert": 4}, RULES_TWO_AXES),
    "width over context": ({"fsdp": 2, "expert": 2, "context": 2}, RULES_WIDTH),
    "tokens whole over expert": ({"data": 2, "expert": 4}, RULES_REPLICATED_TOKENS),
}
BATCH, LENGTH, HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB, LIMIT = 8, 12, 16, 24, 8, 3, 40, 0.5


def build(kind, implementation="auto", num_experts=EXPERTS):
    rngs = nnx.Rngs(3)
    sizes = dict(hidden_size=HIDDEN, init_std=0.4)
    routing = dict(num_experts=num_experts, top_k=TOP_K, scale=1.5)
    if kind == "hash":
        router = HashRouter(rngs, vocab_size=VOCAB, **routing, **sizes)
    else:
        router = LearnedRouter(rngs, **routing, **sizes)
        router.bias[...] = jnp.linspace(-0.5, 0.5, num_experts)
    experts = Experts(
        rngs,
        intermediate_size=WIDTH,
        num_experts=num_experts,
        limit=LIMIT,
        implementation=implementation,
        **sizes,
    )
    return MoE(router, experts, SharedExpert(rngs, intermediate_size=WIDTH, limit=LIMIT, **sizes))


def inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, LENGTH, HIDDEN)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 3, 0], [5, 1, 4, 2]).astype(np.int32), (BATCH, 1))
    segments[1] = 1
    return x, tokens, segments


@functools.cache
def value_and_grad(kind, implementation="auto"):
    """(model state, jit-able function of (params, rest, x, tokens, segments))."""
    graph, params, rest = nnx.split(build(kind, implementation), nnx.Param, ...)

    def loss(params, x, rest, tokens, segments):
        y, stats = nnx.merge(graph, params, rest)(x, tokens, segments)
        total = jnp.sum(jnp.sin(y))
        if stats.balance is not None:
            total = total + stats.balance
        return total, (y, stats)

    return params, rest, jax.value_and_grad(loss, (0, 1), has_aux=True)


@functools.cache
def without_mesh(kind):
    params, rest, f = value_and_grad(kind)
    x, tokens, segments = inputs()
    return jax.device_get(jax.jit(f)(params, x, rest, tokens, segments))


def on_mesh(kind, shape, rules, implementation="auto"):
    params, rest, f = value_and_grad(kind, implementation)
    mesh = make_mesh(shape)
    x, tokens, segments = inputs()
    with sharding_scope(mesh, rules):
        params = jax.device_put(params, state_shardings(params, mesh, rules))
        rest = jax.device_put(rest, state_shardings(rest, mesh, rules))
        spec = partition_spec(("act_batch", "act_sequence", None))
        x = jax.device_put(x, NamedSharding(mesh, spec))
        tokens, segments = jax.device_put((tokens, segments), batch_sharding(mesh, rules))
        # A fresh function: jit's cache does not see the rules.
        return jax.device_get(jax.jit(lambda *a: f(*a))(params, x, rest, tokens, segments))


def assert_same(got, want):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    assert len(got) == len(want)
    for (path, a), (_, b) in zip(got, want, strict=True):
        norm = np.linalg.norm(b)
        assert norm > 0, path
        error = np.linalg.norm(a - b) / norm
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: relative error {error}"


@pytest.mark.parametrize("name", MESHES)
def test_learned_routing_is_the_same_on_every_mesh(name):
    assert_same(on_mesh("learned", *MESHES[name]), without_mesh("learned"))


@pytest.mark.parametrize("name", MESHES)
def test_tokens_in_chunks_give_the_same(name, monkeypatch):
    """Five tokens' rows at a time, exchanged chunk by chunk; "fsdp 4 tensor 2" has 24 tokens, and fills a chunk up."""
    monkeypatch.setattr(moe, "ROWS_BYTES", 5 * TOP_K * HIDDEN * 4)
    assert_same(on_mesh("learned", *MESHES[name]), without_mesh("learned"))


def test_tokens_in_chunks_hold_less(monkeypatch):
    """Temporaries of forward and backward: with an eighth of the rows at a time, less than half."""
    params, rest, f = value_and_grad("learned")
    x = jax.ShapeDtypeStruct((BATCH, 64 * LENGTH, HIDDEN), jnp.float32)
    tokens = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)

    def temporaries():
        program = jax.jit(lambda *a: f(*a)).lower(params, x, rest, tokens, tokens)
        return program.compile().memory_analysis().temp_size_in_bytes

    whole = temporaries()
    monkeypatch.setattr(moe, "ROWS_BYTES", BATCH * 8 * LENGTH * TOP_K * HIDDEN * 4)
    assert temporaries() < whole / 2


@pytest.mark.parametrize("name", ["fsdp 2 expert 4", "expert 2 context 2 fsdp 2"])
def test_hash_routing_is_the_same_on_every_mesh(name):
    assert_same(on_mesh("hash", *MESHES[name]), without_mesh("hash"))


@pytest.mark.parametrize("implementation", ["ragged", "reference"])
def test_other_grouped_matmuls_agree(implementation):
    got = on_mesh("learned", {"fsdp": 2, "expert": 2, "tensor": 2}, RULES, implementation)
    assert_same(got, without_mesh("learned"))


@pytest.mark.parametrize("shape", [{"expert": 2, "data": 4}, {"expert": 8}, {"expert": 4, "tensor": 2}], ids=str)
def test_all_tokens_to_one_shard_loses_none(shape):
    """Dropless at the worst imbalance: every token goes to the first experts, whose device takes several blocks of
    rows, while devices that hold others take none; outputs and every gradient."""
    x, tokens, _ = inputs()
    model = build("learned")
    model.router.bias[...] = jnp.where(jnp.arange(EXPERTS) < TOP_K, 100.0, 0.0)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, x, rest, tokens):
        y, stats = nnx.merge(graph, params, rest)(x, tokens)
        return jnp.sum(jnp.sin(y)), (y, stats.load)

    gradients = jax.value_and_grad(run, (0, 1), has_aux=True)
    want = jax.device_get(jax.jit(gradients)(params, x, rest, tokens))
    count = BATCH * LENGTH
    np.testing.assert_array_equal(want[0][1][1], [count] * TOP_K + [0] * (EXPERTS - TOP_K))
    mesh = make_mesh(shape)
    with sharding_scope(mesh, RULES):
        params, rest = (jax.device_put(tree, state_shardings(tree, mesh, RULES)) for tree in (params, rest))
        got = jax.device_get(jax.jit(lambda *a: gradients(*a))(params, x, rest, tokens))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_a_device_holds_rows_by_its_share_of_the_experts():
    """Temporaries of forward and backward as experts spread over eight devices: a device's tokens stay as many, and
    without blocks of rows it would hold those of all the others, each K times."""
    params, rest, f = value_and_grad("learned")

    def temporaries(shape):
        mesh = make_mesh(shape)
        with sharding_scope(mesh, RULES):
            arrays = [
                jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
                for tree, shardings in ((t, state_shardings(t, mesh, RULES)) for t in (params, rest))
            ]
            x = jax.ShapeDtypeStruct((BATCH, 64 * LENGTH, HIDDEN), jnp.float32)
            tokens = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=batch_sharding(mesh, RULES))
            program = jax.jit(lambda *a: f(*a)).lower(arrays[0], x, arrays[1], tokens, tokens)
            return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries({"expert": 8}) < 3 * temporaries({"fsdp": 8})


def test_selection_and_experts_gather_no_batch():
    """With fsdp alone nothing but weights moves: no collective has the size of the activations."""
    params, rest, f = value_and_grad("learned")
    mesh = make_mesh({"fsdp": 8})
    x, tokens, segments = inputs()
    with sharding_scope(mesh, RULES):
        params = jax.device_put(params, state_shardings(params, mesh, RULES))
        x, tokens, segments = jax.device_put((x, tokens, segments), batch_sharding(mesh, RULES))
        lowered = jax.jit(lambda *a: f(*a)).lower(params, x, rest, tokens, segments)
        text = lowered.compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers
    assert not [line for line in gathers if f"[{BATCH},{LENGTH}," in line]


def test_lowers_for_tpu_without_devices():
    params, rest, f = value_and_grad("learned")
    mesh = abstract_mesh({"data": 2, "fsdp": 8, "expert": 8, "tensor": 2, "context": 2})
    shape, ints = (128, 64, HIDDEN), jax.ShapeDtypeStruct((128, 64), jnp.int32)
    with sharding_scope(mesh, RULES):
        traced = jax.jit(lambda *a: f(*a)).trace(
            params, jax.ShapeDtypeStruct(shape, jnp.bfloat16), rest, ints, ints
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged" in text and "reduce_scatter" in text


def test_impossible_shapes_are_refused():
    tokens = jnp.zeros((3, 4), jnp.int32)
    with sharding_scope(make_mesh({"expert": 8}), RULES):
        with pytest.raises(ValueError, match="batch size 3 is not divisible by 8.*expert"):
            build("learned")(jnp.ones((3, 4, HIDDEN)), tokens)
    rules = {**RULES, "expert_mlp": None, "expert": "tensor"}
    with sharding_scope(make_mesh({"tensor": 8}), rules):
        with pytest.raises(ValueError, match="number of experts 6 is not divisible by 8.*tensor"):
            build("learned", num_experts=6)(jnp.ones((3, 4, HIDDEN)), tokens)
