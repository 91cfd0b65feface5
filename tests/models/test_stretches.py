"""An attention sublayer worked through in stretches is the one worked through whole: output, loss, every gradient."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.layers.options import ComputeOptions
from fathom.layers.remat import remat
from fathom.layers.shards import Place
from fathom.models.deepseek_v4 import attention as v4
from fathom.models.deepseek_v4.compressors import Compressor
from fathom.models.deepseek_v32 import attention as v32
from fathom.ops.chunks import map_chunks
from fathom.train.state import named_leaves
from tests.models.small import FAST_COMPILE, RATIOS, fill, packed_rows, small_config
from tests.models.test_v32_model import small_config as small_v32_config

# Compiled functions are shared, so all of it runs in one worker.
pytestmark = pytest.mark.xdist_group("stretches")

ERROR = 1e-5
PACKED = [(16, 4, 3, 1, 33, 20), (60, 7, 20), (5,)]
"""Windows that close at a stretch's first and last token, two in a row, and most of a row of padding."""


class Rows(NamedTuple):
    """Packed rows, or of one document each, of so many tokens."""

    packed: bool
    length: int


PACKED_90, SINGLE_96 = Rows(True, 90), Rows(False, 96)


class Case(NamedTuple):
    """Stretches of so many tokens of these rows; other options by name."""

    rows: Rows
    stretch: int
    options: tuple[tuple[str, Any], ...] = ()


def case(rows: Rows, stretch: int, **options) -> Case:
    return Case(rows, stretch, tuple(options.items()))


CASES = {
    # In V4's rows of one document 16 is whole windows of both kinds, 24 of CSA's alone, and 36 does not divide 96.
    "sliding": [case(PACKED_90, 7), case(PACKED_90, 24, remat="attention")],
    "hca": [case(PACKED_90, 7), case(PACKED_90, 16, remat="attention"), case(SINGLE_96, 16), case(SINGLE_96, 24)],
    "csa": [case(SINGLE_96, 36, remat="attention")],
    "csa, sparse": [
        case(PACKED_90, 7, attention="gathered"),
        case(PACKED_90, 16, attention="masked", remat="attention"),
        case(SINGLE_96, 24, attention="gathered"),
        case(SINGLE_96, 3),  # fewer tokens than a window, and than the tokens before it that it pools
    ],
    "csa, warm-up": [case(PACKED_90, 16)],
    "mla": [case(PACKED_90, 24, attention="masked", remat="attention")],
    "mla, sparse": [
        case(PACKED_90, 7, attention="gathered"),
        case(PACKED_90, 24, attention="masked"),
        case(PACKED_90, 16, attention="gathered", remat="attention"),
        case(SINGLE_96, 24, attention="masked"),
    ],
    "mla, warm-up": [case(PACKED_90, 7, attention="masked")],
}
"""Sublayer, and the stage in which its indexer learns, if it does."""


def make_options(kind: str, **changes) -> ComputeOptions:
    # Steps that no stretch is a multiple of.
    values = dict(dtype="float32", query_chunk=5)
    if "mla" in kind:
        values["mla_form"] = "absorbed"
    if "," in kind:
        values.update(indexer_loss=True, stage={"sparse": "sparse", "warm-up": "indexer-warmup"}[kind.split(", ")[1]])
    return ComputeOptions(**values, **changes)


def make_layer(kind: str, options: ComputeOptions):
    """(graphdef, weights far from their initial values, function from tokens and documents to the layer's inputs)."""
    kind = kind.split(",")[0]
    if kind == "mla":
        config = small_v32_config()
        layer = nnx.eval_shape(lambda: nnx.List([v32.Attention(nnx.Rngs(0), config, options)]))
        inputs = functools.partial(v32.make_layer_inputs, config)
    else:
        # The indexer keeps 4 of up to 24 entries.
        config = small_config(("sliding", "csa", "hca"), index_top_k=4)
        layer = nnx.eval_shape(lambda: nnx.List([v4.Attention(nnx.Rngs(0), config, kind, RATIOS[kind], options)]))
        inputs = functools.partial(v4.make_layer_inputs, config)
    graphdef, params, rest = fill(layer)
    assert not nnx.to_flat_state(rest)
    return graphdef, params, inputs


def hidden(rows: Rows) -> np.ndarray:
    return np.random.default_rng(rows.length).standard_normal((len(PACKED), rows.length, 64)).astype(np.float32)


