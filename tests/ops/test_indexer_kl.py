"""The indexer's loss against a plain float64 transcription of its formula: values, gradients, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops import indexer_kl as module
from fathom.ops.indexer import indexer_topk
from fathom.ops.indexer_kl import Teacher, indexer_kl
from fathom.ops.selection import Selected, VisibleRange
from fathom.plan.flops import count_flops

B, S, E, N, H, I, J, K = 2, 45, 11, 3, 16, 4, 8, 5  # noqa: E741
SCALE = H**-0.5


def make(seed: int, dtype=jnp.float32):
    """(q, k, weights) of the indexer, the teacher, and which entries a query sees."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    index = normal(B, S, I, J), normal(B, E, J), normal(B, S, I).astype(jnp.float32)
    q, keys = normal(B, S, N, H), normal(B, E, H)
    end = np.minimum((np.arange(S) + 1) // 4, E)
    begin = np.where(np.arange(S) >= 30, 3, 0)  # a second document
    visible = VisibleRange(*(jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B, S)) for x in (begin, end)))
    # the denominator holds window and sink too: anything larger than the entries' own
    scores = jnp.einsum("bsnh,beh->bsne", q, keys).astype(jnp.float32) * SCALE
    mask = (jnp.arange(E) >= visible.begin_BS[..., None]) & (jnp.arange(E) < visible.end_BS[..., None])
    own = jax.nn.logsumexp(jnp.where(mask[:, :, None], scores, -1e30), axis=-1)
    lse = jnp.logaddexp(own, jnp.asarray(rng.standard_normal((B, S, N)), jnp.float32))
    return index, Teacher(q, keys, lse, SCALE), visible


def plain(index, teacher, mask_BSE) -> np.ndarray:
    """The formula, query by query in float64: loss [B, S], and its gradients by the product rule."""
    q, k, w = (np.asarray(x, np.float64) for x in index)
    tq, keys, lse = (np.asarray(x, np.float64) for x in teacher[:3])
    loss, dq, dk, dw = np.zeros((B, S)), np.zeros_like(q), np.zeros_like(k), np.zeros_like(w)
    for b in range(B):
        for s in range(S):
            seen = np.flatnonzero(mask_BSE[b, s])
            if not seen.size:
                continue
            p = sum(np.exp(SCALE * keys[b, seen] @ tq[b, s, n] - lse[b, s, n]) for n in range(N))
            p = p / p.sum()
            products = k[b, seen] @ q[b, s].T  # [entries, index heads]
            score = np.maximum(products, 0) @ w[b, s]
            soft = np.exp(score - score.max())
            soft = soft / soft.sum()
            loss[b, s] = np.sum(p * (np.log(p) - np.log(soft)))
            d = soft - p
            on = (products > 0) * d[:, None]
            dw[b, s] = np.maximum(products, 0).T @ d
            dq[b, s] = w[b, s][:, None] * (on.T @ k[b, seen])
            dk[b, seen] += (on * w[b, s]) @ q[b, s]
    return loss, (dq, dk, dw)


def mask_of(selection) -> np.ndarray:
    if isinstance(selection, VisibleRange):
        begin, end = (np.asarray(x)[..., None] for x in selection)
        return (np.arange(E) >= begin) & (np.arange(E) < end)
    listed = np.asarray(selection.indices_BSK)
    return (listed[..., None] == np.arange(E)).any(axis=2)


def selected(index, visible) -> Selected:
    return Selected(indexer_topk(*index, visible, K))


def some_lengths(monkeypatch):
    """Ranges of 3, 6, 9 and 11 entries."""
    monkeypatch.setattr(module, "LENGTHS", 4)
    monkeypatch.setattr(module, "SHORTEST", 2)
    assert module.range_lengths(E) == [3, 6, 9, 11]


