"""What crosses between the devices of a row, sublayer by sublayer, in the compiled program: what the design says and
nothing more. Counted in elements that a device receives, forward, and backward on top of it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.documents import make_documents
from fathom.models.deepseek_v4 import attention as v4
from fathom.models.deepseek_v32 import attention as v32
from fathom.train.state import named_leaves
from tests.models.small import FP32, RATIOS, fill, packed_rows, small_config, small_spec
from tests.models.test_v32_model import small_config as small_v32_config
from tests.sharding.meshes import compiled_on

PIECES, BATCH, LENGTH = 4, 2, 128
MINE = LENGTH // PIECES
V4 = small_config(("sliding", "csa", "hca"), index_top_k=4)
V32 = small_v32_config(index_top_k=12)
RULES = small_spec(V4).preset("default") | zoo.get("deepseek-v3.2-tiny").preset("default")
PACKED = packed_rows([(40, 25, 13, 30), (5, 100)], LENGTH, 264)
KINDS = ("sliding", "csa", "hca", "mla")

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")


def collectives(program: str) -> dict[str, int]:
    """Of each kind of collective in a compiled program the elements of all arrays of numbers that it gives.

    Left out: groups of one device, through which nothing passes, scalars, and integers of which there is at most one
    per token (ids and places). None may stand in a loop, whose trips this would not see.
    """
    found, inside = collections.Counter(), ""
    pattern = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(OPERATIONS)})(?:-start)?\(")
    for line in program.splitlines():
        if re.match(r"(ENTRY )?%\S+ \(", line):
            inside = line
        match = pattern.search(line)
        if match and not _groups_of_one(line):
            assert inside.startswith("ENTRY"), line
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", match[1]):
                elements = math.prod(int(n) for n in sizes.split(","))
                if dtype.startswith("f") or elements > BATCH * LENGTH:
                    found[match[2]] += elements
    return dict(found)


def _groups_of_one(line: str) -> bool:
    """Whether a collective's groups hold one device each. jaxlib 0.12 gives them as axes of the mesh."""
    axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if axes is None:
        return bool(re.search(r"replica_groups=(\[\d+,1\]|\{\{\d+\}[,}])", line))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    return all(sizes[name] == "1" for name in re.findall(r"'(\w+)'", axes[2]))


@functools.cache
def program(kind: str, packed: bool, backward: bool) -> tuple[str, int]:
    """A sublayer's compiled program on PIECES devices, and how many elements its weights but the indexer's have."""
    config = V32 if kind == "mla" else V4
    options = dataclasses.replace(FP32, stage="sparse", query_chunk=8)  # several trips of every loop

    def make():
        if kind == "mla":
            return nnx.List([v32.Attention(nnx.Rngs(0), config, options)])
        return nnx.List([v4.Attention(nnx.Rngs(0), config, kind, RATIOS[kind], options)])

    graphdef, params, rest = fill(nnx.eval_shape(make))
    make_inputs = v32.make_layer_inputs if kind == "mla" else v4.make_layer_inputs

    def forward(params, rest, x):
        tokens = jnp.zeros(x.shape[:2], jnp.int32)
        ids = (PACKED["positions"], PACKED["segment_ids"]) if packed else (None, None)
        inputs = make_inputs(config, tokens, make_documents(tokens, *ids))
        (layer,) = nnx.merge(graphdef, params, rest)
        return layer(x, inputs)[0]

    def gradients(params, rest, x):
        return jax.grad(lambda params, x: jnp.sum(jnp.square(forward(params, rest, x))), (0, 1))(params, x)

    x = np.ones((BATCH, LENGTH, config.hidden_size), np.float32)
    weights = sum(leaf.size for name, leaf in named_leaves(params).items() if "indexer" not in name)
    _, text = compiled_on({"data": 2, "context": PIECES}, RULES, gradients if backward else forward, params, rest, x)
    return text, weights


def expected(kind: str, packed: bool) -> dict[str, list[int]]:
    """Elements that a device receives of its one row, by the design: from the left the window's keys and what
    compressors pool; of all devices the entries or latents, and the indexer's keys."""
    if kind == "mla":
        return {"all-gather": [LENGTH * (V32.kv_lora_rank + V32.rope_head_dim), LENGTH * V32.index_head_dim]}
    exchanged = (V4.sliding_window - 1) * V4.head_dim
    if kind == "sliding":
        return {"collective-permute": [exchanged]}
    ratio, overlap = RATIOS[kind], kind == "csa"
    before = (2 * ratio - 1 if overlap else ratio - 1) if packed else (ratio if overlap else 0)
    entries = PIECES * -(-MINE // ratio)
    keys = entries * V4.index_head_dim if kind == "csa" else 0
    return {
        "collective-permute": [exchanged + before * V4.hidden_size],
        "all-gather": [entries * V4.head_dim, keys],
    }


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, packed):
    text, _ = program(kind, packed, backward=False)
    assert collectives(text) == {name: sum(parts) for name, parts in expected(kind, packed).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_backward_returns_what_forward_fetched_and_adds_up_the_weights_once(kind):
    """The indexer's keys and weights have no gradient: its own loss is not asked for."""
    text, weights = program(kind, True, backward=True)
    forward, want = expected(kind, True), {"all-reduce": weights}
    if "collective-permute" in forward:
        want["collective-permute"] = 2 * forward["collective-permute"][0]
    if "all-gather" in forward:
        want |= {"all-gather": sum(forward["all-gather"]), "reduce-scatter": forward["all-gather"][0] // PIECES}
    assert collectives(text) == want
