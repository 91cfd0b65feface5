"""Sparse attention: its versions agree with the reference and with a loop in float64, and NaN stays where it is.

Letters: B batch, S queries, T rows, N heads, H channels, K rows listed per query.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops import sparse_mqa_short
from fathom.ops.segment_sum import add_rows, add_rows_in_order, add_rows_sorted
from fathom.ops.selection import Selected, VisibleRange
from fathom.ops.sparse_mqa import banded_sparse_mqa, choose_version, sparse_mqa

FAST = ("masked", "gathered")
BANDED = (*FAST, "auto")  # what "auto" takes for short sequences exists for the band only
RELATIVE = 1e-5


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(found, expected, tolerance=RELATIVE):
    """Largest difference, relative to the largest value; NaN and infinities in the same places."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        assert np.isfinite(a[finite]).all()
        scale = max(np.abs(b[finite]).max(initial=0), 1e-30)
        assert np.abs(a[finite] - b[finite]).max(initial=0) <= tolerance * scale


def random_case(seed):
    """Shapes, lists with repeats, -1 in the middle, numbers out of range, ties, empty rows, and sinks of +-inf."""
    rng = np.random.default_rng(seed)
    B, S, N = int(rng.integers(1, 3)), int(rng.integers(1, 23)), int(rng.integers(1, 4))
    T = (0, 1, 7, 40, 150, 601)[seed % 6]  # the last in several lengths of range, and padded to be so
    K, H = int(rng.integers(1, 12)), int(rng.integers(4, 17))
    value_dim = int(rng.integers(1, H + 1))
    indices = rng.integers(-2, T + 2, (B, S, K)).astype(np.int32)
    indices[:, :, K // 2] = -1
    indices[:, -1, -1] = T  # the first number out of range
    indices[0, S // 2] = -1  # a query that sees nothing
    indices[0, 0, : K // 2] = indices[0, 0, 0]  # repeats
    kv = normal(rng, B, T, H)
    if T > 3:
        kv = kv.at[:, 2].set(kv[:, 1])  # ties
    sink = np.resize([0.3, -np.inf, np.inf, -2.0], N).astype(np.float32)
    return rng, normal(rng, B, S, N, H), kv, jnp.asarray(indices), jnp.asarray(np.roll(sink, seed)), value_dim


def with_gradients(op, arrays, seed, dtype=jnp.float32):
    """(out, lse) and the gradients of a sum over both, in which infinite lse take no part."""

    def loss(*arrays):
        out, lse = op(*arrays)
        rng = np.random.default_rng(seed)
        weight_out, weight_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
        lse_term = jnp.where(jnp.isfinite(lse), lse, 0.0) * weight_lse
        return (out.astype(jnp.float32) * weight_out).sum() + lse_term.sum(), (out, lse)

    argnums = tuple(range(len(arrays)))
    (_, results), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*arrays)
    return results, gradients


def attend(q, kv, indices, sink=None, **options):
    """`sparse_mqa` compiled."""
    return jax.jit(lambda *arrays: sparse_mqa(*arrays, **options))(q, kv, indices, sink)


@pytest.mark.parametrize("seed", range(6))
def test_versions_equal_the_reference_with_every_gradient(seed):
    _, q, kv, indices, sink, value_dim = random_case(seed)

    def run(implementation):
        def op(q, kv, sink):
            return sparse_mqa(
                q, kv, indices, sink, scale=0.4, value_dim=value_dim,
                implementation=implementation, query_chunk=5, return_lse=True,
            )  # fmt: skip

        return with_gradients(op, (q, kv, sink), seed)

    expected = run("reference")
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected[1])])).all()
    for version in FAST:
        assert_close(run(version), expected)