@pytest.mark.parametrize("stage", ["all visible", "in ranges", "selected"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_and_gradients_are_the_formulas(seed, stage, monkeypatch):
    index, teacher, visible = make(seed)
    selection = selected(index, visible) if stage == "selected" else visible
    chunk = 16
    if stage == "in ranges":
        some_lengths(monkeypatch)
        chunk = 4
    expected, gradients = plain(index, teacher, mask_of(selection))
    assert (expected[:, 7:29] > 0).all() and (expected[:, :3] == 0).all()  # nothing is visible before the first entry
    assert mask_of(selection).sum(-1).max() == (K if stage == "selected" else 8)
    total = lambda *index: indexer_kl(*index, teacher, selection, query_chunk=chunk).sum()  # noqa: E731
    found = indexer_kl(*index, teacher, selection, query_chunk=chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for mine, exact in zip(jax.grad(total, argnums=(0, 1, 2))(*index), gradients, strict=True):
        assert np.linalg.norm(np.asarray(mine) - exact) < 1e-5 * np.linalg.norm(exact)


def test_the_teacher_gets_exactly_nothing():
    index, teacher, visible = make(0)
    arrays = teacher[:3]

    def loss(arrays):
        return indexer_kl(*index, Teacher(*arrays, SCALE), selected(index, visible)).sum()

    for gradient in jax.grad(loss)(arrays):
        assert not gradient.any()


def test_chunks_and_bfloat16_change_nothing_but_rounding(monkeypatch):
    index, teacher, visible = make(3, jnp.bfloat16)
    whole = indexer_kl(*index, teacher, visible, query_chunk=64)
    wide = tuple(x.astype(jnp.float32) for x in index), Teacher(*(x.astype(jnp.float32) for x in teacher[:3]), SCALE)
    np.testing.assert_allclose(whole, indexer_kl(*wide[0], wide[1], visible), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(module, "MAX_SCORES", 7 * I * E)  # chunks of seven queries
    np.testing.assert_allclose(whole, indexer_kl(*index, teacher, visible, query_chunk=64), rtol=1e-6)


def test_a_head_that_sees_nothing_and_rows_without_entries():
    index, teacher, visible = make(0)
    blind = teacher._replace(lse_BSN=teacher.lse_BSN.at[:, :, 0].set(-jnp.inf))
    two = Teacher(teacher.q_BSNH[:, :, 1:], teacher.keys_BEH, teacher.lse_BSN[:, :, 1:], SCALE)
    one, other = (indexer_kl(*index, t, visible) for t in (blind, two))
    np.testing.assert_array_equal(one, other)
    nothing = VisibleRange(visible.end_BS, visible.end_BS)
    gradients = jax.grad(lambda *index: indexer_kl(*index, teacher, nothing).sum(), argnums=(0, 1, 2))(*index)
    assert not indexer_kl(*index, teacher, nothing).any() and not any(g.any() for g in gradients)
    none = indexer_kl(index[0], index[1][:, :0], index[2], teacher._replace(keys_BEH=teacher.keys_BEH[:, :0]), nothing)
    assert none.shape == (B, S) and not none.any()


@pytest.mark.parametrize("stage", ["all visible", "in ranges", "selected"])
def test_memory_grows_with_the_length_not_with_its_square(stage, monkeypatch):
    """Compiled temporaries of forward and backward at 4,096 and 8,192 tokens, entries of four tokens."""
    monkeypatch.setattr(module, "SHORTEST", 128 if stage == "in ranges" else 1 << 20)

    def temporaries(length: int) -> int:
        def f32(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        entries = length // 4
        seen = jax.ShapeDtypeStruct((1, length), jnp.int32)
        listed = jax.ShapeDtypeStruct((1, length, 64), jnp.int32)
        index = f32(1, length, I, J), f32(1, entries, J), f32(1, length, I)
        attention = f32(1, length, N, H), f32(1, entries, H), f32(1, length, N)

        def loss(index, attention, *selection):
            kind = Selected if stage == "selected" else VisibleRange
            return indexer_kl(*index, Teacher(*attention, SCALE), kind(*selection)).sum()

        selection = (listed,) if stage == "selected" else (seen, seen)
        compiled = jax.jit(jax.grad(loss)).lower(index, attention, *selection).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.2 * temporaries(4096)


def test_chunks_are_scored_up_to_what_they_see():
    """Operations of forward and backward of a causal row, as `fathom plan` counts them: a 32nd above the need."""
    length, entries = 65536, 16384

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    index = f32(1, length, I, J), f32(1, entries, J), f32(1, length, I)
    attention = f32(1, length, N, H), f32(1, entries, H), f32(1, length, N)
    end = jnp.arange(length, dtype=jnp.int32)[None] // 4

    def loss(index, attention):
        return indexer_kl(*index, Teacher(*attention, SCALE), VisibleRange(jnp.zeros_like(end), end)).sum()

    seen = entries * length / 2
    targets, scores, weighted = (2.0 * n * seen for n in (N * H, I * J, I))
    counted = count_flops(jax.grad(loss), index, attention)
    # The forward of the loss itself is of no use to the gradients; the backward makes targets and scores for itself.
    assert counted == pytest.approx((1 + 1 / 32) * (targets + 3 * scores + 3 * weighted), rel=0.01)
