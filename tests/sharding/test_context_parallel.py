"""A sequence cut over devices: what crosses between them, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from fathom import zoo
from fathom.layers.documents import make_documents
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.options import ComputeOptions
from fathom.layers.shards import Shard
from fathom.mesh import abstract_mesh, make_mesh, sharding_scope
from fathom.models.deepseek_v4 import attention as v4
from fathom.models.deepseek_v32 import attention as v32
from fathom.ops.permute import gather_rows
from tests.models.small import FAST_COMPILE, FP32, RATIOS, fill, packed_rows, random_model, small_config, small_spec
from tests.models.test_v32_model import random_model as random_v32_model
from tests.models.test_v32_model import small_config as small_v32_config
from tests.sharding.meshes import Leaves, compiled_on, too_far

# Compiled functions are shared, so all of it runs in one worker.
pytestmark = pytest.mark.xdist_group("context parallel")

BATCH, LENGTH = 8, 88
# Cut into pieces of 22 or 44 tokens: documents over up to four devices, devices of padding alone, windows of both
# ratios that close on a device's first and last token.
DOCUMENTS = [(40, 25, 13), (88,), (6, 16, 20, 46), (20,), (60, 28), (5, 5, 70), (18, 4, 17, 17), (31, 1)]
V4 = small_config(("csa", "hca"), index_top_k=4, num_mtp_layers=0)
V32 = small_v32_config(ffn_kinds=("dense", "moe"))
SPECS = {"v4": small_spec(V4), "v32": zoo.get("deepseek-v3.2-tiny").with_config(V32)}
RULES = SPECS["v4"].preset("default") | SPECS["v32"].preset("default")
LONG = SPECS["v4"].preset("long") | SPECS["v32"].preset("long")


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    return packed_rows(DOCUMENTS, LENGTH, 264, seed)


def model(name: str, options: ComputeOptions):
    """(graphdef, params, other state) of either small model."""
    return random_model(V4, options) if name == "v4" else random_v32_model(V32, options)


@functools.cache
def trained(name: str, shape: tuple[tuple[str, int], ...] | None, options: ComputeOptions) -> Leaves:
    """((loss, aux), gradients) by name."""
    graphdef, params, rest = model(name, options)
    weights = LossWeights(mtp=0.3, balance=1e-2, indexer=1.0)

    def loss(params, rest, batch):
        return SPECS[name].loss(nnx.merge(graphdef, params, rest), batch, weights, count_targets(batch))

    compute = jax.value_and_grad(loss, has_aux=True)
    call, _ = compiled_on(dict(shape) if shape else None, RULES, compute, params, rest, batch())
    return call(batch())


def on_mesh(name: str, shape: dict[str, int] | None, **changes) -> Leaves:
    return trained(name, tuple(shape.items()) if shape else None, dataclasses.replace(FP32, **changes))


# Whole models


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"context": 4, "data": 2}, {"attention": "gathered"}),
        (
            {"tensor": 2, "context": 4},
            {"attention": "masked", "mla_form": "absorbed", "stretch": 7, "remat": "attention"},
        ),
        ({"fsdp": 2, "expert": 2, "context": 2}, {}),
    ],
    ids=lambda value: " ".join(map(str, [x for item in value.items() for x in item])),
)
def test_v32_is_that_of_one_device(shape, options):
    assert too_far(on_mesh("v32", shape, **options), on_mesh("v32", None)) == {}


@pytest.mark.parametrize("name", ["v4", "v32"])
def test_the_indexers_learn_what_they_learn_on_one_device(name):
    """In the stage in which they select, 4 of up to 22 entries and 12 of up to 88 tokens; on the mesh in stretches."""
    options = {"indexer_loss": True, "stage": "sparse"}
    want = on_mesh(name, None, **options)
    got = on_mesh(name, {"context": 4, "tensor": 2}, **options, stretch=7, attention="gathered", mla_form="absorbed")
    assert want["0/1/loss/indexer"] > 0.05
    assert too_far(got, want) == {}
    learned = {leaf for leaf, value in want.items() if "indexer" in leaf and np.any(value)}
    assert len(learned) >= 5
    assert too_far(*({leaf: leaves[leaf] for leaf in sorted(learned)} for leaves in (got, want)), floor=0.0) == {}


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("v4", {"context": 4, "data": 2}, {"stretch": 5}),
        ("v4", {"fsdp": 2, "tensor": 2, "context": 2}, {}),
        ("v32", {"context": 4, "data": 2}, {}),
    ],
    ids=["v4 context", "v4 mixed", "v32 context"],
)
def test_queries_exchanged_for_equal_work_change_nothing(name, shape, options):
    """The indexers train; of a device's 22 or 44 tokens half are another's, across borders of documents."""
    training = {"indexer_loss": True, "stage": "sparse"}
    with mock.patch.object(Shard, "from_mirror", autospec=True, side_effect=Shard.from_mirror) as exchange:
        got = on_mesh(name, shape, balance=True, **training, **options)
    assert exchange.called
    assert too_far(got, on_mesh(name, None, **training)) == {}


@pytest.mark.parametrize("name", ["v4", "v32"])
def test_no_document_changes_a_bit_of_another(name):
    graphdef, params, rest = model(name, FP32)

    def logits(params, rest, batch):
        out = nnx.merge(graphdef, params, rest)(batch["tokens"], batch["positions"], batch["segment_ids"])
        return [x for x in (out.logits, out.mtp_logits) if x is not None]

    rows = batch()
    call, _ = compiled_on({"data": 2, "context": 4}, RULES, logits, params, rest, rows)
    segments, want = rows["segment_ids"], call(rows)
    for number in range(4):  # 0 is padding
        inside = segments == number
        other = {**rows, "tokens": np.where(inside, (rows["tokens"] + 101) % 264, rows["tokens"]).astype(np.int32)}
        for leaf, got in call(other).items():
            assert np.isfinite(got).all()
            np.testing.assert_array_equal(got[~inside], want[leaf][~inside])
            if number:
                assert np.any(got[inside] != want[leaf][inside], axis=-1).all()


# Sublayers in rows of one document, whose windows are aligned

SUBLAYERS = (("csa", 128), ("csa", 96), ("hca", 128), ("mla", 96))
"""Each of 4 devices holds whole windows. Stretches of 12 are whole windows of CSA, and divide a device's 24 tokens
but not its 32. MLA attends to all tokens."""


def sublayers(**changes):
    """A function of (params, rest, x of each sublayer) to ((outputs, losses), gradients), params and other state."""
    options = dataclasses.replace(FP32, indexer_loss=True, **changes)
    v32_config = dataclasses.replace(V32, index_top_k=128)

    def make() -> nnx.List:
        layers = [
            v32.Attention(nnx.Rngs(0), v32_config, options)
            if kind == "mla"
            else v4.Attention(nnx.Rngs(0), V4, kind, RATIOS[kind], options)
            for kind, _ in SUBLAYERS
        ]
        return nnx.List(layers)

    graphdef, params, rest = fill(nnx.eval_shape(make))

    def total(params, rows, rest):
        made, weighted = [], 0.0
        for (kind, _), layer, x in zip(SUBLAYERS, nnx.merge(graphdef, params, rest), rows, strict=True):
            tokens = jnp.zeros(x.shape[:2], jnp.int32)
            documents = make_documents(tokens, None, None)
            if kind == "mla":
                inputs = v32.make_layer_inputs(v32_config, tokens, documents)
            else:
                inputs = v4.make_layer_inputs(V4, tokens, documents)
            y, loss = layer(x, inputs)
            made.append((y, loss))
            towards = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
            weighted += jnp.sum(y * towards) + loss
        return weighted, made

    def compute(params, rest, *rows):
        grads, made = jax.grad(total, (0, 1), has_aux=True)(params, rows, rest)
        return made, grads

    return compute, params, rest


def hidden() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, length, 64)).astype(np.float32) for _, length in SUBLAYERS]


@functools.cache
def sublayers_on_one_device() -> Leaves:
    call, _ = compiled_on(None, RULES, *sublayers(), *hidden())
    return call(*hidden())


@pytest.mark.parametrize(
    ("shape", "rules", "options"),
    [
        ({"context": 4, "tensor": 2}, {}, {}),
        ({"fsdp": 2, "context": 2, "data": 2}, LONG, {"stretch": 12, "attention": "masked", "mla_form": "absorbed"}),
    ],
    ids=["a stretch per device", "sequence cut over two axes, in stretches"],
)
def test_rows_of_one_document_are_those_of_one_device(shape, rules, options):
    call, _ = compiled_on(shape, RULES | rules, *sublayers(**options), *hidden())
    assert too_far(call(*hidden()), sublayers_on_one_device(), floor=0.0) == {}


# What crosses between devices

PIECES = {"one axis": {"context": 8}, "two axes": {"expert": 2, "context": 4}}


def tokens_before(x, count: int, pieces: int):
    """The definition: the `count` tokens before each piece of the row, zeros before the row, one after another."""
    length = x.shape[1] // pieces
    padded = jnp.concatenate([jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype), x], axis=1)
    return jnp.concatenate([padded[:, i * length :][:, :count] for i in range(pieces)], axis=1)


@pytest.mark.parametrize("axes", PIECES)
@pytest.mark.parametrize(
    ("counts", "exchanges"), [((0, 0), 0), ((2, 0), 1), ((2, 3), 1), ((3, 7), 3), ((30, 2), 7), ((7, 30), 7)]
)
def test_tokens_before_a_devices_own(axes, counts, exchanges):
    """Over several neighbours too, and before the row's start: 3 tokens on each of 8 devices."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 24, 5), (2, 24, 3, 2)))
    cotangents = [
        rng.standard_normal((2, 8 * n, *a.shape[2:])).astype(np.float32) for n, a in zip(counts, (x, y), strict=True)
    ]
    sequence = tuple(PIECES[axes])
    spec = PartitionSpec(None, sequence)
    shard = Shard(sequence, 8)

    def by_devices(x, y):
        made = jax.shard_map(
            lambda x, y: shard.before({"x": x, "y": y}, dict(zip("xy", counts, strict=True))),
            in_specs=(spec, spec),
            out_specs=spec,
            check_vma=False,
        )(x, y)
        return made["x"], made["y"]

    def by_hand(x, y):
        return tuple(tokens_before(a, n, 8) for n, a in zip(counts, (x, y), strict=True))

    def both(function):
        def total(x, y):
            made = function(x, y)
            return sum(jnp.vdot(a, b) for a, b in zip(made, cotangents, strict=True)), made

        return jax.jit(jax.grad(total, (0, 1), has_aux=True), compiler_options=FAST_COMPILE)

    want = both(by_hand)(x, y)
    with jax.set_mesh(make_mesh(PIECES[axes])):
        lowered = jax.jit(by_devices).lower(x, y).as_text()
        got = both(by_devices)(x, y)
    assert lowered.count("stablehlo.collective_permute") == exchanges
    np.testing.assert_array_equal(got[1][0], want[1][0])
    np.testing.assert_array_equal(got[1][1], want[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got[0], want[0])


def test_rows_moved_and_their_gradient_are_the_dense_products():
    rng = np.random.default_rng(0)
    moved, slots = 9, 13
    places, inverse = np.full((3, moved), -1, np.int32), np.full((3, slots), -1, np.int32)
    for row, count in enumerate((9, 4, 0)):
        to, source = rng.permutation(moved)[:count], rng.permutation(slots)[:count]
        places[row, to], inverse[row, source] = source, to
    x, towards = (rng.standard_normal((3, n, 2, 5)).astype(np.float32) for n in (slots, moved))
    dense = (places[..., None] == np.arange(slots)).astype(np.float32)  # a negative place is no slot

    def pulled(function):
        made, pull = jax.vjp(function, jnp.asarray(x))
        return made, *pull(jnp.asarray(towards))

    got = pulled(lambda x: gather_rows(x, places, inverse))
    want = pulled(lambda x: jnp.einsum("bet,btxy->bexy", dense, x, precision="highest"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    # A row that is not finite and in no place of the result does not reach it, forward or backward.
    unread = jnp.asarray(x).at[2].set(jnp.nan)
    assert np.isfinite(gather_rows(unread, places, inverse)).all()


@pytest.mark.parametrize("name", ["v4", "v32"])
@pytest.mark.parametrize(
    ("shape", "rows", "problem"),
    [
        ({"context": 8}, (1, 92), r"sequence length 92 is not divisible by 8, .*\('context',\) that 'act_sequence'"),
        ({"data": 3}, (2, 96), r"batch size 2 is not divisible by 3, .*'data'.* that 'act_batch'"),
        ({"tensor": 8}, (1, 96), r"number of heads or groups [24] is not divisible by 8, .*\('tensor',\)"),
    ],
    ids=["sequence", "batch", "heads"],
)
def test_what_the_mesh_does_not_divide_is_refused(name, shape, rows, problem):
    if name == "v4":
        graphdef, state = nnx.split(nnx.eval_shape(lambda: v4.Attention(nnx.Rngs(0), V4, "csa", 4, FP32)))
        make_inputs = functools.partial(v4.make_layer_inputs, V4)
    else:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: v32.Attention(nnx.Rngs(0), V32, FP32)))
        make_inputs = functools.partial(v32.make_layer_inputs, V32)

    def run(state, x, tokens):
        inputs = make_inputs(tokens, make_documents(tokens, None, None))
        return nnx.merge(graphdef, state)(x, inputs)

    shapes = jax.ShapeDtypeStruct((*rows, 64), "float32"), jax.ShapeDtypeStruct(rows, "int32")
    with sharding_scope(abstract_mesh(shape), RULES):
        with pytest.raises(ValueError, match=problem):
            jax.eval_shape(lambda *args: run(*args), state, *shapes)
