"""SIGKILL at random points of a conversion, then a second run: complete and verified every time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from checkpoints_tools.verify import verify
from fathom.step_folder import METADATA_FILE
from tests.checkpoints.folders import assert_same_bytes, native_folder
from tests.models.small import small_config

CONFIG = small_config(("sliding", "csa", "hca", "csa", "hca"), moe_intermediate_size=96, expert_dtype="fp4")

# Slows every write down, so that there is something to interrupt, and says when the first one begins.
SLOW = """
import os, sys, time
from checkpoints_tools import convert
for writer in (convert.OrbaxWriter, convert.HubWriter):
    def run(self, *args, original=writer.run):
        os.write(1, b"working\\n")  # in one piece, whichever thread it is
        time.sleep({pause})
        return original(self, *args)
    writer.run = run
from fathom.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(arguments: list[str], pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW.format(pause=pause), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_at_random_points(tmp_path, to):
    tensors = native_folder(tmp_path / "hub", CONFIG)
    out = tmp_path / "out"
    arguments = ["convert", "--to", to, str(tmp_path / "hub"), str(out), "--threads", "2"]
    marker = out / (METADATA_FILE if to == "orbax" else "model.safetensors.index.json")
    rng = random.Random(to)
    for _ in range(5):
        process = start(arguments, pause=0.06 if to == "orbax" else 1.2)
        assert process.stdout.readline().strip() == "working"
        time.sleep(rng.uniform(0, 2.0))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not marker.exists()  # nothing takes it for a checkpoint
    process = start(arguments, pause=0)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "complete" in text and "were there" in text
    assert verify(out) == []
    if to == "hf":
        assert_same_bytes(out, tensors)
        assert not list(out.glob("*.partial-*"))
