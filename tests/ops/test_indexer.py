"""The indexer's selection, exact and approximate, and the mask made of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.layers.options import ComputeOptions
from fathom.ops import indexer
from fathom.ops.indexer import approximate_topk, exact_topk, indexer_topk
from fathom.ops.selection import Selected, VisibleRange, entry_mask
from fathom.plan.flops import count_flops

B, S, E, K = 4, 16, 1024, 64


def everything(shape=(B, S), entries=E) -> VisibleRange:
    return VisibleRange(jnp.zeros(shape, jnp.int32), jnp.full(shape, entries, jnp.int32))


def scores_of(kind: str, shape: tuple[int, int, int] = (B, S, E)) -> np.ndarray:
    rng = np.random.default_rng(0)
    random = rng.standard_normal(shape).astype(np.float32)
    if kind == "sorted":
        return np.sort(random, axis=-1)
    if kind == "clustered":  # the best are neighbours: eight runs of eight
        bump = np.zeros((*shape[:2], shape[2] // 8), np.float32)
        np.put_along_axis(bump, rng.random(bump.shape).argsort(axis=-1)[..., :8], 10.0, axis=-1)
        return random + np.repeat(bump, 8, axis=-1)
    return np.ones_like(random) if kind == "constant" else random


def recall(scores: np.ndarray, indices: np.ndarray) -> float:
    """Mean share of the true top-k's values that were found: ties count by value."""
    edge = np.sort(scores, axis=-1)[..., -indices.shape[-1]][..., None]
    return float((np.take_along_axis(scores, indices, axis=-1) >= edge).mean())


def grouped(original, axis: int):
    """What `approx_max_k` does on a TPU, where other platforms sort: the best of each of L groups.

    Axis -2 groups the entries i mod L, as the algorithm's paper does; -1, runs of neighbours, is the worst case here.
    """

    def fake(scores, k, recall_target):
        made = jax.eval_shape(
            lambda x: original(x, k, recall_target=recall_target, aggregate_to_topk=False)[0], scores
        )
        entries, made = jnp.arange(scores.shape[-1]), made.shape[-1]
        number = entries.reshape(-1, made) if axis == -2 else entries.reshape(made, -1)
        groups = scores.reshape(*scores.shape[:-1], *number.shape)
        best = groups.argmax(axis=axis)
        found = jnp.take_along_axis(jnp.broadcast_to(number, groups.shape), jnp.expand_dims(best, axis), axis=axis)
        values, place = jax.lax.top_k(groups.max(axis=axis), k)
        return values, jnp.take_along_axis(found.squeeze(axis), place, axis=-1)

    return fake


@pytest.mark.parametrize("primitive", ["platform", "grouped"])
@pytest.mark.parametrize("kind", ["random", "sorted", "clustered", "constant"])
@pytest.mark.parametrize("target", [0.8, 0.95])
def test_recall(kind, target, primitive, monkeypatch):
    if primitive == "grouped":
        monkeypatch.setattr(jax.lax, "approx_max_k", grouped(jax.lax.approx_max_k, axis=-2))
    scores = scores_of(kind)
    indices = np.asarray(approximate_topk(jnp.asarray(scores), everything(), K, target))
    assert indices.shape == (B, S, K) and indices.min() >= 0
    assert all(len(set(row)) == K for row in indices.reshape(-1, K))
    found = recall(scores, indices)
    print(f"{primitive}, {kind}, target {target}: recall {found:.4f}")
    assert found >= target - 0.01
    if primitive == "grouped" and kind == "random" and target == 0.8:
        assert found < 1  # the groups do lose some


@pytest.mark.parametrize("kind", ["random", "sorted", "clustered", "constant"])
def test_recall_at_the_released_size(kind, monkeypatch):
    """One row of 256 queries over 32,768 entries, top 512, by the grouping that a TPU does."""
    monkeypatch.setattr(jax.lax, "approx_max_k", grouped(jax.lax.approx_max_k, axis=-2))
    scores = scores_of(kind, (1, 256, 32768))
    indices = np.asarray(approximate_topk(jnp.asarray(scores), everything((1, 256), 32768), 512, 0.95))
    found = recall(scores, indices)
    print(f"{kind}: recall {found:.4f}")
    assert indices.shape == (1, 256, 512) and found >= 0.94


