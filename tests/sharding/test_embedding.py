"""The embedding on every mesh: rows, gradients, ids outside of the table, and what moves and is held."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from fathom.layers.embedding import Embedding
from fathom.mesh import batch_sharding, make_mesh, sharding_scope, state_shardings
from fathom.models.deepseek_v4.sharding import PRESETS

VOCAB, HIDDEN, BATCH, LENGTH = 96, 32, 8, 16
DEFAULT, LONG = PRESETS["default"], PRESETS["long"]
# Beyond the presets: rows of the table over an axis of the batch, which are gathered.
ROWS_OVER_BATCH = {**DEFAULT, "vocab": "data"}
MESHES = {
    "data 8": ({"data": 8}, DEFAULT),
    "fsdp 8": ({"fsdp": 8}, DEFAULT),
    "fsdp 2 expert 2 tensor 2": ({"fsdp": 2, "expert": 2, "tensor": 2}, DEFAULT),
    "fsdp 2 context 4": ({"fsdp": 2, "context": 4}, DEFAULT),
    "long": ({"fsdp": 4, "expert": 2}, LONG),
    "long, data, tensor": ({"data": 2, "expert": 2, "tensor": 2}, LONG),
    "rows over the batch": ({"data": 2, "fsdp": 4}, ROWS_OVER_BATCH),
}


def lowered(mesh_name, dtype="float32", vocab=VOCAB):
    """(compiled function of state, tokens and weights; the state; where arguments go)."""
    shape, rules = MESHES[mesh_name]
    mesh = make_mesh(shape)
    graphdef, state = nnx.split(Embedding(nnx.Rngs(0), vocab, HIDDEN, stddev=1.0, dtype="float32"))

    def loss(state, tokens, weights):
        rows = nnx.merge(graphdef, state)(tokens, dtype)
        return jnp.sum(rows * weights.astype(dtype), dtype=jnp.float32), rows

    with sharding_scope(mesh, rules):
        placed = jax.device_put(state, state_shardings(state, mesh, rules))
        tokens = jax.device_put(np.zeros((BATCH, LENGTH), np.int32), batch_sharding(mesh, rules))
        spec = NamedSharding(mesh, batch_sharding(mesh, rules).spec)
        weights = jax.device_put(np.zeros((BATCH, LENGTH, HIDDEN), np.float32), spec)
        function = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(placed, tokens, weights).compile()
    return function, placed, (tokens.sharding, spec)


def run(mesh_name, tokens, weights, **options):
    function, state, places = lowered(mesh_name, **options)
    (_, rows), gradient = function(state, *map(jax.device_put, (tokens, weights), places))
    return np.asarray(rows, np.float32), jax.device_get(jax.tree.leaves(gradient)[0]), state


@pytest.mark.parametrize("mesh_name", MESHES)
def test_rows_and_gradients(mesh_name):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    tokens[:, :4] = 7  # many gradients for one row
    weights = rng.standard_normal((BATCH, LENGTH, HIDDEN)).astype(np.float32)
    rows, gradient, state = run(mesh_name, tokens, weights)
    table = np.asarray(jax.tree.leaves(state)[0])
    np.testing.assert_array_equal(rows, table[tokens])
    want = np.zeros_like(table)
    np.add.at(want, tokens, weights)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


def test_equal_gradients_of_a_row_add_up_in_float32():
    """128 gradients of 1/256 beside one of 1: in bfloat16 none of them would count."""
    tokens = np.full((BATCH, LENGTH), 5, np.int32)
    weights = np.full((BATCH, LENGTH, HIDDEN), 1 / 256, np.float32)
    weights[0, 0] = 1
    _, gradient, _ = run("long", tokens, weights, dtype="bfloat16")
    np.testing.assert_array_equal(gradient[5], 1 + 127 / 256)


@pytest.mark.parametrize("mesh_name", ["fsdp 2 expert 2 tensor 2", "long", "rows over the batch"])
def test_ids_outside_of_the_table_give_nan_and_touch_no_row(mesh_name):
    tokens = np.arange(BATCH * LENGTH, dtype=np.int32).reshape(BATCH, LENGTH) % VOCAB
    tokens[0, 0], tokens[3, 5], tokens[7, 15] = -1, VOCAB, 2**31 - 1
    weights = np.ones((BATCH, LENGTH, HIDDEN), np.float32)
    rows, gradient, _ = run(mesh_name, tokens, weights)
    outside = (tokens < 0) | (tokens >= VOCAB)
    assert np.isnan(rows[outside]).all() and np.isfinite(rows[~outside]).all()
    want = np.bincount(tokens[~outside], minlength=VOCAB)
    np.testing.assert_array_equal(gradient, np.repeat(want[:, None], HIDDEN, axis=1))


def test_nothing_of_the_size_of_the_table_moves():
    """With columns over all devices: neither the table nor its gradient crosses."""
    function, *_ = lowered("long", vocab=4096)
    sizes = [
        np.prod([int(n) for n in match.split(",")])
        for match in re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-|reduce-scatter|collective)", function.as_text())
    ]
    assert sizes and max(sizes) <= BATCH * LENGTH * HIDDEN < 4096 * HIDDEN / 8


def test_shapes_that_a_mesh_does_not_divide_are_refused():
    embedding = Embedding(nnx.Rngs(0), VOCAB, 36, stddev=1.0, dtype="float32")
    with sharding_scope(make_mesh({"fsdp": 8}), DEFAULT):
        with pytest.raises(ValueError, match="hidden size 36 is not divisible by 8"):
            embedding(jnp.zeros((8, 4), jnp.int32), "float32")
