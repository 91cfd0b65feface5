"""Muon against a plain transcription in float64, for every weight of the tiny models, on one device and on meshes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.layers.param import Matrix
from fathom.mesh import make_mesh, sharding_scope, state_shardings
from fathom.plan.flops import count_flops
from fathom.recipe import Recipe
from fathom.train import optimizer
from fathom.train.muon import orthogonal
from fathom.train.state import named_leaves, split_model
from tests.models.small import FAST_COMPILE
from tests.train.toy_model import TOY

pytestmark = pytest.mark.xdist_group("muon")  # the transcription, which several compare with, is made once
STEPS, RATE, MOMENTUM, RMS, DECAY = 3, 1e-2, 0.95, 0.18, 0.1
MESHES = {
    "one device": (None, "default"),
    "fsdp 2 expert 2 tensor 2": ({"fsdp": 2, "expert": 2, "tensor": 2}, "default"),
    "long, two groups": ({"data": 2, "expert": 4}, "long"),
}
# How the weights of V4 and V3.2 are cut into the matrices that the published formulas name: last part of the path, and
# the axes of one matrix (rows, columns) with the sizes of pieces along the columns. Written out here a second time.
HEADS = {"wq_b", "wkv_b"}


def hybrid_ns(x):
    x = x / np.linalg.norm(x)
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ (gram @ x)
    return x


def cut(name, shape, pieces):
    """[(index of a matrix's elements in the flat weight, its shape)] for every matrix in a weight of float64s."""
    last = name.removesuffix("/weight").split("/")[-1]
    lead = 1 if "repeated" in name else 0
    ids = np.arange(np.prod(shape)).reshape(shape)
    if last == "fn":  # [outputs, streams, D]: rows are inputs
        ids = np.moveaxis(ids, lead, -1).reshape(*shape[:lead], -1, shape[lead])
    elif last in HEADS:
        ids = ids.reshape(*shape[: lead + 1], -1) if not pieces else ids
    elif last in ("wo", "wo_b"):
        ids = ids.reshape(*shape[:lead], -1, shape[-1])
    found = []
    edges = np.cumsum([0, *(pieces or (ids.shape[-1],))])
    for start, end in zip(edges, edges[1:], strict=False):
        part = ids[..., start:end]
        if last in HEADS and pieces:
            part = part.reshape(*part.shape[: lead + 1], -1)
        found += list(part.reshape(-1, *part.shape[-2:]))
    return found


def pieces_of(name, config, shape):
    """Sizes of matrices that one weight holds side by side."""
    if name.endswith("fn") and "hc_head" not in name:
        n = config.hc_mult
        return (n, n, n * n)
    if "compressor" in name and name.split("/")[-2] in ("wkv", "wgate"):
        width = config.index_head_dim if "indexer" in name else config.head_dim
        return (width, width) if shape[-1] == 2 * width else ()
    if hasattr(config, "kv_lora_rank") and "indexer" not in name:
        kind = name.split("/")[-2] if name.endswith("weight") else ""
        return {
            "wq_b": (config.nope_head_dim, config.rope_head_dim),
            "wkv_a": (config.kv_lora_rank, config.rope_head_dim),
            "wkv_b": (config.nope_head_dim, config.value_head_dim),
        }.get(kind, ())
    return ()


def setting_recipe(model, dtype):
    return Recipe.model_validate(
        {
            "name": "muon", "model": {"name": model}, "data": {"path": ".", "sequence_length": 16, "batch_size": 8},
            "optimizer": {"name": "muon", "learning_rate": RATE, "muon_dtype": dtype, "clip_norm": None},
            "train": {"steps": 10},
        }
    )  # fmt: skip


@functools.cache
def setting(model, dtype):
    """(spec, abstract params, optimizer, its kinds)."""
    recipe = setting_recipe(model, dtype)
    spec = zoo.get(model)
    params = split_model(spec, ComputeOptions(dtype="float32")).params
    tx = optimizer.make_optimizer(spec, params, recipe.optimizer, 10, "sparse")
    trainable, _ = optimizer.split_frozen(spec, params, "sparse")
    return spec, params, tx, optimizer.optimizer_kinds(trainable)


@functools.cache
def arrays(model, seed):
    """A random number for every element of every weight; `seed` 0 is the weights, then come gradients."""
    rng = np.random.default_rng([seed, 5])
    _, params, _, _ = setting(model, "float32")
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.02, params)


def run(model, mesh_name, dtype="float32"):
    """Updates of STEPS steps, by weight, with the weights unchanged."""
    spec, _, tx, _ = setting(model, dtype)
    shape, preset = MESHES[mesh_name]
    trees = [arrays(model, seed) for seed in range(STEPS + 1)]
    mesh, rules = (make_mesh(shape), spec.preset(preset)) if shape else (None, None)
    kept = []
    with sharding_scope(mesh, rules) if shape else contextlib.nullcontext():
        if shape:
            trees = [jax.device_put(tree, state_shardings(tree, mesh, rules)) for tree in trees]
        params, *gradients = map(nnx.as_pure, trees)
        state = jax.jit(tx.init)(params)
        step = jax.jit(lambda *args: tx.update(*args), compiler_options=FAST_COMPILE)
        for gradient in gradients:
            updates, state = step(gradient, state, params)
            kept.append(named_leaves(jax.device_get(updates)))
    return kept


@functools.cache
def wanted(model):
    """The updates of the matrices in float64."""
    spec, _, _, kinds = setting(model, "float32")
    weights, *gradients = (named_leaves(nnx.as_pure(arrays(model, seed))) for seed in range(STEPS + 1))
    result = [{} for _ in range(STEPS)]
    for name, kind in named_leaves(kinds).items():
        if kind != "muon":
            continue
        shape = weights[name].shape
        matrices = cut(name, shape, pieces_of(name, spec.config, shape))
        assert sorted(np.concatenate([ids.ravel() for ids in matrices])) == list(range(weights[name].size)), name
        momentum = np.zeros(weights[name].size)
        for step, gradient in enumerate(gradients):
            flat = gradient[name].ravel().astype(np.float64)
            momentum = MOMENTUM * momentum + flat
            nesterov, update = MOMENTUM * momentum + flat, np.zeros_like(momentum)
            for ids in matrices:
                x = nesterov[ids]
                # A transposed matrix has the iterates of the matrix, transposed; the lying one takes fewer products.
                o = (hybrid_ns(x) if x.shape[0] <= x.shape[1] else hybrid_ns(x.T).T) * np.sqrt(max(x.shape)) * RMS
                update[ids] = -RATE * (o + DECAY * weights[name].ravel()[ids])
            result[step][name] = update.reshape(shape)
    return result


@pytest.mark.parametrize(
    ("model", "mesh_name"),
    [*(("deepseek-v4-tiny", name) for name in MESHES), ("deepseek-v3.2-tiny", "long, two groups")],
)
def test_every_matrix_as_published(model, mesh_name):
    got = run(model, mesh_name)
    for step, want in enumerate(wanted(model)):
        assert len(want) > 15
        for name, update in want.items():
            error = np.linalg.norm(got[step][name] - update) / np.linalg.norm(update)
            assert error < 1e-5, f"{name} {update.shape} step {step}: {error}"


@pytest.mark.parametrize("model", ["deepseek-v4-tiny", "deepseek-v3.2-tiny"])
def test_which_weight_gets_which(model):
    """AdamW: embedding, head, norms, biases and gates of mHC, positions within a window, sinks. Muon: all else."""
    _, params, tx, kinds = setting(model, "float32")
    ends = ("embed/weight", "head/weight", "norm/weight", "/base", "/scale", "/sink", "/ape", "/bias")
    ranks = {name: weight.ndim for name, weight in named_leaves(nnx.as_pure(params)).items()}
    for name, kind in named_leaves(kinds).items():
        assert kind == ("adamw" if name.endswith(ends) else "muon"), name
        assert kind == "adamw" or ranks[name] > 1
    # What the rules of a router and not gradients change is no parameter, and has no state here.
    state = named_leaves(jax.eval_shape(tx.init, nnx.as_pure(params)))
    assert not [name for name in state if "tid2eid" in name or "router/bias" in name]


def test_what_a_stage_freezes_has_no_state():
    """The indexers' warm-up trains nothing else, Muon's matrices included."""
    spec = zoo.get("deepseek-v4-tiny")
    params = split_model(spec, ComputeOptions(dtype="float32")).params
    tx = optimizer.make_optimizer(spec, params, block_of("float32"), 10, "indexer-warmup")
    state = jax.eval_shape(lambda p: optimizer.init_optimizer(tx, spec, p, "indexer-warmup"), params)
    weights = [name for name in named_leaves(state) if "attn" in name or "ffn" in name or "embed" in name]
    assert weights and all("indexer" in name for name in weights)


def block_of(dtype):
    return setting_recipe("deepseek-v4-tiny", dtype).optimizer


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128), (16, 256)], ids=str)
def test_singular_values(shape, dtype, error):
    """Those of HybridNS in float64: 1 to 1.00054, and of a square matrix the least may be 1.3e-3 below 1."""
    update = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    scaled = jax.jit(lambda x: orthogonal([x], [(Matrix(), (None,) * 3)], RMS, jnp.dtype(dtype))[0])(update)
    values = np.linalg.svd(np.asarray(scaled, np.float64), compute_uv=False) / (RMS * np.sqrt(max(shape)))
    want = np.linalg.svd([hybrid_ns(x.astype(np.float64)) for x in update], compute_uv=False)
    assert np.abs(want - 1).max() < 2e-3
    np.testing.assert_allclose(values, want, rtol=error)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(scaled))), RMS, rtol=max(error, 2e-3))


