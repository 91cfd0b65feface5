"""The attention op: its versions agree, its masks mean what they say, selection breaks ties by rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops.chunks import from_chunks, to_chunks
from fathom.ops.indexer import indexer_scores, indexer_topk
from fathom.ops.selection import Selected, VisibleRange, entry_mask
from fathom.ops.sparse_mqa import banded_sparse_mqa


def draw(mask) -> str:
    return "\n".join("".join("#" if x else "." for x in row) for row in np.asarray(mask))


def inputs(seed, length, entries, *, batch=2, heads=3, dim=16, window=7):
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (batch, length, heads, dim))
    kv = jax.random.normal(keys[1], (batch, length, dim))
    sink = jax.random.normal(keys[2], (heads,))
    compressed = jax.random.normal(keys[3], (batch, entries, dim))
    position = jnp.arange(length)
    band = jnp.broadcast_to(jnp.minimum(position + 1, window), (batch, length))
    return q, kv, sink, band, compressed


def by_hand(q, kv, sink, band, compressed, mask, scale):
    """Float64, one query and head at a time."""
    q, kv, sink, compressed = (np.asarray(x, np.float64) for x in (q, kv, sink, compressed))
    out = np.zeros(q.shape)
    for b, s, n in np.ndindex(*q.shape[:3]):
        recent = range(s - int(band[b, s]) + 1, s + 1)
        keys = [kv[b, t] for t in recent] + [
            compressed[b, e] for e in range(compressed.shape[1]) if mask[b, s, e]
        ]
        scores = np.array([q[b, s, n] @ k * scale for k in keys])
        weights = np.exp(scores)
        total = weights.sum() + np.exp(sink[n])
        out[b, s, n] = sum((w * k for w, k in zip(weights, keys, strict=True)), np.zeros(q.shape[-1]))
        out[b, s, n] /= total
    return out


@pytest.mark.parametrize("implementation", ["reference", "masked", "auto"])
@pytest.mark.parametrize("kind", ["range", "selected", "none"])
def test_against_a_loop_over_queries(implementation, kind):
    length, entries, window = 37, 9, 7
    q, kv, sink, band, compressed = inputs(0, length, entries, window=window)
    if kind == "range":
        end = jnp.broadcast_to((jnp.arange(length) + 1) // 4, (2, length))
        selection = VisibleRange(jnp.zeros_like(end), end)
    elif kind == "selected":
        indices = jax.random.randint(jax.random.key(9), (2, length, 4), -1, entries + 2)
        selection = Selected(indices)  # -1, duplicates and numbers past the end
    else:
        selection, compressed = None, compressed[:, :0]
    mask = np.zeros((2, length, 0)) if kind == "none" else np.asarray(entry_mask(selection, entries))
    out = banded_sparse_mqa(
        q, kv, sink, band, compressed, selection,
        scale=0.3, window=window, implementation=implementation, query_chunk=8,
    )  # fmt: skip
    expected = by_hand(q, kv, sink, band, compressed, mask, 0.3)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("window", [1, 5, 8, 9, 20])
@pytest.mark.parametrize("length", [1, 8, 30])
def test_fast_versions_equal_the_reference_with_gradients(window, length):
    q, kv, sink, band, compressed = inputs(1, length, 6, window=window)
    selection = Selected(jax.random.randint(jax.random.key(2), (2, length, 3), -1, 6))

    def loss(implementation, q, kv, sink, compressed):
        out = banded_sparse_mqa(
            q, kv, sink, band, compressed, selection,
            scale=0.25, window=window, implementation=implementation, query_chunk=8,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)), out

    results = [
        jax.value_and_grad(
            lambda *a, i=i: loss(i, *a), argnums=(0, 1, 2, 3), has_aux=True
        )(q, kv, sink, compressed)
        for i in ("reference", "masked", "auto")
    ]
    (_, out), grads = results[0]
    for (_, fast), fast_grads in results[1:]:
        np.testing.assert_allclose(out, fast, atol=1e-6)
        for a, b in zip(grads, fast_grads, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-6)  # sums of order 10: their last bits


def test_entry_masks_read_as_pictures():
    end = (jnp.arange(8)[None] + 1) // 2
    assert draw(entry_mask(VisibleRange(jnp.zeros_like(end), end), 4)[0]) == (
        "....\n#...\n#...\n##..\n##..\n###.\n###.\n####"
    )
    indices = jnp.array([[[-1, -1], [0, -1], [2, 2], [3, 0], [4, 1]]])
    assert draw(entry_mask(Selected(indices), 4)[0]) == "....\n#...\n..#.\n#..#\n.#.."


def test_a_query_that_sees_nothing_gets_zero_and_no_gradient():
    q, kv, sink, band, _ = inputs(3, 6, 0)
    band = band.at[:, 4:].set(0)

    def run(q):
        return banded_sparse_mqa(q, kv, sink, band, scale=0.3, window=7)

    out, vjp = jax.vjp(run, q)
    assert not np.any(out[:, 4:]) and np.all(np.isfinite(out))
    grad = vjp(jnp.ones_like(out))[0]
    assert not np.any(grad[:, 4:]) and np.all(np.isfinite(grad))


def test_errors_name_the_fix():
    q, kv, sink, band, compressed = inputs(0, 4, 3)
    with pytest.raises(ValueError, match="3 compressed entries and no selection"):
        banded_sparse_mqa(q, kv, sink, band, compressed, None, scale=1.0, window=7)
    with pytest.raises(ValueError, match="unknown sparse attention implementation 'flash'"):
        banded_sparse_mqa(q, kv, sink, band, scale=1.0, window=7, implementation="flash")


def test_chunks_round_trip():
    x = jnp.arange(2 * 11 * 3).reshape(2, 11, 3)
    np.testing.assert_array_equal(from_chunks(to_chunks(x, 4), 11), x)


@pytest.mark.parametrize("seed", range(3))
def test_indexer_topk_equals_a_stable_sort(seed):
    rng = np.random.default_rng(seed)
    length, entries, keep = 45, 40, 6
    q = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    k = rng.normal(size=(2, entries, 8)).astype(np.float32)
    w = rng.normal(size=(2, length, 4)).astype(np.float32)
    begin = jnp.asarray(rng.integers(0, 5, (2, length)))
    end = begin + jnp.asarray(rng.integers(0, 30, (2, length)))
    got = indexer_topk(q, k, w, VisibleRange(begin, end), keep, query_chunk=16)
    scores = np.asarray(indexer_scores(q, k, w))
    for b, s in np.ndindex(2, length):
        seen = np.arange(int(begin[b, s]), min(int(end[b, s]), entries))
        best = seen[np.argsort(-scores[b, s, seen], kind="stable")][:keep]
        expected = np.full(keep, -1)
        expected[: len(best)] = best
        np.testing.assert_array_equal(got[b, s], expected)


def test_indexer_ties_go_to_the_lowest_entry():
    length, entries = 5, 12
    q = jnp.ones((1, length, 2, 4))
    visible = VisibleRange(jnp.zeros((1, length), int), jnp.full((1, length), entries))
    all_off = indexer_topk(q, -jnp.ones((1, entries, 4)), jnp.ones((1, length, 2)), visible, 3)
    np.testing.assert_array_equal(all_off[0], np.tile([0, 1, 2], (length, 1)))
    keys = jnp.ones((1, entries, 4)).at[0, 7].set(2.0)
    one_better = indexer_topk(q, keys, jnp.ones((1, length, 2)), visible, 3)
    np.testing.assert_array_equal(one_better[0], np.tile([7, 0, 1], (length, 1)))