def by_hand(q, kv, indices, sink, scale, value_dim):
    """float64, one query and head at a time."""
    q, kv, sink = (np.asarray(x, np.float64) for x in (q, kv, sink))
    out, lse = np.zeros((*q.shape[:3], value_dim)), np.zeros(q.shape[:3])
    for b, s, n in np.ndindex(*q.shape[:3]):
        rows = sorted({int(i) for i in indices[b, s] if 0 <= i < kv.shape[1]})
        keys = kv[b, rows]
        scores = np.append(keys @ q[b, s, n] * scale, sink[n])
        with np.errstate(divide="ignore", invalid="ignore"):
            lse[b, s, n] = np.logaddexp.reduce(scores)
        if rows and np.isfinite(lse[b, s, n]):
            out[b, s, n] = np.exp(scores[:-1] - lse[b, s, n]) @ keys[:, :value_dim]
    return out, lse


@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_against_a_loop_over_queries(implementation):
    _, q, kv, indices, sink, value_dim = random_case(3)
    found = attend(
        q, kv, indices, sink, scale=0.4, value_dim=value_dim,
        implementation=implementation, query_chunk=4, return_lse=True,
    )  # fmt: skip
    assert_close(found, by_hand(q, kv, indices, sink, 0.4, value_dim))


@pytest.mark.parametrize(
    ("kind", "seed"), [("selected", 0), ("selected", 3), ("range", 1), ("range", 2), ("none", 2)]
)
def test_banded_versions_equal_the_reference_with_every_gradient(kind, seed, monkeypatch):
    monkeypatch.setattr(sparse_mqa_short, "BLOCKS", {sparse_mqa_short.LENGTH: 5})
    monkeypatch.setattr(sparse_mqa_short, "SCORES", 1 + seed * 200)
    rng, q, entries, indices, sink, _ = random_case(seed + 2)
    B, S = q.shape[:2]
    window = (1, 3, 9, 40)[seed]
    tokens, band = normal(rng, B, S, q.shape[-1]), jnp.asarray(rng.integers(-1, window + 3, (B, S)))
    begin = rng.integers(-1, 5, (B, S))
    selection = {
        "selected": Selected(indices),
        "range": VisibleRange(jnp.asarray(begin), jnp.asarray(begin + rng.integers(-2, 300, (B, S)))),
        "none": None,
    }[kind]

    def run(implementation):
        def op(q, tokens, sink, entries):
            return banded_sparse_mqa(
                q, tokens, sink, band, entries if kind != "none" else None, selection,
                scale=0.4, window=window, implementation=implementation, query_chunk=6, return_lse=True,
            )  # fmt: skip

        return with_gradients(op, (q, tokens, sink, entries), seed)

    expected = run("reference")
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected[1])])).all()
    for version in BANDED if kind == "selected" else ("masked", "auto"):
        assert_close(run(version), expected)


