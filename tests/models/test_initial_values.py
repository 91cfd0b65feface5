"""A fresh model is usable: sound hash tables, a loss of about log(vocabulary), and every weight learns."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.train.state import init_variables, named_leaves, seed_to_rng
from tests.models.small import (
    FAST_COMPILE,
    FP32,
    packed_rows,
    random_model,
    small_config,
    small_spec,
    value_and_grads,
)

pytestmark = pytest.mark.xdist_group("initial values")

CONFIG = small_config(("csa", "hca") * 2 + ("sliding",), num_hash=4)
"""Two scanned layers with stacked hash tables, an odd last layer with a learned router, and MTP."""

# Documents shorter than a compression block (1, 2, 3, 15) and than the window, a full row, a row of padding.
DOCUMENTS = [(1, 2, 3, 15, 60), (88,), (), (40, 48), (7, 31, 33), (88,), (80, 8), (64, 16)]


@functools.cache
def fresh() -> tuple[nnx.State, nnx.State]:
    """(params, other state) as a training run initialises them."""
    init = functools.partial(init_variables, small_spec(CONFIG), FP32)
    return jax.jit(init, compiler_options=FAST_COMPILE)(seed_to_rng(0))


@functools.cache
def first_step() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(losses, gradients) of the fresh model by name."""
    batch = packed_rows(DOCUMENTS, 88, CONFIG.vocab_size)
    step = jax.jit(value_and_grads(CONFIG), compiler_options=FAST_COMPILE)
    (_, aux), grads = jax.device_get(step(*fresh(), batch))
    return named_leaves(aux), named_leaves(grads)


def test_hash_tables_are_balanced_distinct_and_differ_by_layer():
    stacked = {k: np.asarray(v) for k, v in named_leaves(fresh()[1]).items() if k.endswith("tid2eid")}
    tables = [table for stack in stacked.values() for table in stack]
    assert len(tables) == 4
    even = CONFIG.vocab_size * CONFIG.num_experts_per_tok // CONFIG.num_experts
    for table in tables:
        assert table.dtype == np.int32
        assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in table.tolist())
        np.testing.assert_array_equal(np.bincount(table.ravel(), minlength=CONFIG.num_experts), even)
    for one, other in itertools.combinations(tables, 2):
        # Two unrelated tables send about one token in 28 to the same pair of experts.
        assert np.mean(np.all(np.sort(one) == np.sort(other), axis=1)) < 0.15


def test_stacked_layers_start_with_different_weights():
    for name, weight in named_leaves(fresh()[0]).items():
        weight = np.asarray(weight)
        if name.startswith("repeated") and np.unique(weight[0]).size > 10 and "base" not in name:
            assert not np.any(weight[0] == weight[1]), name


def test_first_loss_is_that_of_guessing():
    losses, _ = first_step()
    # Normalised states make logits of this variance, which cost half of it above the uniform guess.
    variance = CONFIG.hidden_size * CONFIG.initializer_range**2
    for part in ("loss/main", "loss/mtp"):
        assert abs(losses[part] - math.log(CONFIG.vocab_size) - variance / 2) < 0.05, part
    # Perfect balance gives 1 per learned layer, all tokens to the same experts num_experts / num_experts_per_tok = 4.
    assert 1.9 < losses["loss/balance"] < 2.5  # two learned layers: the last one and the MTP's


def test_every_trained_weight_has_a_finite_gradient_that_is_not_zero():
    _, grads = first_step()
    assert {int(name.split("/")[1]) for name in grads if name.startswith("repeated")} == {0, 1}
    assert any(name.startswith("suffix") for name in grads)
    for name, grad in grads.items():
        assert np.all(np.isfinite(grad)), name
        if "indexer" in name:
            assert not np.any(grad), f"{name}: selection is discrete, the language-model loss must not reach it"
            continue
        # Each layer of a stack, and each expert, on its own.
        pieces = grad if name.startswith("repeated") else grad[None]
        if "/experts/" in name:
            pieces = pieces.reshape(-1, *pieces.shape[2:])
        assert all(np.any(piece) for piece in pieces), name


@pytest.mark.parametrize(("length", "packed"), [(1, False), (3, True), (10, False)])
def test_rows_shorter_than_a_window_or_a_compression_block(length, packed):
    """No entry closes in 1 or 3 tokens; in 10, two of CSA's and none of HCA's."""
    config = small_config(("csa", "hca"))
    graphdef, params, rest = random_model(config)

    def score(params, batch):
        output = nnx.merge(graphdef, params, rest)(*batch)
        return jnp.mean(output.logits**2) + jnp.mean(output.mtp_logits**2), output[:2]

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    segments = np.array([[1, 2, 2], [1, 1, 0]], np.int32)
    batch = (tokens, None, segments) if packed else (tokens,)
    function = jax.jit(jax.value_and_grad(score, has_aux=True), compiler_options=FAST_COMPILE)
    (_, logits), grads = function(params, batch)
    for array in jax.tree.leaves((logits, grads)):
        assert np.all(np.isfinite(array))
    assert logits[0].shape == logits[1].shape == (2, length, config.vocab_size)
    used = {name for name, grad in named_leaves(grads).items() if np.any(grad)}
    compressors = {name.split("/attn/")[0] for name in used if "/attn/compressor" in name}
    assert compressors == ({"prefix/0"} if length >= 4 else set())
