"""What a token may change: nothing before it, and nothing in another document. Bit for bit."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from fathom.layers.documents import make_documents
from fathom.models.deepseek_v4.attention import make_layer_inputs
from fathom.models.deepseek_v4.model import make_block
from tests.models.small import FP32, fill, packed_rows, random_model, small_config

pytestmark = pytest.mark.xdist_group("causality")

CONFIG = small_config(index_top_k=8)
"""The whole model; the indexer keeps 8 of up to 75 entries."""

LENGTH, ROWS = 300, 50
KIND_OF_LAYER = {"sliding": 0, "csa": 1, "hca": 2}


def other_tokens(tokens: np.ndarray) -> np.ndarray:
    """A different id at every place."""
    return ((tokens + 101) % CONFIG.vocab_size).astype(np.int32)


def first_change(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """[rows]: the first position with another bit than `want`, LENGTH where there is none; arrays [rows, S, ...]."""
    different = np.any(got != want, axis=tuple(range(2, got.ndim)))
    return np.where(different.any(axis=1), different.argmax(axis=1), LENGTH)


@functools.cache
def block_function(kind: str):
    """A jitted (streams, tokens) -> streams of one randomly filled layer."""
    layer = KIND_OF_LAYER[kind]
    graphdef, params, rest = fill(nnx.eval_shape(lambda: make_block(nnx.Rngs(0), CONFIG, FP32, layer)))

    @jax.jit
    def run(params, rest, streams, tokens):
        inputs = make_layer_inputs(CONFIG, tokens, make_documents(tokens, None, None))
        return nnx.merge(graphdef, params, rest)(streams, inputs)[0]

    return functools.partial(run, params, rest)


@pytest.mark.parametrize("kind", KIND_OF_LAYER)
def test_a_layer_reads_no_later_token(kind):
    """At every t of the row: the token's streams and id change, and no output before t does."""
    run = block_function(kind)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (1, LENGTH)).astype(np.int32)
    streams = rng.standard_normal((1, LENGTH, CONFIG.hc_mult, CONFIG.hidden_size)).astype(np.float32)
    # Compared at the same place of a batch of the same shape, so that only the values differ.
    want = np.asarray(run(np.repeat(streams, ROWS, 0), np.repeat(tokens, ROWS, 0)))
    reached = []
    for start in range(0, LENGTH, ROWS):
        changed = np.arange(start, start + ROWS)
        row = np.arange(ROWS)
        new_tokens, new_streams = np.repeat(tokens, ROWS, 0), np.repeat(streams, ROWS, 0)
        new_tokens[row, changed] = other_tokens(tokens[0, changed])
        new_streams[row, changed] = rng.standard_normal(new_streams[row, changed].shape)
        got = np.asarray(run(new_streams, new_tokens))
        np.testing.assert_array_equal(first_change(got, want), changed)
        reached.append(LENGTH - first_change(got[:, ::-1], want[:, ::-1]) - changed)
    # The test can fail: what a token changes reaches as far as the kind allows, and no further.
    window = CONFIG.sliding_window
    reach = np.minimum(np.concatenate(reached), LENGTH)
    if kind == "sliding":
        np.testing.assert_array_equal(reach, np.minimum(window, LENGTH - np.arange(LENGTH)))
    else:
        assert np.mean(reach[: LENGTH // 2] > 2 * window) > 0.9


@functools.cache
def model_function(packed: bool):
    """A jitted (tokens[, positions, segment_ids]) -> (logits, mtp_logits) of the whole model."""
    graphdef, params, rest = random_model(CONFIG)

    @jax.jit
    def run(params, rest, *batch):
        output = nnx.merge(graphdef, params, rest)(*batch)
        return output.logits, output.mtp_logits

    def call(tokens, segments=None):
        if not packed:
            return [np.asarray(x) for x in run(params, rest, tokens)]
        index = np.arange(LENGTH)
        starts = np.concatenate([np.ones((ROWS, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        positions = np.where(segments > 0, positions, 0).astype(np.int32)
        return [np.asarray(x) for x in run(params, rest, tokens, positions, segments)]

    return call


def test_the_model_reads_no_later_token():
    """At every t of the row. MTP at s also reads token s + 1, so its outputs change from t - 1 on."""
    run = model_function(packed=False)
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (1, LENGTH)).astype(np.int32)
    tokens = np.repeat(tokens, ROWS, 0)
    logits, mtp_logits = run(tokens)
    for start in range(0, LENGTH, ROWS):
        changed = np.arange(start, start + ROWS)
        new_tokens = tokens.copy()
        new_tokens[np.arange(ROWS), changed] = other_tokens(tokens[0, changed])
        new_logits, new_mtp_logits = run(new_tokens)
        np.testing.assert_array_equal(first_change(new_logits, logits), changed)
        np.testing.assert_array_equal(first_change(new_mtp_logits, mtp_logits), np.maximum(changed - 1, 0))


def random_documents(rng: np.random.Generator) -> tuple[int, ...]:
    """Lengths of documents that fill a row but for some padding."""
    total = int(rng.integers(LENGTH - 40, LENGTH + 1))
    cuts = np.sort(rng.choice(np.arange(1, total), int(rng.integers(1, 8)), replace=False))
    return tuple(int(x) for x in np.diff(np.concatenate([[0], cuts, [total]])))


@functools.cache
def packings() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids) of ROWS packed rows: six random packings and three chosen ones, each several times."""
    rng = np.random.default_rng(3)
    kinds = [random_documents(rng) for _ in range(6)]
    # Documents of 1 to 3 tokens (no window closes), and ones that end with their window.
    kinds += [(1, 2, 3, 1, 31, 32, 33, 1, 100), (16,) * 18, (4, 16, 3, 5, 15, 17, 64, 64)]
    rows = [kinds[row % len(kinds)] for row in range(ROWS)]
    batch = packed_rows(rows, LENGTH, CONFIG.vocab_size, seed=4)
    return batch["tokens"], batch["segment_ids"]


@functools.cache
def packed_outputs() -> list[np.ndarray]:
    return model_function(packed=True)(*packings())


def test_no_document_changes_another():
    tokens, segments = packings()
    rng = np.random.default_rng(5)
    for _ in range(3):
        chosen = np.array([rng.integers(0, row.max() + 1) for row in segments])  # 0: the padding
        inside = segments == chosen[:, None]
        new_tokens = np.where(inside, other_tokens(tokens), tokens)
        for got, want in zip(model_function(packed=True)(new_tokens, segments), packed_outputs(), strict=True):
            assert np.all(np.isfinite(got))
            np.testing.assert_array_equal(got[~inside], want[~inside])
            real = inside & (segments > 0)
            assert np.all(np.any(got[real] != want[real], axis=-1))


def test_a_packed_document_is_as_alone():
    """Each document at the start of a row of its own, which by causality does not read what follows it."""
    tokens, segments = packings()
    places = [(row, d) for row in range(9) for d in range(1, segments[row].max() + 1)]
    spans = [np.flatnonzero(segments[row] == d) for row, d in places]
    assert len(spans) > 45 and min(map(len, spans)) == 1 and max(map(len, spans)) >= 100
    run, packed = model_function(packed=False), packed_outputs()
    for start in range(0, len(spans), ROWS):
        alone = np.random.default_rng(6).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        some = list(enumerate(zip(places[start : start + ROWS], spans[start : start + ROWS], strict=True)))
        for row, ((source, _), span) in some:
            alone[row, : len(span)] = tokens[source, span]
            # MTP wraps within a document: its last token reads the first one's embedding.
            alone[row, len(span) % LENGTH] = tokens[source, span[0]]
        for want, got in zip(run(alone), packed, strict=True):
            for row, ((source, number), span) in some:
                error = np.abs(got[source, span] - want[row, : len(span)]).max()
                assert error < 2e-5, f"row {source}, document {number} of {len(span)} tokens: {error}"
