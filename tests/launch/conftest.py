"""What tests of launching share."""

from __future__ import annotations

import subprocess

import pytest

from fathom import zoo
from fathom.topology import parse_topology
from tests.train.small_recipe import SMALL, SPEC, changed, write_recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a sound recipe for a topology."""
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)

    def write(topology="2*v6e:4x8", **changes):
        devices = parse_topology(topology).devices
        fsdp = 2 if devices > 1 else 1
        values = {"mesh": {"data": devices // fsdp, "fsdp": fsdp, "topology": topology}, "data.batch_size": devices}
        values |= {"checkpoint.directory": "gs://bucket/run", "data.path": "/mnt/text"}
        return str(write_recipe(tmp_path, changed(SMALL, values | changes), "my.Run_1"))

    return write


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("something was started"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was started"))
