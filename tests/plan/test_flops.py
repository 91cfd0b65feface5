"""Operations counted from a jaxpr: each loop as often as it runs, whatever wraps it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fathom.plan.flops import count_flops, matrix_products, product_table

M, K, N = 8, 16, 4
X = jax.ShapeDtypeStruct((M, K), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((K, K), jnp.float32)
W = jax.ShapeDtypeStruct((K, N), jnp.float32)
ONE = 2 * M * K * K
"""X @ SQUARE once."""


def repeated(step, trips, x, w):
    return jax.lax.scan(lambda c, _: (step(c, w), None), x, None, length=trips)[0]


def layer(x, w):
    return jnp.tanh(x @ w)


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("mk,kn->mn", ((M, K), (K, N)), 2 * M * K * N),
        ("bmk,bkn->bmn", ((3, M, K), (3, K, N)), 2 * 3 * M * K * N),
        ("bsnh,beh->bnse", ((2, M, 3, K), (2, 5, K)), 2 * 2 * 3 * M * 5 * K),
        ("mkj,kjn->mn", ((M, K, 3), (K, 3, N)), 2 * M * 3 * K * N),
        ("mk,kn->mn", ((M, 0), (0, N)), 0),
    ],
)
def test_a_product_is_2mnk(equation, shapes, expected):
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    assert count_flops(functools.partial(jnp.einsum, equation), *args) == expected


def test_ragged_products_and_their_gradients():
    groups = jax.ShapeDtypeStruct((3,), jnp.int32)
    w = jax.ShapeDtypeStruct((3, K, N), jnp.float32)
    assert count_flops(jax.lax.ragged_dot, X, w, groups) == 2 * M * K * N

    def loss(x, w, groups):
        return jnp.square(jax.lax.ragged_dot(x, w, groups)).sum()

    # The gradient of w contracts over the ragged rows, and its result has a dimension of groups.
    both = jax.value_and_grad(loss, argnums=(0, 1))
    assert count_flops(both, X, w, groups) == 3 * 2 * M * K * N


@pytest.mark.parametrize(("groups", "batch_groups"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_is_its_kernel_per_output(groups, batch_groups):
    images = jax.ShapeDtypeStruct((4, 6, 10, 9), jnp.float32)
    kernel = jax.ShapeDtypeStruct((8, 6 // groups, 3, 2), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 1), "VALID", feature_group_count=groups, batch_group_count=batch_groups
        )

    out = jax.eval_shape(convolve, images, kernel).shape
    assert out == (4 // batch_groups, 8, 4, 8)
    assert count_flops(convolve, images, kernel) == 2 * np.prod(out) * (6 // groups) * 3 * 2


def test_a_scan_counts_its_length_and_nested_ones_multiply():
    assert count_flops(functools.partial(repeated, layer, 5), X, SQUARE) == 5 * ONE
    inner = functools.partial(repeated, layer, 5)
    outer = functools.partial(repeated, lambda x, w: inner(x, w) @ w, 3)
    assert count_flops(outer, X, SQUARE) == 3 * (5 + 1) * ONE
    assert count_flops(functools.partial(repeated, layer, 0), X, SQUARE) == 0


def test_the_backward_of_a_scan_has_two_products_per_trip():
    def loss(x, w):
        return jnp.sum(repeated(layer, 5, x, w))

    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), X, SQUARE) == 5 * 3 * ONE


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_while_loops_whose_trips_follow_from_constants(wrap):
    def counted(x, w):  # a bound that is an array lowers to a while loop
        return jax.lax.fori_loop(2, jnp.int32(7), lambda i, c: layer(c, w), x)

    def undecided(x, w):  # a product stands in the condition, and x decides
        def again(state):
            x, reach, limit = state
            return (reach < limit) & ((x[:1] @ w)[0, 0] < jnp.inf)

        return jax.lax.while_loop(again, lambda s: (layer(s[0], w), 2 * s[1], s[2]), (x, 1, 100))[0]

    def squares(x, w):
        def step(state):
            x, i, reach = state
            return layer(x, w), i + 1, i * i

        return jax.lax.while_loop(lambda s: s[2] < 26, step, (x, jnp.int32(3), jnp.int32(0)))[0]

    def passed_on(x, w):  # the bound is an argument of a jitted function
        inner = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n + 1, lambda i, c: layer(c, w), x))
        return inner(x, w, jnp.int32(3))

    def in_a_scan(x, w):
        bound = jnp.int32(3)
        return repeated(lambda c, w: jax.lax.fori_loop(0, bound, lambda i, c: layer(c, w), c), 2, x, w)

    assert count_flops(wrap(counted), X, SQUARE) == 5 * ONE
    assert count_flops(wrap(in_a_scan), X, SQUARE) == 2 * 3 * ONE
    assert count_flops(wrap(squares), X, SQUARE) == 4 * ONE  # 0, 9, 16, 25, 36
    assert count_flops(wrap(passed_on), X, SQUARE) == 4 * ONE
    with pytest.raises(ValueError, match=r"while loop at test_flops\.py:\d+.* number of trips"):
        count_flops(wrap(undecided), X, SQUARE)


def test_an_unbounded_while_is_an_error_only_with_products():
    def until(step):
        return lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 3.0, lambda c: step(c, w), x)

    with pytest.raises(ValueError, match=r"while loop at test_flops\.py:\d+.*fori_loop"):
        count_flops(until(layer), X, SQUARE)
    with pytest.raises(ValueError, match="while loop"):
        count_flops(lambda x, w, n: jax.lax.fori_loop(0, n, lambda i, c: layer(c, w), x), X, SQUARE, 3)
    with pytest.raises(ValueError, match="passes"):  # follows from constants, and never ends
        count_flops(
            lambda x, w: jax.lax.while_loop(lambda s: s[1] < 5, lambda s: (layer(s[0], w), s[1]), (x, 0))[0], X, SQUARE
        )
    with pytest.raises(ValueError, match="while loop"):  # products in the condition alone
        count_flops(lambda x, w: jax.lax.while_loop(lambda c: (c @ w).sum() < 3.0, jnp.sin, x), X, SQUARE)
    assert count_flops(until(lambda c, w: 2 * c), X, SQUARE) == 0


def test_branches_are_averaged_or_the_costliest_taken():
    def run(index, x, w):
        return jax.lax.switch(index, [lambda: x, lambda: x @ w, lambda: layer(layer(x, w), w) @ w], *())

    assert count_flops(run, 0, X, SQUARE) == pytest.approx((0 + 1 + 3) / 3 * ONE)
    assert count_flops(run, 0, X, SQUARE, branches="max") == 3 * ONE
    half = functools.partial(repeated, lambda x, w: jax.lax.cond(x[0, 0] > 0, layer, lambda x, w: x, x, w), 6)
    assert count_flops(half, X, SQUARE) == 3 * ONE
    assert count_flops(functools.partial(run, jnp.int32(1)), X, SQUARE, branches="max") == ONE  # a known index
    with pytest.raises(ValueError, match="branches: found 'min'"):
        count_flops(run, 0, X, SQUARE, branches="min")


def test_the_branch_of_the_platform_counts():
    def run(x, w):
        return jax.lax.platform_dependent(
            x, w, cuda=lambda x, w: x @ w @ w, tpu=layer, default=lambda x, w: x @ w @ w @ w
        )

    assert count_flops(run, X, SQUARE, platform="tpu") == ONE
    assert count_flops(run, X, SQUARE, platform="cuda") == 2 * ONE
    assert count_flops(run, X, SQUARE) == 3 * ONE  # these tests run on the CPU
    with pytest.raises(ValueError, match="'rocm'"):
        count_flops(lambda x, w: jax.lax.platform_dependent(x, w, cpu=layer), X, SQUARE, platform="rocm")


def loss_of_two(x, w, w2):
    return jnp.sum(layer(x, w) @ w2)


def test_remat_counts_what_is_computed_again():
    arrays, second = (X, SQUARE, W), 2 * M * K * N
    plain = jax.value_and_grad(loss_of_two, argnums=(0, 1, 2))
    assert count_flops(plain, *arrays) == 3 * ONE + 3 * second
    again = jax.value_and_grad(jax.checkpoint(loss_of_two), argnums=(0, 1, 2))
    # x @ w again; the second product's result is not needed by its own gradient.
    assert count_flops(again, *arrays) == 4 * ONE + 3 * second


def test_what_no_result_needs_is_not_counted():
    # The loss itself is not asked for: its second product falls away, the first one's result is in the gradients.
    gradients = jax.grad(loss_of_two, argnums=(0, 1, 2))
    assert count_flops(gradients, X, SQUARE, W) == 3 * ONE + 2 * 2 * M * K * N
    assert count_flops(lambda x, w: (layer(x, w), x)[1], X, SQUARE) == 0


@jax.custom_vjp
def odd(x, w):
    return layer(x, w)


odd.defvjp(
    lambda x, w: (layer(layer(x, w), w), (x, w)),
    lambda saved, g: (repeated(layer, 4, g, saved[1]), jnp.zeros_like(saved[1])),
)


@jax.custom_jvp
def odd_forward(x, w):
    return layer(x, w)


@odd_forward.defjvp
def _(primals, tangents):
    x, w = primals
    return layer(layer(layer(x, w), w), w), tangents[0] @ w @ w


def test_custom_derivatives_count_their_own_rules():
    assert count_flops(odd, X, SQUARE) == ONE
    both = jax.value_and_grad(lambda x, w: odd(x, w).sum())
    assert count_flops(both, X, SQUARE) == (2 + 4) * ONE
    assert count_flops(functools.partial(repeated, odd, 5), X, SQUARE) == 5 * ONE
    assert count_flops(odd_forward, X, SQUARE) == ONE
    both = jax.value_and_grad(lambda x, w: odd_forward(x, w).sum())
    assert count_flops(both, X, SQUARE) == (3 + 2) * ONE


def test_shard_map_counts_every_device():
    x = jax.ShapeDtypeStruct((16, K), jnp.float32)
    whole = 2 * 16 * K * K

    def mapped(function, spec, axes):
        return jax.shard_map(function, in_specs=(spec, P()), out_specs=spec, axis_names={axes}, check_vma=False)

    def count(mesh, function, spec):
        with jax.set_mesh(mesh):
            return count_flops(mapped(function, spec, "data"), x, SQUARE)

    def mesh(*sizes):
        return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))

    one, two = mesh(8), mesh(2, 4)
    # Each of eight devices multiplies its own two rows, five times.
    assert count(one, functools.partial(repeated, layer, 5), P("data")) == 5 * whole
    # Rows that every device has are multiplied by every device.
    assert count(one, layer, P()) == 8 * whole

    assert count(two, layer, P("data")) == whole  # along "model" the arrays are whole
    assert count(two, mapped(layer, P("model"), "model"), P("data")) == whole


def _kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...]


def test_a_pallas_kernel_counts_its_estimate():
    def call(estimate):
        return pl.pallas_call(
            _kernel, out_shape=jax.ShapeDtypeStruct((M, K), jnp.float32), name="copy", cost_estimate=estimate
        )

    estimate = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
    run = functools.partial(repeated, lambda x, w: call(estimate)(x), 5)
    assert count_flops(run, X, SQUARE) == 5 * 123
    with pytest.raises(ValueError, match=r"pallas_call 'copy' at .*cost_estimate"):
        count_flops(call(None), X)


def test_calls_that_cannot_be_looked_into_are_refused():
    with pytest.raises(ValueError, match="ffi_call"):
        count_flops(lambda x: jax.ffi.ffi_call("product", jax.ShapeDtypeStruct((M, M), jnp.float32))(x), X)
    solve = functools.partial(jax.lax.custom_linear_solve, solve=lambda _, b: b, symmetric=True)
    with pytest.raises(ValueError, match="custom_linear_solve"):
        count_flops(lambda a, b: solve(lambda x: a @ x, b), SQUARE, jax.ShapeDtypeStruct((K,), jnp.float32))


def test_as_the_compiler_counts_without_loops():
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    w = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    step = jax.value_and_grad(lambda w, x: jnp.sum(layer(layer(x, w), w) @ w), argnums=(0, 1))
    theirs = jax.jit(step).lower(w, x).cost_analysis()["flops"]
    assert count_flops(step, w, x) == pytest.approx(theirs, rel=0.05)


def test_the_breakdown_names_shapes_runs_and_places():
    def run(x, w, w2):
        return repeated(layer, 5, x, w) @ w2

    (first, times), (second, once) = matrix_products(run, X, SQUARE, W)
    assert (times, once) == (5, 1)
    assert first.primitive == "dot_general" and first.flops == ONE
    assert first.shapes == f"float32[{M},{K}] float32[{K},{K}] -> float32[{M},{K}]"
    assert first.source.startswith("test_flops.py:") and "layer" in first.source and "run" in second.source
    lines = product_table(run, X, SQUARE, W, top=1).splitlines()
    assert len(lines) == 2 and first.shapes in lines[1] and first.source in lines[1]
    assert product_table(lambda x: x, X).endswith("0 flops in all")


def test_what_stands_twice_in_a_body_counts_once():
    def twice(x, w):
        # The second of each is another equation of the same operands; the last product has others.
        return jnp.tanh(x @ w) + jnp.sin(x @ w) + jnp.einsum("bd,de->be", x * 2, w) - jnp.einsum("bd,de->be", x * 2, w)

    x, w = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert count_flops(twice, x, w) == 2 * (2 * 3 * 5 * 7)
    assert count_flops(lambda x, w: jnp.tanh(x @ w) + (2 * x) @ w + x @ (w + 1), x, w) == 3 * (2 * 3 * 5 * 7)
