"""Grouped matmul against a float64 loop over groups, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.mesh import make_mesh
from fathom.ops.grouped_matmul import (
    IMPLEMENTATIONS,
    TILE_ROWS,
    chosen_implementation,
    grouped_matmul,
)

ROWS = 2 * TILE_ROWS + 5  # not a multiple of the tile
CASES = {
    "even": (ROWS, [33, 33, 33, 34]),
    "empty groups": (ROWS, [0, 70, 0, 63]),
    "unused rows": (ROWS, [10, 0, 41, 3]),
    "one group has all": (ROWS, [0, 0, ROWS, 0]),
    "groups end on tiles": (ROWS, [TILE_ROWS, 0, TILE_ROWS, 2]),
    "nothing": (ROWS, [0, 0, 0, 0]),
    "less than a tile": (7, [2, 0, 4]),
    "one group": (9, [9]),
}


def make(num_rows, sizes, dtype=jnp.float32, inner=12, outer=10):
    keys = jax.random.split(jax.random.key(num_rows + sum(sizes)), 3)
    x = jax.random.normal(keys[0], (num_rows, inner), dtype)
    w = jax.random.normal(keys[1], (len(sizes), inner, outer), dtype)
    g = jax.random.normal(keys[2], (num_rows, outer), jnp.float32)
    # Rows nobody owns hold large values: any leak shows.
    x = x.at[sum(sizes) :].set(1e6)
    return x, w, jnp.asarray(sizes, jnp.int32), g


def expected(x, w, sizes, g):
    x, w, g = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, g))
    out = np.zeros((x.shape[0], w.shape[2]))
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        out[rows] = x[rows] @ w[e]
        dx[rows] = g[rows] @ w[e].T
        dw[e] = x[rows].T @ g[rows]
        start += size
    return out, dx, dw


def run(x, w, sizes, g, implementation):
    @jax.jit
    def both(x, w, g):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w)
        return out, *pull(g)

    return both(x, w, g)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_a_loop_over_groups(case, implementation):
    arrays = make(*CASES[case])
    got = run(*arrays, implementation)
    for name, a, b in zip(("out", "dx", "dw"), got, expected(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)
    used = sum(CASES[case][1])
    assert not np.any(np.asarray(got[0])[used:]) and not np.any(np.asarray(got[1])[used:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    x, w, sizes, g = make(ROWS, [50, 0, 60], jnp.bfloat16, inner=512)
    out, dx, dw = run(x, w, sizes, g, implementation)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    want = expected(x, w, sizes, g.astype(jnp.bfloat16))
    # bfloat16 products are exact in float32, so only the order of float32 sums differs.
    np.testing.assert_allclose(out, want[0], rtol=1e-4, atol=1e-4)
    for got, exact in ((dx, want[1]), (dw, want[2])):
        error = np.linalg.norm(np.asarray(got, np.float32) - exact) / np.linalg.norm(exact)
        assert error < 3e-3  # one rounding to bfloat16, 2^-9


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_auto_is_chosen_at_lowering(platform):
    x, w, sizes, _ = make(ROWS, [33, 33, 33, 34])

    def text(implementation):
        f = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation))
        return f.trace(x, w, sizes).lower(lowering_platforms=(platform,)).as_text()

    chosen = chosen_implementation(platform)
    assert chosen == {"cpu": "tiled", "tpu": "ragged"}[platform]
    assert ("stablehlo.while" in text("auto")) == (chosen == "tiled")
    assert ("ragged" in text("auto")) == ("ragged" in text(chosen))
    assert ("stablehlo.while" in text("ragged")) is False


@pytest.mark.parametrize("implementation", ["auto", "ragged"])
def test_inside_shard_map(implementation):
    """Every shard has its own rows, groups and matrices; axis types are checked."""
    mesh = make_mesh({"expert": 8})
    sizes = jnp.asarray([[3, 1], [0, 5], [2, 2], [0, 0], [6, 0], [1, 4], [3, 3], [0, 2]])
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (8, 6, 4))
    w = jax.random.normal(keys[1], (8, 2, 4, 3))

    def shard(x, w, sizes):
        return grouped_matmul(x[0], w[0], sizes[0], implementation)[None]

    def loss(f):
        return lambda x, w: jnp.sum(jnp.sin(f(x, w)))

    spec = jax.P("expert")
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(shard, in_specs=spec, out_specs=spec)
        grads = jax.jit(jax.grad(loss(lambda x, w: sharded(x, w, sizes)), (0, 1)))(x, w)
    plain = jax.vmap(lambda x, w, s: grouped_matmul(x, w, s, "reference"))
    want = jax.grad(loss(lambda x, w: plain(x, w, sizes)), (0, 1))(x, w)
    for got, ref in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, ref, rtol=1e-5, atol=1e-6)


def test_errors_name_what_was_found():
    x, w, sizes, _ = make(7, [2, 0, 4])
    with pytest.raises(ValueError, match="'fast'.*expected one of"):
        grouped_matmul(x, w, sizes, "fast")
    with pytest.raises(ValueError, match=r"\(7, 12\).*\(3, 10, 12\)"):
        grouped_matmul(x, jnp.swapaxes(w, 1, 2), sizes)
    with pytest.raises(ValueError, match=r"group sizes \(2,\)"):
        grouped_matmul(x, w, sizes[:2])
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
