"""A sublayer in stretches equals the same functions around the attention of the whole sequence, and stays small.

Letters: B batch, S queries, R low rank, N heads, H channels, D output, E entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.ops.chunked_layer import attend_in_chunks
from fathom.ops.selection import Selected, VisibleRange
from fathom.ops.sparse_mqa import banded_sparse_mqa, sparse_mqa

R, N, H, D = 6, 3, 12, 10


def queries(params, inputs):
    q = jnp.einsum("bsr,rnh->bsnh", inputs["qr"], params["up"], precision="highest")
    return q * jnp.cos(inputs["positions"])[..., None, None].astype(q.dtype)


def project(params, inputs, out):
    out = out * jnp.tanh(inputs["qr"][..., :1, None]).astype(out.dtype)
    out = out * jnp.sin(1 + inputs["positions"])[..., None, None].astype(out.dtype)
    return jnp.einsum("bsnh,nhd->bsd", out, params["down"][:, : out.shape[-1]], precision="highest")


def arrays(rng, batch, length, entries, dtype=jnp.float32):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, dtype)

    params = {"up": normal(R, N, H), "down": normal(N, H, D)}
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    inputs = {"qr": normal(batch, length, R), "positions": positions}
    sink = jnp.array([0.5, jnp.inf, -jnp.inf])
    return params, inputs, normal(batch, length, H), sink, normal(batch, entries, H)


def whole_and_chunked(kind, implementation, *, length, layer_chunk, query_chunk, window=7):
    """The outputs, and the gradients of their weighted sum, computed at once and in stretches.

    The sum itself is the test's own and cancels to any number of digits: it is not compared.
    """
    rng = np.random.default_rng(length)
    params, inputs, kv, sink, entries = arrays(rng, 2, length, 23)
    band = jnp.asarray(rng.integers(0, window + 1, (2, length)))
    begin = rng.integers(0, 9, (2, length))
    selection = {
        "selected": Selected(jnp.asarray(rng.integers(-2, 25, (2, length, 5)))),
        "range": VisibleRange(jnp.asarray(begin), jnp.asarray(begin + rng.integers(-1, 15, (2, length)))),
        "none": None,
        "no band": Selected(jnp.asarray(rng.integers(-2, 25, (2, length, 5)))),
    }[kind]
    weight = jnp.asarray(rng.normal(size=(2, length, D)))
    common = dict(scale=0.4, query_chunk=query_chunk)

    def at_once(params, inputs, kv, sink, entries):
        q = queries(params, inputs)
        if kind == "no band":
            out = sparse_mqa(q, entries, selection.indices_BSK, sink, value_dim=9, implementation="reference", **common)
        else:
            out = banded_sparse_mqa(
                q, kv, sink, band, entries if selection else None, selection,
                window=window, implementation="reference", **common,
            )  # fmt: skip
        return project(params, inputs, out)

    def in_stretches(params, inputs, kv, sink, entries):
        none = kind == "no band"
        return attend_in_chunks(
            queries, project, params, inputs, None if none else kv, sink, None if none else band,
            entries if selection else None, selection, window=0 if none else window, value_dim=9 if none else None,
            layer_chunk=layer_chunk, implementation=implementation, **common,
        )[0]  # fmt: skip

    def run(layer):
        def loss(params, qr, kv, sink, entries):
            y = layer(params, dict(inputs, qr=qr), kv, sink, entries)
            return (y * weight).sum(), y

        step = jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)
        return jax.jit(step)(params, inputs["qr"], kv, sink, entries)

    return run(at_once), run(in_stretches)


@pytest.mark.parametrize(
    ("kind", "implementation", "length", "layer_chunk", "query_chunk"),
    [
        ("selected", "gathered", 37, 16, 4),
        ("selected", "masked", 32, 8, 5),  # stretches that steps do not divide
        ("range", "masked", 37, 16, 16),
        ("none", "masked", 19, 4, 3),  # a band that reaches over more than one stretch
        ("selected", "gathered", 5, 1024, 64),
        ("no band", "gathered", 21, 8, 8),
    ],
)
def test_equal_to_the_whole_sequence_at_once(kind, implementation, length, layer_chunk, query_chunk):
    expected, found = whole_and_chunked(
        kind, implementation, length=length, layer_chunk=layer_chunk, query_chunk=query_chunk
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """64 stretches add up to what one gives; sums kept in bfloat16 would lose the later ones."""
    params, inputs, kv, sink, _ = arrays(np.random.default_rng(0), 1, 512, 1, jnp.bfloat16)
    inputs["qr"] = jnp.abs(inputs["qr"])

    def gradients(layer_chunk):
        def loss(params):
            y, _ = attend_in_chunks(
                queries, project, params, inputs, jnp.abs(kv), sink, jnp.full((1, 512), 7),
                scale=0.1, window=7, layer_chunk=layer_chunk, query_chunk=8,
            )  # fmt: skip
            return jnp.abs(y.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss))(params)["down"].astype(jnp.float32)

    whole = gradients(512)
    np.testing.assert_allclose(gradients(8), whole, atol=0.01 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("kind", ("csa", "hca"))
def test_nothing_as_wide_as_the_queries_is_kept(kind):
    """Compiled temporaries of forward and backward grow with the sequence, and are a fraction of its queries."""
    heads, width = 16, 64

    def temporaries(length):
        def shaped(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype)

        params = {"up": shaped(16, heads, width), "down": shaped(heads, width, 16)}
        integers = shaped(1, length, dtype=jnp.int32)
        selection = (
            Selected(shaped(1, length, 16, dtype=jnp.int32)) if kind == "csa" else VisibleRange(integers, integers)
        )

        def loss(params, qr, kv, entries, positions, selection):
            return attend_in_chunks(
                queries, project, params, {"qr": qr, "positions": positions}, kv, jnp.zeros(heads), positions,
                entries, selection, scale=0.1, window=16, layer_chunk=64, query_chunk=16,
            )[0].sum()  # fmt: skip

        args = params, shaped(1, length, 16), shaped(1, length, width), shaped(1, length // 32, width)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args, integers, selection).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large < 2.2 * small
    assert large < 4096 * heads * width * 4 / 3  # a third of the queries in float32


def test_errors_name_the_fix():
    params, inputs, kv, sink, entries = arrays(np.random.default_rng(0), 1, 4, 3)
    with pytest.raises(ValueError, match="3 compressed entries and no selection"):
        attend_in_chunks(
            queries, project, params, inputs, kv, sink, jnp.ones((1, 4), int), entries, scale=1.0, window=2
        )
    with pytest.raises(ValueError, match="window 0 and no entries to attend to"):
        attend_in_chunks(queries, project, params, inputs, None, sink, scale=1.0, window=0)
