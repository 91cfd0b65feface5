"""Metrics: what a run writes, what a resumed run drops, what people see."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from fathom.train.metrics import (
    LineLogger,
    MetricWriter,
    NoDisplay,
    ProgressBar,
    make_progress,
    plot_loss,
    probe_metrics,
    read_metrics,
)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in (1, 2):
        writer.write(step, {"loss": jnp.float32(0.5 * step)})
        assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, step + 1))
    writer.close()
    assert lines_of(tmp_path)[1]["loss"] == 1.0


def test_values_of_every_kind(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(
            3,
            {
                "bf16": jnp.bfloat16(1.5),
                "count": np.int32(7),
                "nested": {"a": 1.0, "b": {"c": 2}},
                "load": jnp.array([[1, 2], [3, 4]]),
                "bad": float("nan"),
                "worse": jnp.array([jnp.inf, -jnp.inf, 0.0]),
            },
        )
    # The file is JSON by the standard, which has no NaN.
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    (entry,) = read_metrics(tmp_path)
    assert entry["bf16"] == 1.5 and entry["count"] == 7 and isinstance(entry["count"], int)
    assert entry["nested/a"] == 1.0 and entry["nested/b/c"] == 2
    assert entry["load"] == [[1, 2], [3, 4]]
    assert math.isnan(entry["bad"]) and entry["worse"] == [math.inf, -math.inf, 0.0]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [({"loss": "high"}, "'loss'.*'high'"), ({"step": 1}, "'step'.*taken")],
)
def test_values_that_are_refused(tmp_path, metrics, words):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match=words):
            writer.write(1, metrics)


def test_steps_rise_and_no_metric_comes_twice(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {"loss": 1.0})
        writer.write(5, {"eval/loss": 2.0})  # the same step, other metrics
        with pytest.raises(ValueError, match="step 5"):
            writer.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 4 after those of step 5"):
            writer.write(4, {"loss": 1.0})
    with pytest.raises(ValueError, match="after close"):
        writer.write(6, {"loss": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [5, 5]


def write_run(folder, steps, **keywords):
    with MetricWriter(folder, tensorboard=False, **keywords) as writer:
        for step in steps:
            writer.write(step, {"loss": 10.0 - step})


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 11), resume_step=4)
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 11))


def test_a_line_cut_off_by_a_kill_is_dropped_and_a_damaged_one_is_told(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    write_run(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    path.write_text("garbage\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(tmp_path)


def test_a_new_run_keeps_the_old_file(tmp_path):
    write_run(tmp_path, [1, 2])
    write_run(tmp_path, [1])
    write_run(tmp_path, [1, 2, 3])
    assert len(lines_of(tmp_path)) == 3
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "metrics.2.jsonl").read_text().splitlines()) == 1


def test_other_processes_write_nothing(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, [1, 2], enabled=False)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (MetricWriter, probe_metrics):
        with pytest.raises(ValueError, match=r"metrics\.directory"):
            make(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # any file that cannot be opened
    with pytest.raises(ValueError, match=r"run: cannot write metrics\.jsonl"):
        probe_metrics(tmp_path / "run")


def test_a_probe_leaves_nothing_behind(tmp_path):
    write_run(tmp_path / "run", [1, 2])
    before = lines_of(tmp_path / "run")
    probe_metrics(tmp_path / "run")
    assert lines_of(tmp_path / "run") == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def events_of(folder):
    """Events of every file, oldest first: records are length, checksum, bytes, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_reads_back(tmp_path):
    with MetricWriter(tmp_path, tensorboard=True) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 4.0 / step, "load": [1.0, 3.0]})
    with MetricWriter(tmp_path, tensorboard=True, resume_step=1) as writer:
        writer.write(2, {"loss": 7.0})
    events = list(events_of(tmp_path))
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
        if not value.HasField("histo")
    ]
    assert scalars == [(1, "loss", 4.0), (2, "loss", 2.0), (2, "loss", 7.0)]
    histograms = [v.tag for e in events for v in e.summary.value if v.HasField("histo")]
    assert histograms == ["load", "load"]
    # TensorBoard hides what earlier sessions wrote at this step or later.
    sessions = [event for event in events if event.HasField("session_log")]
    assert [event.step for event in sessions if event.session_log.status == 1] == [2]


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **keywords):
        self.started.append(keywords)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_only_if_asked_and_the_same_run_after_a_resume(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_run(tmp_path, [1])
    assert not wandb.started
    block = types.SimpleNamespace(project="p", entity=None, name="n")
    write_run(tmp_path, [1, 2], wandb=block, config={"name": "n"})
    write_run(tmp_path, [3], wandb=block, resume_step=2)
    assert wandb.started[0]["project"] == "p" and wandb.started[0]["config"] == {"name": "n"}
    assert wandb.started[0]["id"] == wandb.started[1]["id"] and wandb.finished == 2
    assert wandb.logged[-1] == (3, {"loss": 7.0})


def test_a_new_run_in_an_old_folder_is_a_new_wandb_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    block = {"project": "p"}
    write_run(tmp_path, [1], wandb=block)
    write_run(tmp_path, [1], wandb=block)
    write_run(tmp_path, [2], wandb=block, resume_step=1)
    write_run(tmp_path, [1])  # a new run without wandb, to which it comes later
    write_run(tmp_path, [2], wandb=block, resume_step=1)
    first, second, resumed, third = [run["id"] for run in wandb.started]
    assert second == resumed and len({first, second, third}) == 3
    assert (tmp_path / "wandb_id.1").read_text() == first and (tmp_path / "wandb_id").read_text() == third


@pytest.mark.parametrize("make", [MetricWriter, probe_metrics])
def test_wandb_that_is_not_installed(tmp_path, monkeypatch, make):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"fathom-jax\[wandb\]"):
        make(tmp_path, wandb={"project": "p"})


