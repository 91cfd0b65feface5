"""The balance loss of rows of documents, however they are packed and cut."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fathom.layers.balance_loss import sequence_balance_loss
from fathom.layers.router import Routing
from fathom.mesh import batch_sharding, make_mesh, sharding_scope
from fathom.models.deepseek_v4.sharding import PRESETS

BATCH, LENGTH, EXPERTS, TOP_K = 2, 64, 6, 2
MESHES = {
    "context 8": ({"context": 8}, "default"),
    "data 2 context 4": ({"data": 2, "context": 4}, "default"),
    "long": ({"fsdp": 2, "expert": 4}, "long"),
}


def rows(seed):
    """(scores, experts, documents): documents of one token to more than four devices, with padding."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.1, 1, (BATCH, LENGTH, EXPERTS)).astype(np.float32)
    indices = np.argsort(rng.random((BATCH, LENGTH, EXPERTS)))[..., :TOP_K].astype(np.int32)
    segments = np.zeros((BATCH, LENGTH), np.int32)
    for row in segments:
        at, number = int(rng.integers(0, 3)), 1
        while at < LENGTH - 2:
            size = int(rng.choice([1, 2, 5, 8, 13, 30, 45]))
            row[at : at + size] = number
            at, number = at + size + int(rng.integers(0, 2)), number + 1
        row[LENGTH - int(rng.integers(0, 4)) :] = 0
    return scores, indices, segments


def plainly(scores, indices, segments):
    """Document by document."""
    total = 0.0
    for row in range(BATCH):
        for number in set(segments[row]) - {0}:
            mine = segments[row] == number
            share = scores[row, mine].astype(np.float64)
            share /= share.sum(-1, keepdims=True)
            fraction = np.bincount(indices[row, mine].ravel(), minlength=EXPERTS) / mine.sum() * EXPERTS / TOP_K
            total += mine.sum() * (fraction * share.mean(0)).sum()
    return total


def loss(scores, indices, segments):
    return sequence_balance_loss(Routing(indices, jnp.ones(indices.shape), scores), segments)


def compiled(mesh_name, whole_rows=False):
    shape, preset = MESHES[mesh_name]
    mesh, rules = make_mesh(shape), PRESETS[preset]
    arrays = rows(0)
    function = (lambda s, i, _: loss(s, i, None)) if whole_rows else loss
    with sharding_scope(mesh, rules):
        spec = batch_sharding(mesh, rules).spec
        places = (NamedSharding(mesh, spec),) * 3
        program = jax.jit(jax.value_and_grad(lambda *a: function(*a))).lower(*jax.device_put(arrays, places)).compile()
    return lambda *arrays: jax.device_get(program(*jax.device_put(arrays, places))), program.as_text()


@pytest.mark.parametrize("mesh_name", MESHES)
def test_documents_over_several_devices(mesh_name):
    run, text = compiled(mesh_name)
    one = jax.jit(jax.value_and_grad(loss))
    for seed in range(12):
        arrays = rows(seed)
        value, gradient = run(*arrays)
        np.testing.assert_allclose(value, plainly(*arrays), rtol=1e-5)
        want_value, want = one(*arrays)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)
    # Two rows of counts for each device cross, and no row of ids.
    sizes = [np.prod([int(n) for n in m.split(",") if n]) for m in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)]
    assert sizes and all(size <= 8 * BATCH * (EXPERTS + 1) for size in sizes)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_rows_of_one_document(mesh_name):
    run, _ = compiled(mesh_name, whole_rows=True)
    scores, indices, _ = rows(3)
    ones = np.ones((BATCH, LENGTH), np.int32)
    value, _ = run(scores, indices, ones)
    np.testing.assert_allclose(value, plainly(scores, indices, ones), rtol=1e-5)