@pytest.mark.parametrize("implementation", ("reference", *BANDED))
def test_nan_in_a_row_that_a_query_does_not_see_never_reaches_it(implementation):
    """Row 3 holds NaN and only query 6 lists it; token 5 holds infinity, in the band of queries 5 to 7."""
    rng = np.random.default_rng(0)
    q, kv, tokens, sink = normal(rng, 1, 12, 2, 8), normal(rng, 1, 9, 8), normal(rng, 1, 12, 8), jnp.zeros(2)
    bad_kv, bad_tokens = kv.at[0, 3, 2].set(jnp.nan), tokens.at[0, 5].set(jnp.inf)
    unseen = jnp.asarray(rng.choice([0, 1, 2, 4, 5, 6, 7, 8, -1], (1, 12, 4)))
    seen = unseen.at[0, 6].set(jnp.array([3, 4, -1, -1]))
    poisoned = np.isin(np.arange(12), (5, 6, 7))
    narrow = jnp.where(jnp.asarray(poisoned), 0, 3)[None]

    @jax.jit
    def run(q, tokens, kv, indices, band):
        def op(q, tokens, sink, kv):
            return banded_sparse_mqa(
                q, tokens, sink, band, kv, Selected(indices),
                scale=0.4, window=3, implementation=implementation, query_chunk=5,
            )  # fmt: skip

        out, pull = jax.vjp(op, q, tokens, sink, kv)
        return out, pull(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    out, _ = run(q, bad_tokens, bad_kv, seen, jnp.full((1, 12), 3))
    clean, _ = run(q, tokens, kv, seen, jnp.full((1, 12), 3))
    assert np.isnan(out[0, poisoned]).all()
    assert_close(out[0, ~poisoned], clean[0, ~poisoned])
    # Seen by nobody, the bad keys change neither output nor gradient, and have none.
    found, expected = run(q, bad_tokens, bad_kv, unseen, narrow), run(q, tokens, kv, unseen, narrow)
    assert_close(found, expected)
    assert not found[1][1][0, 5].any() and not found[1][3][0, 3].any()


@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_an_infinite_sink_takes_everything_and_gives_no_nan(implementation):
    rng = np.random.default_rng(1)
    q, kv, indices = normal(rng, 1, 6, 3, 8), normal(rng, 1, 5, 8), jnp.asarray(rng.integers(0, 5, (1, 6, 3)))
    indices = indices.at[0, 2].set(-1)
    sink = jnp.array([jnp.inf, -jnp.inf, 0.5])

    @jax.jit
    def run(q, kv, sink):
        def op(q, kv, sink):
            return sparse_mqa(q, kv, indices, sink, scale=0.3, implementation=implementation, return_lse=True)

        (out, lse), pull = jax.vjp(op, q, kv, sink)
        return out, lse, pull((jnp.ones_like(out), jnp.ones_like(lse)))

    out, lse, (dq, dkv, dsink) = run(q, kv, sink)
    assert not out[:, :, 0].any() and (lse[:, :, 0] == jnp.inf).all()
    without = attend(q, kv, indices, scale=0.3, implementation=implementation)
    np.testing.assert_allclose(out[:, :, 1], without[:, :, 1], rtol=1e-6)
    assert not out[0, 2].any() and lse[0, 2, 1] == -jnp.inf and lse[0, 2, 2] == 0.5
    assert all(np.isfinite(x).all() for x in (dq, dkv, dsink))
    assert not dq[:, :, 0].any() and dsink[0] == 6 and dsink[1] == 0


def test_stretches_merge_by_their_log_sum_exp():
    """Two halves of the list attended apart and merged give the whole, gradients too: lse is differentiated."""
    rng = np.random.default_rng(2)
    q, kv, sink = normal(rng, 1, 7, 2, 8), normal(rng, 1, 30, 8), normal(rng, 2)
    indices = jnp.asarray(np.stack([rng.permutation(30)[:10] for _ in range(7)])[None])

    def whole(q, kv, sink):
        return sparse_mqa(q, kv, indices, sink, scale=0.4, implementation="reference")

    def merged(q, kv, sink):
        parts = [
            sparse_mqa(q, kv, indices[..., half], s, scale=0.4, implementation="gathered", return_lse=True)
            for half, s in ((slice(0, 5), sink), (slice(5, 10), None))
        ]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(out * jnp.exp(part - lse)[..., None] for out, part in parts)

    def gradients(op):
        loss = jax.value_and_grad(lambda *args: jnp.sin(3 * op(*args)).sum(), (0, 1, 2))
        return jax.jit(loss)(q, kv, sink)

    assert_close(gradients(merged), gradients(whole))


# The shapes of the public kernel's tests (limits.md A1.1): queries, heads, width, listed, rows, tolerance.
ORACLE = [
    (5, 16, 64, 16, 73, 2e-2),
    (5, 16, 64, 48, 73, 2e-2),
    (2, 64, 512, 160, 256, 3e-2),
    (2, 64, 512, 640, 768, 3e-2),
    (1, 128, 512, 1152, 1280, 3e-2),
    (1, 64, 512, 2048, 2304, 3e-2),
]


@pytest.mark.parametrize(("length", "heads", "width", "listed", "num_rows", "tolerance"), ORACLE)
@pytest.mark.parametrize("version", FAST)
def test_oracle_shapes_in_bfloat16(version, length, heads, width, listed, num_rows, tolerance):
    rng = np.random.default_rng(listed)
    q, kv = normal(rng, 1, length, heads, width), normal(rng, 1, num_rows, width)
    indices = np.stack([rng.permutation(num_rows)[:listed] for _ in range(length)])[None].astype(np.int32)
    indices[0, 0, [1, 5, listed - 1]] = -1
    sink = jnp.linspace(-8, 8, heads)
    q, kv = q.astype(jnp.bfloat16), kv.astype(jnp.bfloat16)
    found = attend(q, kv, jnp.asarray(indices), sink, scale=width**-0.5, implementation=version)
    assert found.dtype == jnp.bfloat16
    expected, _ = by_hand(q, kv, indices, sink, width**-0.5, width)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("version", FAST)
def test_bfloat16_gradients_point_where_float64s_do(version):
    """The published backward's criterion, cosine above 0.999 with a tenth of the list at -1, and LSE within 2^-13."""
    rng = np.random.default_rng(7)
    q, kv, sink = normal(rng, 1, 16, 8, 64), normal(rng, 1, 96, 64), jnp.linspace(-2, 2, 8)
    indices = np.stack([rng.permutation(96)[:40] for _ in range(16)])[None]
    indices = jnp.asarray(np.where(rng.random(indices.shape) < 0.1, -1, indices))

    def run(implementation, dtype):
        def op(q, kv, sink):
            return sparse_mqa(
                q, kv, indices, sink, scale=0.125, implementation=implementation, query_chunk=4, return_lse=True
            )

        return with_gradients(op, (q.astype(dtype), kv.astype(dtype), sink), 0)

    (_, lse), found = run(version, jnp.bfloat16)
    q, kv = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, kv))
    (_, expected_lse), expected = run("reference", jnp.float32)
    np.testing.assert_allclose(lse, expected_lse, rtol=2**-13, atol=2**-13)
    for a, b in zip(found, expected, strict=True):
        a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("version", FAST)
