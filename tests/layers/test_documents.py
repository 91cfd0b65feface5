"""Documents in a row: bands, windows and visibility, each against a loop that follows the rule literally."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fathom.layers.documents import make_documents


def packed(lengths, total):
    """positions and segment ids of documents laid end to end, then padding."""
    positions, segments = np.zeros(total, np.int32), np.zeros(total, np.int32)
    at = 0
    for number, length in enumerate(lengths, 1):
        positions[at : at + length] = np.arange(length)
        segments[at : at + length] = number
        at += length
    return jnp.asarray(positions)[None], jnp.asarray(segments)[None]


def literal_windows(positions, segments, ratio):
    """(closing token, first position) of every window that closes, in order."""
    return [
        (s, int(positions[s]) - ratio + 1)
        for s in range(len(positions))
        if segments[s] > 0 and (positions[s] + 1) % ratio == 0
    ]


@pytest.mark.parametrize("lengths", [[17], [1, 2, 3, 4, 5], [9, 1, 1, 12], [4, 4, 4], [30, 2]])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_windows_and_visibility_follow_the_rule(lengths, ratio):
    total = 36
    positions, segments = packed(lengths, total)
    windows = make_documents(jnp.zeros((1, total), int), positions, segments).windows(ratio)
    p, g = np.asarray(positions[0]), np.asarray(segments[0])
    expected = literal_windows(p, g, ratio)
    closing = np.asarray(windows.closing_BE[0])
    assert len(closing) == total // ratio >= len(expected)
    assert [(int(c), int(s)) for c, s in zip(closing, windows.start_BE[0], strict=True)][
        : len(expected)
    ] == expected
    assert np.all(closing[len(expected) :] == total)
    for s in range(total):
        visible = {e for e, (c, _) in enumerate(expected) if c <= s and g[c] == g[s] and g[s] > 0}
        assert visible == set(range(int(windows.begin_BS[0, s]), int(windows.end_BS[0, s])))


def test_one_document_per_row_is_the_same_with_and_without_ids():
    tokens = jnp.zeros((2, 21), int)
    single = make_documents(tokens, None, None)
    index = jnp.broadcast_to(jnp.arange(21), (2, 21))
    given = make_documents(tokens, index, jnp.ones((2, 21), int))
    assert single.single and not given.single
    for ratio in (2, 4, 16):
        a, b = single.windows(ratio), given.windows(ratio)
        for name in ("closing_BE", "start_BE", "begin_BS", "end_BS"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(single.band(5), given.band(5))


def test_what_is_not_given_is_derived():
    positions, segments = packed([5, 1, 7], 13)
    tokens = jnp.zeros((1, 13), int)
    for given in ((positions, None), (None, segments)):
        documents = make_documents(tokens, *given)
        np.testing.assert_array_equal(documents.positions_BS, positions)
        np.testing.assert_array_equal(documents.segment_ids_BS, segments)


def test_band_stops_at_the_documents_start_and_padding_sees_nothing():
    positions, segments = packed([5, 3], 10)
    documents = make_documents(jnp.zeros((1, 10), int), positions, segments)
    np.testing.assert_array_equal(documents.band(4)[0], [1, 2, 3, 4, 4, 1, 2, 3, 0, 0])


def test_roll_left_wraps_within_each_document():
    positions, segments = packed([3, 1, 4], 10)
    documents = make_documents(jnp.zeros((1, 10), int), positions, segments)
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(documents.roll_left(tokens)[0, :8], [1, 2, 0, 3, 5, 6, 7, 4])
    whole = make_documents(tokens, None, None).roll_left(tokens)
    np.testing.assert_array_equal(whole, jnp.roll(tokens, -1, axis=1))


def test_works_under_jit_with_static_layout():
    positions, segments = packed([7, 9], 20)
    run = jax.jit(lambda p, g: make_documents(p, p, g).windows(4).end_BS)
    eager = make_documents(positions, positions, segments).windows(4).end_BS
    np.testing.assert_array_equal(run(positions, segments), eager)


def test_shape_mismatch_is_named():
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 4\).*\(1, 5\)"):
        make_documents(jnp.zeros((1, 5), int), None, jnp.ones((1, 4), int))