def test_approximate_takes_all_of_what_fits_and_nothing_invisible(monkeypatch):
    monkeypatch.setattr(jax.lax, "approx_max_k", grouped(jax.lax.approx_max_k, axis=-1))
    begin = jnp.broadcast_to(jnp.arange(S) * 7, (B, S)).astype(jnp.int32)
    count = jnp.broadcast_to(jnp.arange(S) * 8, (B, S)).astype(jnp.int32)  # 0 to 120, around K = 64
    visible = VisibleRange(begin, begin + count)
    got = np.asarray(approximate_topk(jnp.asarray(scores_of("random")), visible, K, 0.5))
    for row in range(B):
        for query in range(S):
            low, number = int(begin[row, query]), int(count[row, query])
            chosen = [i for i in got[row, query] if i >= 0]
            assert all(low <= i < low + number for i in chosen) and len(set(chosen)) == len(chosen)
            if number <= K:
                assert sorted(chosen) == list(range(low, low + number))


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_exact_is_a_stable_sort(kind):
    scores = scores_of(kind)
    end = np.broadcast_to(np.arange(S) * 8, (B, S)).astype(np.int32)
    got = np.asarray(exact_topk(jnp.asarray(scores), VisibleRange(jnp.zeros_like(end), jnp.asarray(end)), K))
    for row in range(B):
        for query in range(S):
            order = np.argsort(-scores[row, query, : end[row, query]], kind="stable")[:K]
            expected = [*order, *[-1] * (K - len(order))]
            np.testing.assert_array_equal(np.sort(got[row, query]), np.sort(expected))


def test_chunks_and_the_default_is_exact():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 37, 3, 8)), rng.standard_normal((2, 50, 8))
    w = rng.standard_normal((2, 37, 3))
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, w)]
    visible = everything((2, 37), 50)
    default = indexer_topk(*args, visible, 11, query_chunk=8)
    scores = np.einsum("bsne,bsn->bse", np.maximum(np.einsum("bsnh,beh->bsne", q, k), 0), w)
    np.testing.assert_array_equal(default, np.argsort(-scores, axis=-1, kind="stable")[..., :11])
    whole = indexer_topk(*args, visible, 11, selection="exact", recall_target=0.1)
    np.testing.assert_array_equal(default, whole)
    approx = indexer_topk(*args, visible, 11, selection="approx", recall_target=0.9)
    np.testing.assert_array_equal(np.sort(approx, axis=-1), np.sort(default, axis=-1))  # off the TPU it finds all
    with pytest.raises(ValueError, match="unknown indexer selection 'some'"):
        indexer_topk(*args, visible, 11, selection="some")


@pytest.mark.parametrize(
    "bad", [dict(selection="best"), dict(recall_target=1.2), dict(recall_target=0), dict(mla_form="x")]
)
def test_options_refuse_bad_values(bad):
    with pytest.raises(ValueError, match=f"ComputeOptions.{next(iter(bad))}: found"):
        ComputeOptions(**bad)
    ComputeOptions(selection="approx", recall_target=1)


@pytest.mark.parametrize("keep", [0, 1, 9, 23])
def test_scatter_mask_is_the_broadcast_comparison(keep):
    entries, rng = 23, np.random.default_rng(keep)
    # Duplicates, -1 and numbers past the end among them.
    indices = rng.integers(-1, entries + 3, (2, 5, keep)).astype(np.int32)
    if keep == entries:
        indices[0] = rng.permuted(np.tile(np.arange(entries), (5, 1)), axis=-1)
    expected = (indices[..., None] == np.arange(entries)).any(axis=-2)
    mask = entry_mask(Selected(jnp.asarray(indices)), entries)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


def test_scatter_mask_never_holds_indices_times_entries():
    text = str(jax.make_jaxpr(lambda i: entry_mask(Selected(i), 1001))(jnp.zeros((2, 5, 77), jnp.int32)))
    assert "[2,5,1001]" in text
    assert "77,1001" not in text and "1001,77" not in text


