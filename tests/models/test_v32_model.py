"""V3.2 as a whole: causality and packing, MTP, stages, its plan, meshes, and the released size without a device."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.options import ComputeOptions
from fathom.mesh import abstract_mesh
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.recipe import Recipe
from fathom.train.state import named_leaves
from fathom.train.step import make_program
from tests.models.small import FAST_COMPILE, FP32, fill, packed_rows

pytestmark = pytest.mark.xdist_group("v32")
LENGTH = 90


def small_config(**changes) -> DeepseekV32Config:
    """A dense layer, two scanned ones with experts, MTP; the indexer keeps 12 tokens."""
    sizes = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=48, q_lora_rank=32, kv_lora_rank=24)
    changes = {**sizes, "index_top_k": 12, "ffn_kinds": ("dense", "moe", "moe"), **changes}
    return dataclasses.replace(DeepseekV32Config.tiny(), **changes)


def random_model(config: DeepseekV32Config, options: ComputeOptions = FP32, seed: int = 0):
    """(graphdef, params, other state), every weight far from its initial value."""
    spec = zoo.get("deepseek-v3.2-tiny")
    return fill(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options)), seed)


@functools.cache
def forward(packed: bool, **options):
    graphdef, params, rest = random_model(small_config(), dataclasses.replace(FP32, **options))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params, rest, tokens, segments):
        out = nnx.merge(graphdef, params, rest)(tokens, None, segments if packed else None)
        return out.logits, out.mtp_logits

    return lambda tokens, segments=None: [
        np.asarray(x) for x in run(params, rest, tokens, tokens if segments is None else segments)
    ]


def tokens_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 264, (rows, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("attention", ["auto", "gathered"])
def test_no_token_changes_an_earlier_one(attention):
    run, tokens = forward(False, attention=attention), tokens_of(2)
    places = (1, 40, 77)
    changed = np.repeat(tokens, len(places), axis=0)
    for row, place in enumerate(places * 2):
        changed[row, place:] = (changed[row, place:] + 101) % 264
    want, got = run(np.repeat(tokens, len(places), axis=0)), run(changed)
    for row, place in enumerate(places * 2):
        np.testing.assert_array_equal(got[0][row, :place], want[0][row, :place])
        assert (got[0][row, place] != want[0][row, place]).any()
        # MTP reads one token ahead.
        np.testing.assert_array_equal(got[1][row, : place - 1], want[1][row, : place - 1])
        assert (got[1][row, place - 1] != want[1][row, place - 1]).any()


def test_a_packed_document_is_as_alone_and_padding_takes_part_in_nothing():
    batch = packed_rows([(31, 44), (60, 7, 20)], LENGTH, 264)
    packed = forward(True)(batch["tokens"], batch["segment_ids"])
    other = np.where(batch["segment_ids"] == 0, (batch["tokens"] + 7) % 264, batch["tokens"]).astype(np.int32)
    for got, want in zip(forward(True)(other, batch["segment_ids"]), packed, strict=True):
        np.testing.assert_array_equal(got[batch["segment_ids"] > 0], want[batch["segment_ids"] > 0])
    spans = [(0, 0, 31), (0, 31, 75), (1, 0, 60), (1, 60, 67), (1, 67, 87)]
    alone = tokens_of(len(spans), seed=3)
    for row, (source, start, stop) in enumerate(spans):
        alone[row, : stop - start] = batch["tokens"][source, start:stop]
        # MTP wraps around in its document.
        alone[row, stop - start] = batch["tokens"][source, start]
    # Chunked against fused, so equal but for rounding.
    for got, want in zip(packed, forward(False)(alone), strict=True):
        for row, (source, start, stop) in enumerate(spans):
            np.testing.assert_allclose(got[source, start:stop], want[row, : stop - start], atol=1e-5, rtol=0)


@functools.cache
def gradients(**options):
    config, options = small_config(), dataclasses.replace(FP32, **{"attention": "gathered", **options})
    spec = zoo.get("deepseek-v3.2-tiny").with_config(config)
    graphdef, params, rest = random_model(config, options)
    batch = packed_rows([(31, 44), (60, 7, 20)], LENGTH, 264)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return spec.loss(model, batch, LossWeights(mtp=0.3, balance=1e-2), count_targets(batch))

    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(params)
    return float(value), aux, {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(grads)}


def test_loss_counts_and_gradients():
    value, aux, grads = gradients()
    assert set(aux["expert_load"]) == {"repeated/0", "mtp/0/block"}  # the dense layer has no experts
    for load in aux["expert_load"].values():
        np.testing.assert_array_equal(load.sum(axis=-1), 2 * 162)  # two experts for each token that is not padding
    assert {"loss/main", "loss/mtp", "loss/balance"} <= set(aux) and value > 0
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        assert grad.any() != ("indexer" in path), path


@pytest.mark.parametrize(
    ("stage", "attentions"), [("indexer-warmup", ["masked"]), ("sparse", ["masked", "gathered"])]
)
def test_the_indexers_own_loss_reaches_the_indexer_alone(stage, attentions):
    """And does not depend on the form of the attention that teaches."""
    batch, found = packed_rows([(31, 44), (60, 7, 20)], LENGTH, 264), []
    for attention in attentions:
        options = dataclasses.replace(FP32, indexer_loss=True, stage=stage, attention=attention)
        graphdef, params, rest = random_model(small_config(num_mtp_layers=0), options)

        def loss(params, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest)
            return model.features(batch["tokens"], batch["positions"], batch["segment_ids"]).aux["indexer"]

        value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(params)
        assert value > 1
        for path, grad in nnx.to_flat_state(grads):
            assert np.asarray(grad.get_value()).any() == ("indexer" in path), path
        found.append(float(value))
    assert found[0] == pytest.approx(found[-1], rel=1e-5)


def test_remat_form_and_chunk_change_no_gradient():
    value, _, grads = gradients(remat="attention", attention="masked", query_chunk=16)
    want, _, expected = gradients()
    assert value == pytest.approx(want, rel=1e-6)
    for path, grad in expected.items():
        assert np.linalg.norm(grads[path] - grad) <= 1e-5 * np.linalg.norm(grad), path


def test_stages_approximation_and_simulated_rounding():
    tokens = tokens_of(2)
    (sparse, _), (dense, _) = forward(False)(tokens), forward(False, stage="dense")(tokens)
    # Up to the 12th token everything is selected.
    np.testing.assert_allclose(sparse[:, :12], dense[:, :12], atol=1e-5, rtol=0)
    assert np.abs(sparse[:, 12:] - dense[:, 12:]).max() > 1e-2
    np.testing.assert_allclose(forward(False, selection="approx")(tokens)[0], sparse, atol=1e-5, rtol=0)
    rounded = forward(False, simulate_quant=True)(tokens)[0]
    np.testing.assert_allclose(rounded[:, :12], sparse[:, :12], atol=1e-5, rtol=0)  # only the indexer rounds
    assert np.abs(rounded - sparse).max() > 1e-3


def test_bfloat16_stays_close_and_keeps_its_float32_parts():
    options = ComputeOptions(dtype="bfloat16", param_dtype="bfloat16", stage="dense")
    graphdef, params, rest = random_model(small_config(), options)
    kept = {path[-2:] for path, v in nnx.to_flat_state(params) if v.get_value().dtype == jnp.float32}
    assert kept == {("k_norm", "weight"), ("k_norm", "bias"), ("weights_proj", "weight")}
    run = jax.jit(lambda p, t: nnx.merge(graphdef, p, rest)(t).logits, compiler_options=FAST_COMPILE)
    logits = run(params, tokens_of(1))
    assert logits.dtype == jnp.float32
    wide = forward(False, stage="dense")(tokens_of(1))[0]
    assert np.linalg.norm(logits - wide) < 0.05 * np.linalg.norm(wide)


def test_layer_by_number_and_streams():
    config = small_config(ffn_kinds=("dense", "moe", "moe", "moe", "dense"), num_mtp_layers=0)
    plan = config.plan
    assert (len(plan.prefix), plan.unit, plan.repeats, len(plan.suffix)) == (1, 1, 3, 1)
    graphdef, params, rest = random_model(config)
    model = nnx.merge(graphdef, params, rest)
    assert model.layer(4).kind == "dense"
    kernel = model.repeated[0].attn.wkv_a.weight[...]
    np.testing.assert_array_equal(model.layer(2).attn.wkv_a.weight[...], kernel[1])
    with pytest.raises(IndexError, match="layers 0 to 4"):
        model.layer(5)
    out = jax.jit(lambda t: model(t, return_streams=True), compiler_options=FAST_COMPILE)(tokens_of(1)[:, :9])
    assert out.mtp_logits is None
    assert [x.shape for x in out.streams] == [(1, 9, 1, 64)] * 5


def test_bad_calls():
    graphdef, params, rest = random_model(small_config())
    model = nnx.merge(graphdef, params, rest)
    with pytest.raises(ValueError, match="token id 264 at row 0, position 2"):
        model(np.array([[1, 2, 264]]))
    with pytest.raises(ValueError, match="2 MTP stages"):
        random_model(small_config(num_mtp_layers=2))


# The released size, without a device

MESH, ROWS, ROW = {"fsdp": 64, "expert": 8}, 512, 4096


@functools.cache
def program():
    values = {
        "name": "lowering",
        "model": {"name": "deepseek-v3.2", "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
        "data": {"path": ".", "sequence_length": ROW, "batch_size": ROWS},
        "optimizer": {"learning_rate": 1e-4},
        "mesh": MESH,
        "train": {"steps": 100},
    }
    return make_program(Recipe.model_validate(values), abstract_mesh(MESH))


def test_train_step_lowers_for_512_devices():
    text = program().lower(ROWS, ROW, platforms=("tpu",)).as_text()
    assert "mhlo.num_partitions = 512" in text and "ragged_dot" in text
    assert "tensor<58x256x7168" in text  # layers with experts are compiled once, from stacked weights
    assert not re.search(rf"x{ROW}x(\d+x)?{ROW}x", text), "queries x keys of the whole sequence"
    assert f"x{ROW}x129280x" not in text, "logits of the whole sequence"


def test_the_train_state_holds_the_published_weights_once():
    spec = zoo.get("deepseek-v3.2")
    params = named_leaves(program().state.params)
    weights = params | named_leaves(program().state.model_state)
    held: dict[str, int] = {}
    for tensor in spec.hub_tensors(spec.config):
        path = "/".join(map(str, tensor.path))
        held[path] = held.get(path, 0) + math.prod(tensor.shape)
    assert held == {path: math.prod(leaf.shape) for path, leaf in weights.items()}
    total, active = spec.num_params(spec.config)
    # Published: 685,355,329,792 without scales, of which the multi-token-prediction layer repeats embedding and head.
    assert sum(held.values()) == total == 685_355_329_792 - 2 * 129280 * 7168
    assert active == pytest.approx(37.5e9, rel=1e-3)
    trained = {m.split("/mu/")[1] for m in named_leaves(program().state.opt_state) if "/mu/" in m}
    assert trained == set(params)


def test_flops_against_the_compiler():
    """Where all tokens are selected a step is matrix products only, and XLA counts them."""
    config = small_config(num_mtp_layers=0, index_top_k=64, ffn_kinds=("dense",), hidden_size=256)
    spec = zoo.get("deepseek-v3.2-tiny").with_config(config)
    graphdef, params, rest = random_model(config)
    tokens = jax.ShapeDtypeStruct((1, 64), "int32")
    lowered = jax.jit(lambda p, t: nnx.merge(graphdef, p, rest)(t).logits).lower(params, tokens)
    counted = lowered.cost_analysis()["flops"] / 64
    # Of 64 x 64 scores the causal pattern needs 65 / 128; the products compute all.
    per_layer = 2.0 * config.num_heads * (config.nope_head_dim + config.rope_head_dim + config.value_head_dim)
    unneeded = per_layer * (64 - 65 / 2)
    assert counted == pytest.approx(spec.flops_per_token(config, 64) / 3 + unneeded, rel=0.03)
