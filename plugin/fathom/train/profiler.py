"""Traces of chosen steps by jax's profiler, to be opened with XProf, TensorBoard or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class StepProfiler:
    """Traces some steps, once, into <folder>/profile; every process its own devices and host threads.

    The devices are waited for before the first of these steps and after the last, so that the trace holds whole steps
    and nothing else. A run that resumes among them traces those that are left.

    Args:
      steps: numbers of the steps, counted from 1; empty for none. folder: the run folder.
    """

    def __init__(self, steps: range, folder: Path):
        self._steps = steps
        self._folder = folder / "profile"
        self._tracing = self._done = False

    def before(self, step: int, wait: Callable[[], Any]) -> None:
        """To be called before `step` is dispatched; `wait` returns when the steps before it are completed."""
        if self._tracing or self._done or step not in self._steps:
            return
        wait()
        jax.profiler.start_trace(str(self._folder))
        self._tracing = True

    def ends_with(self, step: int) -> bool:
        """Whether the step that was just dispatched is the last to trace; `close` once it is completed."""
        return self._tracing and step >= self._steps[-1]

    def close(self) -> Path:
        """Writes what was traced, however the run came to its end; the folder."""
        if self._tracing:
            self._tracing, self._done = False, True
            jax.profiler.stop_trace()
        return self._folder