def test_approximate_selection_is_the_tpu_primitive(monkeypatch):
    """In the lowering, and in the program that the compiler makes for a v5p."""
    pytest.importorskip("libtpu", reason="compiles for a TPU topology with libtpu")
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    # So many entries that groups pay: for few the compiler sorts them all.
    args = (spec((1, 16, 8, 128), "bfloat16"), spec((1, 65536, 128), "bfloat16"), spec((1, 16, 8), "float32"))
    visible = VisibleRange(*[spec((1, 16), "int32")] * 2)
    for selection in ("approx", "exact"):

        def select(q, k, w, visible, selection=selection):
            return indexer.indexer_topk(q, k, w, visible, 512, selection=selection)

        lowered = jax.jit(select).trace(*args, visible).lower(lowering_platforms=("tpu",))
        assert ("ApproxTopK" in lowered.as_text()) == (selection == "approx")
        if selection == "approx":
            assert 'custom_call_target="PartialReduce"' in lowered.compile().as_text()


@pytest.mark.parametrize("packed", [False, True])
def test_fewer_entries_are_scored_than_sorted(packed, monkeypatch):
    """As on a TPU: two sorts are compiled, and the products of each chunk are of little more than it sees."""
    monkeypatch.setattr(indexer, "SCORED", 8)
    monkeypatch.setattr(indexer, "LENGTHS", {"cpu": 2})
    monkeypatch.setattr(indexer, "SHORTEST", {"cpu": 16})
    monkeypatch.setattr(indexer, "SCORED_SHORTEST", 16)
    entries, queries, keep = 168, 336, 16
    lengths = indexer.sorted_lengths(entries, keep)
    assert lengths == [16, 84, 168]
    assert [indexer.scored_lengths(entries, b, a) for a, b in zip(lengths, lengths[1:], strict=False)] == [
        [21, 42, 63, 84], [105, 126, 147, 168]
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, queries, 3, 8)), rng.standard_normal((2, entries, 8))
    w = rng.standard_normal((2, queries, 3))
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, w)]
    begin = np.tile(np.where(np.arange(queries) < 200, 0, 100) * packed, (2, 1)).astype(np.int32)
    end = np.tile(np.arange(queries) // 2, (2, 1)).astype(np.int32)
    visible = VisibleRange(jnp.asarray(begin), jnp.asarray(end))
    got = np.asarray(indexer_topk(*args, visible, keep, query_chunk=8))
    scores = np.einsum("bsne,bsn->bse", np.maximum(np.einsum("bsnh,beh->bsne", q, k), 0), w)
    for row in range(2):
        for query in range(queries):
            low, high = begin[row, query], end[row, query]
            order = low + np.argsort(-scores[row, query, low:high], kind="stable")[:keep]
            chosen = got[row, query][got[row, query] >= 0]
            np.testing.assert_array_equal(np.sort(chosen), np.sort(order))


def test_plans_count_what_causal_queries_score(monkeypatch):
    """`fathom plan` weighs the lengths by how many chunks of a row take each."""
    monkeypatch.setattr(indexer, "LENGTHS", {"cpu": 2})
    monkeypatch.setattr(indexer, "SCORED_SHORTEST", 1024)
    entries, keep, heads, width, chunk = 16384, 512, 4, 8, 64
    shapes = [(1, 65536, heads, width), (1, entries, width), (1, 65536, heads)]
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    end = jnp.arange(65536, dtype=jnp.int32)[None] // 4
    visible = VisibleRange(jnp.zeros_like(end), end)
    monkeypatch.setattr(indexer, "bisects", lambda num_entries: False)
    counted = count_flops(lambda *a: indexer_topk(*a, visible, keep, query_chunk=chunk), *args)
    needed = np.asarray(end)[0, chunk - 1 :: chunk]
    sizes = [512, *(1024 * (i + 1) for i in range(16))]
    scored = np.array([0, *sizes[1:]])[np.searchsorted(sizes, needed)].sum() * chunk
    assert counted == pytest.approx(2.0 * heads * (width + 1) * scored, rel=1e-3)