@pytest.mark.parametrize(
    "axes", [(None, None, None), ("expert", "expert_embed", None), (None, "embed", "vocab")], ids=str
)
def test_devices_share_the_matrices_out(axes):
    """However a weight lies, no product is made on two devices, and an odd one is made as well as the others."""
    mesh, rules = make_mesh({"data": 2, "fsdp": 2, "expert": 2}), zoo.get("deepseek-v4-tiny").preset("default")

    def one(x):
        return orthogonal([x], [(Matrix(), axes)], RMS, jnp.dtype("float32"))[0]

    even, odd = (jax.ShapeDtypeStruct((count, 8, 24), "float32") for count in (16, 14))
    alone = count_flops(one, even)
    x = np.random.default_rng(0).standard_normal(odd.shape).astype(np.float32)
    want = jax.jit(one)(x)
    with sharding_scope(mesh, rules):
        assert count_flops(one, even) == alone
        assert count_flops(one, odd) == alone  # 14 take as long as 16
        np.testing.assert_allclose(jax.jit(one)(x), want, rtol=1e-4, atol=1e-6)


def test_small_weights_are_made_together():
    """Of 2, 3 and 1 matrices, and 2 beside each other, eight devices make 8 in all: one each, as of a weight of 8."""
    mesh, rules = make_mesh({"data": 2, "fsdp": 2, "expert": 2}), zoo.get("deepseek-v4-tiny").preset("default")
    weights = [
        (Matrix(), (None, "embed", None)),
        (Matrix(), (None, "embed", None)),
        (Matrix(), ("embed", None)),
        (Matrix(outputs=(-2, -1), inputs=(-3,), parts=(6, 6)), ("embed", None, None)),
    ]
    shapes = [(2, 8, 24), (3, 8, 24), (8, 24), (8, 4, 12)]
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def all_of(xs):
        return orthogonal(xs, weights, RMS, jnp.dtype("float32"))

    eight = jax.ShapeDtypeStruct((8, 8, 24), "float32")
    alone = count_flops(lambda x: orthogonal([x], weights[:1], RMS, jnp.dtype("float32")), eight)
    want = jax.jit(all_of)(xs)
    with sharding_scope(mesh, rules):
        assert count_flops(all_of, xs) == alone
        got = jax.jit(all_of)(xs)
        # A weight of 16 beside them stays by itself, and is not copied: devices hold half of each matrix's rows.
        sixteen = jax.make_jaxpr(lambda *x: orthogonal(x, [weights[0], *weights], RMS, jnp.dtype("float32")))
        program = str(sixteen(jnp.zeros((16, 8, 24)), *xs))
        assert "f32[8,4,24]" in program and "f32[24,4,24]" not in program
    for x, one in zip(got, want, strict=True):
        np.testing.assert_allclose(x, one, rtol=1e-4, atol=1e-6)


def test_a_model_of_no_matrices_is_refused():
    spec = dataclasses.replace(TOY, frozen=lambda path, stage: path[-1] in ("up", "down"))
    params = split_model(spec, ComputeOptions(dtype="float32")).params
    with pytest.raises(ValueError, match="'muon', but of what .* no weight declares itself a matrix.*'adamw'"):
        optimizer.make_optimizer(spec, params, block_of("float32"), 10, "sparse")


def test_parts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 6\) holds parts of \(2, 3\) along dimension -1"):
        orthogonal([jnp.ones((4, 6))], [(Matrix(parts=(2, 3)), (None, None))], RMS, jnp.dtype("float32"))
