"""V3.2's attention: its forms and versions agree, and the shortcuts change nothing."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers import indexer
from fathom.layers.documents import make_documents
from fathom.layers.options import ComputeOptions
from fathom.models.deepseek_v32 import mla
from fathom.models.deepseek_v32.attention import Attention, Indexer, make_layer_inputs, visible_tokens
from fathom.models.deepseek_v32.config import DeepseekV32Config
from fathom.models.deepseek_v32.mla import Latents, Sizes, choose, latent_attention
from fathom.ops.selection import Selected, VisibleRange
from tests.models.small import FAST_COMPILE, fill, packed_rows

B, S, N, R, P, H, V = 2, 50, 3, 24, 8, 12, 10
VERSIONS = [
    ("reference", "expanded"),
    ("reference", "absorbed"),
    ("fused", "expanded"),
    ("fused", "absorbed"),
    ("masked", "expanded"),
    ("masked", "absorbed"),
    ("gathered", "absorbed"),
]


def latents(seed: int = 0) -> Latents:
    rng = np.random.default_rng(seed)
    shapes = Latents((B, S, N, H), (B, S, N, P), (B, S, R), (B, S, P), (R, N, H), (R, N, V))
    values = [rng.standard_normal(shape) * (R**-0.5 if shape[0] == R else 1.0) for shape in shapes]
    return Latents(*[jnp.asarray(value, jnp.float32) for value in values])


def selection(kind: str, single: bool):
    """For rows of one document, or packed ones with padding: 9 distinct visible tokens a query, where there are."""
    tokens = jnp.zeros((B, S), jnp.int32)
    batch = packed_rows([(20, 17), (31, 9)], S, 9)
    documents = make_documents(tokens, *(None, None) if single else (batch["positions"], batch["segment_ids"]))
    visible = visible_tokens(documents)
    if kind == "visible":
        return visible
    rng = np.random.default_rng(0)
    indices = np.full((B, S, 9), -1, np.int32)
    for row in range(B):
        for query in range(S):
            low, high = int(visible.begin_BS[row, query]), int(visible.end_BS[row, query])
            chosen = rng.permutation(np.arange(low, high))[:9]
            indices[row, query, : len(chosen)] = chosen
    return Selected(jnp.asarray(indices))


@functools.cache
def plain(kind: str, single: bool) -> np.ndarray:
    """The meaning in float64, query by query."""
    q_nope, q_rope, c, k_rope, w_k, w_v = (np.asarray(x, np.float64) for x in latents())
    chosen, out = selection(kind, single), np.zeros((B, S, N, V))
    for row in range(B):
        for query in range(S):
            if kind == "visible":
                seen = np.arange(chosen.begin_BS[row, query], chosen.end_BS[row, query])
            else:
                seen = [i for i in np.asarray(chosen.indices_BSK[row, query]) if i >= 0]
            if not len(seen):
                continue
            keys = np.einsum("tr,rnh->tnh", c[row, seen], w_k)
            scores = np.einsum("nh,tnh->nt", q_nope[row, query], keys) + q_rope[row, query] @ k_rope[row, seen].T
            weights = np.exp(0.2 * (scores - scores.max(axis=-1, keepdims=True)))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[row, query] = np.einsum("nt,tnv->nv", weights, np.einsum("tr,rnv->tnv", c[row, seen], w_v))
    return out


@functools.cache
def run(kind: str, single: bool, implementation: str, form: str):
    """(output, gradients of every input) under a fixed cotangent."""
    chosen = selection(kind, single)

    def loss(values):
        out, lse = latent_attention(
            values, chosen, scale=0.2, single=single, implementation=implementation, form=form,
            query_chunk=16,
        )  # fmt: skip
        return jnp.sum(out * jnp.asarray(np.random.default_rng(9).standard_normal(out.shape))), (out, lse)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)
    (_, out), grads = function(latents())
    return *(np.asarray(x) for x in out), [np.asarray(g) for g in grads]


@pytest.mark.parametrize("single", [True, False], ids=["single", "packed"])
@pytest.mark.parametrize("kind", ["visible", "selected"])
@pytest.mark.parametrize(("implementation", "form"), VERSIONS)
def test_every_version_has_the_meaning_and_one_gradient(implementation, form, kind, single):
    out, lse, grads = run(kind, single, implementation, form)
    np.testing.assert_allclose(out, plain(kind, single), atol=2e-6, rtol=0)
    _, expected_lse, expected = run(kind, single, "reference", "expanded")
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6, rtol=0)
    for mine, theirs in zip(grads, expected, strict=True):
        assert np.linalg.norm(mine - theirs) < 2e-6 * np.linalg.norm(theirs)
    if not single:
        assert not out[0, 37:].any() and not out[1, 40:].any()  # padding


def test_the_rule_of_the_choice(caplog):
    """Read from the shapes alone: the released model turns to the absorbed form at 6,964 tokens."""
    c = DeepseekV32Config.v32()

    def chosen(length: int, selected: int | None) -> tuple[str, str]:
        sizes = Sizes(length, c.kv_lora_rank, c.rope_head_dim, c.nope_head_dim, c.value_head_dim)
        indices = jax.ShapeDtypeStruct((1, length, selected or 1), "int32")
        picked = Selected(indices) if selected else VisibleRange(indices, indices)
        return choose(sizes, picked, implementation="auto", form="auto")

    mla._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="fathom"):
        assert chosen(256, None) == ("fused", "expanded")
        assert chosen(257, None) == ("masked", "expanded")
        assert chosen(6963, 2048) == ("masked", "expanded")
        assert chosen(6964, 2048) == ("gathered", "absorbed")
        assert chosen(131072, None) == ("masked", "expanded")
        assert chosen(6964, 2048) == ("gathered", "absorbed")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("absorbed form for 6964 tokens" in line for line in lines) == 1  # once


def layer(**options) -> Attention:
    """The tiny config's attention, which keeps 64 tokens."""
    config, options = DeepseekV32Config.tiny(), ComputeOptions(dtype="float32", **options)
    graphdef, params, rest = fill(nnx.eval_shape(lambda: Attention(nnx.Rngs(0), config, options)))
    return nnx.merge(graphdef, params, rest)


