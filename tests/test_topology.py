"""Topologies: the slices that exist, spelled as Google spells them, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fathom.topology import TopologyError, parse_topology

RECIPES = (Path(__file__).parent.parent / "recipes").glob("*.yaml")
IN_RECIPES = sorted({name for path in RECIPES for name in re.findall(r"topology: *\"?([\w:*]+)", path.read_text())})


@pytest.mark.parametrize(
    "names",
    [
        "v5e:1x1 v5e:2x2 v5e:2x4 v5e:4x4 v5e:4x8 v5e:8x8 v5e:8x16 v5e:16x16",
        "v6e:1x1 v6e:2x2 v6e:2x4 v6e:4x4 v6e:4x8 v6e:8x8 v6e:8x16 v6e:16x16 2*v6e:16x16",
        "v4:2x2x1 v4:2x2x2 v4:2x2x4 v4:2x4x4 v4:4x4x4 v4:12x16x16 v4:16x16x16",
        "v5p:2x2x1 v5p:2x2x2 v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8 v5p:4x4x12 v5p:8x12x16 v5p:16x16x24 3*v5p:4x4x20",
        "tpu7x:1x1x1 tpu7x:2x2x1 tpu7x:2x4x4 tpu7x:4x4x4 tpu7x:8x16x16 tpu7x:16x24x24",
        " ".join(IN_RECIPES),
    ],
)
def test_slices_that_exist(names):
    assert names and all(str(parse_topology(name)) == name for name in names.split())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        # Another order of the dimensions: no node has such a label.
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("2*v5p:16x8x8", "2*v5p:8x8x16"),
        ("v6e:8x4", "v6e:4x8"),
        ("v4:1x2x2", "v4:2x2x1"),
        # Parts of a host, more than there is, shapes of no whole cubes.
        ("v5p:1x1x1", "v5p:2x2x1"),
        ("v5p:4x4x2", "v5p:2x4x4"),
        ("v5p:2x6x10", "v5p:4x4x8"),
        ("v5p:4x6x8", "v5p:4x4x12"),
        ("v5p:2x2x8", "v5p:2x4x4"),
        ("v5p:32x32x32", "v5p:16x16x24"),
        ("v4:16x16x20", "v4:16x16x16"),
        ("v6e:4x16", "v6e:8x8"),
        ("v5e:1x4", "v5e:2x2"),
        ("v6e:32x32", "v6e:16x16"),
    ],
)
def test_slices_that_do_not_exist(name, meant):
    said = f"found {name.partition(':')[2]}, which is no slice of .*; did you mean {re.escape(meant)}[?]$"
    with pytest.raises(TopologyError, match=said):
        parse_topology(name)
    assert str(parse_topology(meant)) == meant


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v6e:4x16", "expected 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; did"),
        ("v5p:8x4x4", "2x4x4, or multiples of 4 in ascending order, at most 6144 chips in all; did"),
        ("v5p:0x4x4", "each at least 1"),
        ("0*v5p:4x4x4", "each at least 1"),
    ],
)
def test_what_was_expected(name, said):
    with pytest.raises(TopologyError, match=said):
        parse_topology(name)