def function_of(kind: str, rows: Rows, **changes):
    """A function (params, x) -> (gradients of both, (y, loss)), the gradients of y's and the loss's sum."""
    options = make_options(kind, **changes)
    graphdef, _, make_inputs = make_layer(kind, options)
    batch = packed_rows(PACKED, rows.length, 264)
    layout = (batch["positions"], batch["segment_ids"]) if rows.packed else (None, None)
    tokens = jnp.asarray(batch["tokens"])
    inputs = make_inputs(tokens, make_documents(tokens, *layout))
    towards = np.random.default_rng(1).standard_normal((*tokens.shape, 64)).astype(np.float32)

    def total(params, x):
        def layer(params, x, inputs):
            return nnx.merge(graphdef, params)[0](x, inputs)

        y, loss = remat(layer, options.remat)(params, x, inputs)
        return jnp.sum(y * towards) + loss, (y, loss)

    return jax.grad(total, (0, 1), has_aux=True)


def params_of(kind: str) -> nnx.State:
    return make_layer(kind, make_options(kind))[1]


@functools.cache
def whole(kind: str, rows: Rows) -> dict[str, np.ndarray]:
    compute = jax.jit(function_of(kind, rows), compiler_options=FAST_COMPILE)
    return named_leaves(jax.device_get(compute(params_of(kind), hidden(rows))))


@functools.cache
def in_stretches(kind: str) -> dict[Case, dict[str, np.ndarray]]:
    """Every case of a kind, from one program."""
    functions = {c: function_of(kind, c.rows, stretch=c.stretch, **dict(c.options)) for c in CASES[kind]}
    places = {rows: hidden(rows) for rows in {c.rows for c in functions}}

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params, places):
        return [function(params, places[c.rows]) for c, function in functions.items()]

    found = jax.device_get(run(params_of(kind), places))
    return dict(zip(functions, map(named_leaves, found), strict=True))


def name_of(value: Any) -> str:
    if not isinstance(value, Case):
        return str(value)
    rows = f"{'packed' if value.rows.packed else 'single'} {value.rows.length}"
    return " ".join([rows, "by", str(value.stretch), *(str(x) for _, x in value.options)])


EACH = [(kind, c) for kind, cases in CASES.items() for c in cases]


@pytest.mark.parametrize(("kind", "one"), EACH, ids=name_of)
def test_stretches_change_no_output_and_no_gradient(kind, one):
    want, got = whole(kind, one.rows), in_stretches(kind)[one]
    assert list(got) == list(want)
    errors = {}
    for leaf, value in want.items():
        learns = "," in kind  # without a loss of its own an indexer has none and learns nothing
        assert np.any(value) == (learns or not (leaf == "1/1" or "indexer" in leaf)), leaf
        errors[leaf] = np.linalg.norm(got[leaf] - value) / max(np.linalg.norm(value), 1e-30)
    assert {leaf: error for leaf, error in errors.items() if not error < ERROR} == {}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_wide_of_the_whole_row_is_made(kind):
    """Neither the queries of all tokens nor an indexer's, nor what CSA's compressor projects them to."""

    def wide(**changes) -> set[str]:
        compute = jax.jit(function_of(kind, SINGLE_96, attention="masked", **changes))
        text = compute.lower(params_of(kind), hidden(SINGLE_96)).as_text()
        return set(re.findall(r"tensor<3x96x(?:4x\d+|16x\d+|160)xf32>", text))

    assert wide() and wide(stretch=16) == set()


@pytest.mark.parametrize("kind", ["csa, sparse", "mla, sparse"])
def test_activation_checkpointing_keeps_what_stretches_have_selected(kind):
    """The policy "attention" does not select again in the backward; "full" does."""
    for policy, times in (("none", 1), ("attention", 1), ("full", 2)):
        compute = jax.jit(function_of(kind, SINGLE_96, stretch=24, remat=policy))
        text = compute.lower(params_of(kind), hidden(SINGLE_96)).as_text()
        assert text.count("chlo.top_k") == times, policy


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """1,024 equal terms; a sum in bfloat16 stops growing at 256."""
    rows = jnp.ones((1, 1024))
    scaled = jax.jit(jax.grad(lambda k: map_chunks(lambda c: c * k.astype(jnp.float32), rows, 1).sum()))
    assert scaled(jnp.bfloat16(1)) == 1024
    sizes = dict(hidden_size=8, width=8, ratio=4, overlap=False, eps=1e-6, stddev=0.1, dtype="bfloat16")
    graphdef, state = nnx.split(Compressor(nnx.Rngs(0), **sizes))
    length = 4 * 1024
    windows = make_documents(jnp.zeros((1, length), jnp.int32), None, None).windows(4)
    token = np.random.default_rng(0).standard_normal((1, 1, 8))
    x = jnp.asarray(np.tile(token, (1, length, 1)), jnp.bfloat16)

    def gradient(stretch):
        def total(state):
            return nnx.merge(graphdef, state)(x, windows, Place(stretch=stretch)).astype(jnp.float32)[..., 0].sum()

        return float(jax.jit(jax.grad(total))(state)["norm"]["weight"][...][0])

    assert abs(gradient(None)) > 1000
    np.testing.assert_allclose(gradient(4), gradient(None), rtol=2**-7)