def inputs_of(x_BSD):
    tokens = jnp.zeros(x_BSD.shape[:2], jnp.int32)
    return make_layer_inputs(DeepseekV32Config.tiny(), tokens, make_documents(tokens, None, None))


def output(x_BSD, **options):
    """The layer's output, compiled."""
    return jax.jit(lambda x: layer(**options)(x, inputs_of(x))[0], compiler_options=FAST_COMPILE)(x_BSD)


def hidden(length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(length).standard_normal((1, length, 128)), jnp.float32)


def difference(ours, theirs) -> float:
    """Relative L2."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("length", [40, 64])
def test_nothing_is_scored_where_everything_is_selected(length, monkeypatch, caplog):
    x = hidden(length)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def general(x):
        module, inputs = layer(attention="gathered", query_chunk=16), inputs_of(x)
        made, indexer = module.project(x, inputs), module.indexer
        listed = indexer.select(x, made.qr_BSR, indexer.keys(x, inputs), inputs)
        return module.attend(made, listed, inputs)[0], listed

    expected, listed = general(x)
    np.testing.assert_array_equal((listed.indices_BSK >= 0).sum(axis=-1)[0], np.arange(1, length + 1))
    monkeypatch.setattr(Indexer, "queries", None)  # calling it would raise
    indexer._log_skip.cache_clear()
    with caplog.at_level(logging.INFO, logger="fathom"):
        out = output(x)
    assert np.abs(expected).max() > 0.1
    assert difference(out, expected) < 1e-6
    assert any(f"{length} entries are no more than top-k 64" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("length", [100, 256])
def test_the_fused_version_is_the_general_one(length):
    """With a selection: the indexer keeps 64."""
    x = hidden(length)
    fused = output(x)
    for attention in ("masked", "gathered"):
        assert difference(fused, output(x, attention=attention, query_chunk=48)) < 1e-6
    assert difference(output(x, stage="dense"), fused) > 1e-3  # the selection matters


def test_approximate_selection_reaches_the_layer(monkeypatch):
    targets, original = [], jax.lax.approx_max_k

    def spy(scores, k, recall_target):
        targets.append((k, recall_target))
        return original(scores, k, recall_target=recall_target)

    monkeypatch.setattr(jax.lax, "approx_max_k", spy)
    exact = output(hidden(100))
    assert not targets
    approx = output(hidden(100), selection="approx", recall_target=0.9)
    assert set(targets) == {(64, 0.9)}
    assert difference(approx, exact) < 1e-6  # off the TPU it finds all