def test_other_sequences_do_not_leak(version):
    """Two sequences of one pool, 130 and 177 rows; raising the other's rows by 8 must change nothing."""
    rng = np.random.default_rng(3)
    q, kv = normal(rng, 1, 6, 4, 32), normal(rng, 1, 307, 32)
    first = rng.permutation(130)[:24]
    indices = jnp.asarray(np.stack([first, 130 + rng.permutation(177)[:24]] * 3)[None])
    mine = jnp.arange(307) < 130

    def run(kv):
        return attend(q, kv, indices, jnp.zeros(4), scale=0.2, implementation=version, query_chunk=3)

    apart = run(kv + jnp.where(mine, 0.0, 8.0)[None, :, None])
    np.testing.assert_array_equal(apart[:, ::2], run(kv)[:, ::2])
    assert (apart[:, 1::2] != run(kv)[:, 1::2]).any()


def test_causal_chunks_read_only_the_rows_they_need():
    """A range beyond what any query of the chunk sees is not touched: it holds NaN that no penalty could hide."""
    from fathom.ops import sparse_mqa_masked as masked

    rows = masked.prepare(normal(np.random.default_rng(0), 1, 1000, 4))
    lengths = []

    def run(length, start):
        lengths.append(length)
        return jnp.stack([jnp.int32(length), start])

    def needed(begin, end):
        selection = VisibleRange(jnp.full((1, 3), begin), jnp.full((1, 3), end))
        return [int(x) for x in masked.for_needed_length(rows, selection, 1000, run)]

    # Seven lengths, of 143 rows and its multiples: 1,000 rows are padded to 1,001.
    assert needed(0, 1) == [143, 0]
    assert needed(0, 251) == [286, 0]
    assert needed(740, 990) == [286, 715]
    assert needed(900, 2000) == [143, 858]
    assert needed(5, 5) == [143, 858]  # nothing to see: whatever is cheapest
    assert needed(0, 1000) == [1001, 0]


