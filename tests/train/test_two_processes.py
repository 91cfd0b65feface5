"""Two processes: one gets SIGTERM, both stop at the same step; resumed, they end as if undisturbed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.train.runs import history, make_recipe, steps_on_disk, write_text


def run_both(folder, term_step):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.two_processes"]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(port), str(folder), str(term_step)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads((folder / f"result-{index}.json").read_text()) for index in range(2)]


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    for name in ("broken", "straight"):
        write_text(tmp_path / name / "text")
    one, other = run_both(tmp_path / "broken", term_step=7)
    assert one == other
    assert one["preempted"] and 7 <= one["step"] <= 9
    broken = make_recipe(tmp_path / "broken")
    assert steps_on_disk(broken) == [5, one["step"]]

    ends = run_both(tmp_path / "broken", term_step=0) + run_both(tmp_path / "straight", term_step=0)
    assert [end["step"] for end in ends] == [12] * 4
    assert len({end["loss"] for end in ends}) == 1
    straight = make_recipe(tmp_path / "straight")
    names = ("loss", "grad_norm", "batch_hash")
    assert history(broken, *names) == history(straight, *names)