def test_one_line_every_n_steps_and_one_at_the_end():
    stream = io.StringIO()
    progress = make_progress(25, 10, every=5, stream=stream)
    assert isinstance(progress, LineLogger)
    for step in range(11, 25):
        progress.update(step, {"loss": 3.14159265, "learning_rate": 3e-4, "batch_hash": 12345})
    progress.update(25, {"loss": 1.0})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 15/25", "step 20/25", "step 25/25"]
    assert "loss 3.1416  learning_rate 0.0003  left" in lines[0] and "hash" not in lines[0]
    assert "left" not in lines[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_nothing_elsewhere():
    stream = Terminal()
    progress = make_progress(4, 2, stream=stream)
    assert isinstance(progress, ProgressBar)
    progress.message("hello")
    progress.update(4, {"loss": 2.5})
    progress.close()
    assert "4/4" in stream.getvalue() and "hello" in stream.getvalue()
    assert isinstance(make_progress(4, stream=stream, enabled=False), NoDisplay)


def test_the_plot_shows_the_loss_and_its_parts(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 40):
            main = 5.0 * 0.9**step
            parts = {"loss/main": main, "loss/mtp": 0.3 * main, "loss/balance": 1e-4}
            writer.write(step, {"loss": main * 1.3, **parts, "grad_norm": 1.0})
        writer.write(40, {"loss": float("nan")})  # a broken step must not hide the others
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    pixels = image.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    colours = {tuple(c) for c in (pixels[::2, ::2, :3] * 255).astype(int).reshape(-1, 3)}
    wanted = [(31, 119, 180), (255, 127, 14), (44, 160, 44)]  # the first three default colours
    assert all(colour in colours for colour in wanted)
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_a_loss_has_no_plot(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        plot_loss(tmp_path)
    write_run(tmp_path, [])
    with pytest.raises(ValueError, match="no metric named 'loss'"):
        plot_loss(tmp_path)