@pytest.mark.parametrize("add", (add_rows, add_rows_in_order, add_rows_sorted))
def test_adding_rows(add):
    """Runs of every length up to all rows in one place; two runs of the program give the same bits."""
    rng = np.random.default_rng(4)
    for table_rows, count in ((1, 9), (7, 64)):
        index, rows = rng.integers(0, table_rows, count), rng.normal(size=(count, 3)).astype(np.float32)
        table = rng.normal(size=(table_rows, 3)).astype(np.float32)
        expected = table.astype(np.float64)
        np.add.at(expected, index, rows)
        compiled = jax.jit(add)
        found = compiled(table, jnp.asarray(index, jnp.int32), rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found, compiled(table, jnp.asarray(index, jnp.int32), rows))


@pytest.mark.parametrize(("kind", "version"), [("selected", "masked"), ("selected", "gathered"), ("range", "masked")])
def test_memory_grows_with_the_sequence_and_no_faster(version, kind):
    """Compiled temporaries of forward and backward, entries growing with the tokens."""

    def temporaries(length):
        # Few for the masked version, which is compiled once for each of up to four lengths of range.
        entries, picked = length // (4 if version == "gathered" else 16), 64

        def shaped(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype)

        integers = shaped(1, length, dtype=jnp.int32)
        selection = (
            Selected(shaped(1, length, picked, dtype=jnp.int32))
            if kind == "selected"
            else VisibleRange(integers, integers)
        )

        def loss(q, kv, sink, entries, band, selection):
            return banded_sparse_mqa(
                q, kv, sink, band, entries, selection, scale=0.1, window=32, implementation=version, query_chunk=16
            ).sum()

        args = (shaped(1, length, 4, 64), shaped(1, length, 64), shaped(4), shaped(1, entries, 64))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args, integers, selection).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = (temporaries(length) for length in (2048, 4096))
    assert large < 2.2 * small
    assert large < 4096 * 64 * 64 * 4 / 4  # a quarter of the gathered rows


def test_the_rule():
    few, many = Selected(jnp.zeros((1, 1, 512), jnp.int32)), VisibleRange(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    assert choose_version("auto", 4096, few) == "masked"
    assert choose_version("auto", 4097, few) == "gathered"
    assert choose_version("auto", 10**6, many) == "masked"  # a range has no list to gather
    assert choose_version("masked", 10**6, few) == "masked"
    assert choose_version("gathered", 10, few) == "gathered"


def test_errors_name_what_was_found():
    rng = np.random.default_rng(5)
    q, kv, sink = normal(rng, 1, 4, 2, 8), normal(rng, 1, 4, 8), jnp.zeros(2)
    indices = jnp.zeros((1, 4, 2), jnp.int32)
    with pytest.raises(ValueError, match="unknown sparse attention implementation 'flash'"):
        sparse_mqa(q, kv, indices, sink, scale=1.0, implementation="flash")
    with pytest.raises(ValueError, match=r"rows have shape \(1, 4, 6\)"):
        sparse_mqa(q, kv[..., :6], indices, sink, scale=1.0)
    with pytest.raises(ValueError, match="rows are bfloat16, expected the queries' float32"):
        sparse_mqa(q, kv.astype(jnp.bfloat16), indices, sink, scale=1.0)
    with pytest.raises(ValueError, match="expected one for each of 2 heads"):
        sparse_mqa(q, kv, indices, jnp.zeros(3), scale=1.0)
    with pytest.raises(ValueError, match="value_dim is 9"):
        sparse_mqa(q, kv, indices, sink, scale=1.0, value_dim=9)
    with pytest.raises(ValueError, match="the selection is float32"):
        sparse_mqa(q, kv, indices.astype(jnp.float32), sink, scale=1.0)
    with pytest.raises(ValueError, match="4 compressed entries and no selection"):
        banded_sparse_mqa(q, kv, sink, jnp.ones((1, 4), int), kv, scale=1.0, window=2)
