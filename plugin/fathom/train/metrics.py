"""Metrics of a run: JSONL always, TensorBoard and wandb if asked, a progress display, loss.png.

The run folder holds `metrics.jsonl`, one line per write: {"step": int, "time": unix seconds,
name: value, ...}. Values are numbers, or lists of numbers for arrays. JSON has no NaN or infinity,
so those are the strings "nan", "inf" and "-inf"; `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

METRICS_FILE = "metrics.jsonl"
LOSS_PLOT = "loss.png"
WANDB_ID_FILE = "wandb_id"


def probe_metrics(run_dir: str | os.PathLike[str], wandb: Any = None) -> None:
    """Makes the run folder and proves that metrics can be written, before anything is compiled.

    Args:
      run_dir: the run folder. wandb: None, or what `MetricWriter` takes.

    Raises:
      ValueError: when the folder or its metrics file cannot be written, or wandb is asked for and not installed.
    """
    if wandb is not None:
        _import_wandb()
    run_dir = Path(run_dir)
    probe, metrics = run_dir / f".probe-{uuid.uuid4().hex}", run_dir / METRICS_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("fathom", encoding="utf-8")
        probe.unlink()
        if metrics.exists():
            metrics.open("a").close()
    except OSError as error:
        raise _cannot_write(run_dir, error) from error


def _cannot_write(run_dir: Path, error: OSError) -> ValueError:
    return ValueError(
        f"run folder {run_dir}: cannot write {METRICS_FILE} ({error}); "
        "set metrics.directory to a folder that can be written"
    )


class MetricWriter:
    """Writes the metrics of a run, each step once.

    Args:
      run_dir: the run folder, made if missing.
      tensorboard: also write TensorBoard event files to <run_dir>/tensorboard.
      wandb: None, or a mapping (or an object with attributes) of project, entity and name.
      enabled: False makes every method do nothing; pass `jax.process_index() == 0`.
      resume_step: the step a checkpoint was restored at. Entries after it are dropped, so that the
        steps done again are not there twice. None is a new run: an older metrics file and wandb id
        are kept under other names.
      config: the resolved recipe, shown by wandb.

    Raises:
      ValueError: when the folder cannot be written, or when wandb is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        tensorboard: bool = True,
        wandb: Any = None,
        enabled: bool = True,
        *,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.enabled = enabled
        self._file: TextIO | None = None
        self._board = self._wandb_run = None
        self._last_step = -1 if resume_step is None else resume_step
        self._names_of_step: set[str] = set()
        if not enabled:
            return
        wandb_module = None if wandb is None else _import_wandb()
        path = self.run_dir / METRICS_FILE
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                _set_aside(path)
                _set_aside(self.run_dir / WANDB_ID_FILE)
            else:
                drop_after(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self.run_dir, error) from error
        if tensorboard:
            from tensorboardX import SummaryWriter

            # The suffix keeps a run that resumes within the same second from overwriting the file.
            self._board = SummaryWriter(
                str(self.run_dir / "tensorboard"),
                purge_step=None if resume_step is None else resume_step + 1,
                filename_suffix=f".{resume_step or 0}",
            )
        if wandb_module is not None:
            self._wandb_run = _start_wandb(wandb_module, wandb, self.run_dir, config)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one step: scalars or arrays of numbers; nested mappings join with "/".

        A step may be written in parts (training metrics, then evaluation), each metric once.

        Raises:
          ValueError: when the step is before the last one, repeats a metric, or is not numeric.
        """
        if not self.enabled:
            return
        if self._file is None:
            raise ValueError(f"metrics of step {step} written after close()")
        values = _flatten(metrics)
        if step != self._last_step:
            self._names_of_step = set()
        if step < self._last_step or self._names_of_step & set(values):
            raise ValueError(
                f"metrics {sorted(values)[:5]} of step {step} after those of step "
                f"{self._last_step}: a step is written once and steps rise; pass resume_step when "
                "a run restarts from a checkpoint"
            )
        entry = {"step": int(step), "time": round(time.time(), 3)}
        clash = sorted(set(entry) & set(values))
        if clash:
            raise ValueError(f"metric names {clash} are taken by the entry itself; rename them")
        entry |= {name: _to_json(value) for name, value in values.items()}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = int(step)
        self._names_of_step |= set(values)
        if self._board is not None:
            for name, value in values.items():
                if value.ndim == 0:
                    self._board.add_scalar(name, float(value), step)
                elif np.isfinite(value).all():
                    self._board.add_histogram(name, value, step)
        if self._wandb_run is not None:
            scalars = {name: float(value) for name, value in values.items() if value.ndim == 0}
            self._wandb_run.log(scalars, step=int(step))

    def close(self) -> None:
        """Flushes and closes everything; calling it twice is harmless."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
        self._file = self._board = self._wandb_run = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"the recipe asks for wandb (metrics.wandb) and it cannot be imported ({error}); "
            "install fathom-jax[wandb] or remove metrics.wandb"
        ) from error


def _start_wandb(module: Any, block: Any, run_dir: Path, config: Mapping[str, Any] | None) -> Any:
    """A run whose id is kept in the run folder: a resumed run continues the same curves."""
    id_file = run_dir / WANDB_ID_FILE
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    fields = dict(block) if isinstance(block, Mapping) else vars(block)
    return module.init(
        project=fields.get("project"),
        entity=fields.get("entity"),
        name=fields.get("name") or run_dir.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=dict(config or {}),
    )


def _set_aside(path: Path) -> None:
    """Renames an older run's file, metrics.jsonl to metrics.<n>.jsonl; metrics are never thrown away."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)


def drop_after(path: str | os.PathLike[str], step: int) -> None:
    """Rewrites a metrics file, atomically, without the entries after `step`.

    A last line that was cut off by a killed process is dropped too. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [entry for entry in _read_lines(path) if entry["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(
        "".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8"
    )
    os.replace(temporary, path)


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a run folder's metrics.jsonl, in order, with non-finite numbers as floats.

    Raises:
      ValueError: when there is no such file, or a line other than the last is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        raise ValueError(f"{path} is not there; expected the run folder of a training run")
    return [{key: _from_json(value) for key, value in e.items()} for e in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # cut off when the process was killed while writing it
            raise ValueError(
                f"{path}, line {number}: not a metrics entry ({error}); move the file away"
            ) from error
        entries.append(entry)
    return entries


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, name + "/")
            continue
        array = np.asarray(value)
        # bfloat16 and its relatives are kind "V" to numpy, and floats all the same.
        if array.dtype.kind not in "biuf" and not hasattr(value, "dtype"):
            raise ValueError(f"metric {name!r}: found {value!r}, expected a number or an array")
        keep_integer = array.dtype.kind in "iu"
        flat[name] = array.astype(np.int64 if keep_integer else np.float64)
    return flat


def _to_json(value: np.ndarray) -> Any:
    if value.ndim:
        return [_to_json(item) for item in value]
    number = value.item()
    return number if math.isfinite(number) else str(float(number))


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class ProgressBar:
    """A tqdm bar for a terminal, with the first few numbers of the latest step."""

    def __init__(self, total: int, start: int = 0, *, stream: TextIO, shown: int = 5):
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=start, file=stream, unit="step", dynamic_ncols=True, leave=True
        )
        self._shown = shown

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Moves the bar to `step` steps done."""
        texts = _scalar_texts(metrics)[: self._shown]
        self._bar.set_postfix_str(" ".join(f"{name} {text}" for name, text in texts), refresh=False)
        self._bar.update(max(step - self._bar.n, 0))

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


class LineLogger:
    """One line every `every` steps, for logs and pipes; the last step always has its line."""

    def __init__(self, total: int, *, every: int, stream: TextIO | None):
        if every < 1:
            raise ValueError(f"LineLogger: every is {every}, expected at least 1")
        self._total, self._every, self._stream = total, every, stream
        self._first: tuple[int, float] | None = None
        self._last_line = -1

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done; prints when it is time to."""
        if self._first is None:
            # The first step's time is compilation, which says nothing about the others.
            self._first = (step, time.monotonic())
        due = step % self._every == 0 or step >= self._total
        if not due or step == self._last_line:
            return
        self._last_line = step
        first, began = self._first
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {text}" for name, text in _scalar_texts(metrics)]
        if first < step < self._total:
            left = (time.monotonic() - began) / (step - first) * (self._total - step)
            parts.append(f"left {_duration(left)}")
        self.message("  ".join(parts))

    def message(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to release; there so that both displays are used alike."""


class NoDisplay:
    """The display of the processes other than the first: shows nothing."""

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def make_progress(
    total: int,
    start: int = 0,
    *,
    every: int = 10,
    enabled: bool = True,
    stream: TextIO | None = None,
) -> ProgressBar | LineLogger | NoDisplay:
    """A bar where `stream` (default standard error) is a terminal, else a line every N steps.

    Both have update(steps done, metrics), message(text) and close(); enabled=False shows nothing.
    """
    stream = sys.stderr if stream is None else stream
    if not enabled:
        return NoDisplay()
    if stream.isatty():
        return ProgressBar(total, start, stream=stream)
    return LineLogger(total, every=every, stream=stream)


def _is_shown(name: str, value: Any) -> bool:
    """Whether a metric is worth room on a line: hashes, times and every block's own load are not."""
    if isinstance(value, Mapping) or np.ndim(value) != 0:
        return False
    one_of_many = name.startswith("expert_load/") and name != "expert_load/worst"
    nothing_skipped = name == "skipped_steps" and not value
    return name != "batch_hash" and not name.startswith("time/") and not one_of_many and not nothing_skipped


def _scalar_texts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    texts = []
    for name, value in metrics.items():
        if not _is_shown(name, value):
            continue
        number = float(value)
        plain = number == 0 or 1e-3 <= abs(number) < 1e5
        texts.append((name, f"{number:.5g}" if plain else f"{number:.3g}"))
    return texts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def plot_loss(run_dir: str | os.PathLike[str]) -> Path:
    """Draws the loss and its parts against the step into <run_dir>/loss.png.

    Curves are the metrics named "loss", "loss/..." and "eval/loss...". Balance losses (no nats: 1 per
    layer is perfect) and parts far below the loss get a panel of their own, logarithmic where they span
    orders of magnitude.

    Returns:
      The picture's path.

    Raises:
      ValueError: when the run has no loss to draw.
    """
    curves = _loss_curves(read_metrics(run_dir))
    if not curves:
        raise ValueError(f"{run_dir}: {METRICS_FILE} has no metric named 'loss' to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = max(float(np.median(values)) for _, values in curves.values())
    apart = {
        n: c for n, c in curves.items() if n.endswith("/balance") or float(np.median(c[1])) < scale / 20
    }
    large = {n: c for n, c in curves.items() if n not in apart}
    rows = 2 if apart else 1
    figure = Figure(figsize=(8, 4.5 if rows == 1 else 6.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    ratios = [3, 1][:rows]
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw(axes[0], large, "loss")
    if apart:
        _draw(axes[1], apart, "other parts")
        values = np.concatenate([values for _, values in apart.values()])
        if values.min() > 0 and values.max() / values.min() > 20:
            axes[1].set_yscale("log")
    axes[0].set_title(Path(run_dir).resolve().name)
    axes[-1].set_xlabel("step")
    path = Path(run_dir) / LOSS_PLOT
    temporary = path.with_name(".loss.tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)
    return path


def _loss_curves(entries: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names: dict[str, None] = {}
    for entry in entries:
        names |= {n: None for n in entry if n == "loss" or n.startswith(("loss/", "eval/loss"))}
    curves = {}
    for name in names:
        points = [(e["step"], e[name]) for e in entries if isinstance(e.get(name), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = (np.array(steps), np.array(values, np.float64))
    return curves


def _draw(axis: Any, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str) -> None:
    for name, (steps, values) in curves.items():
        marker = "o" if len(steps) < 3 or name.startswith("eval/") else None
        axis.plot(
            steps, values, linewidth=1.3, marker=marker, markersize=4,
            label=f"{name} ({values[-1]:.4g})",
        )
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, framealpha=0.9, edgecolor="none", loc="upper right")
