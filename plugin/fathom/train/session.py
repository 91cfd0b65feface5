"""What watches over one call of `train`, from its first file to its last line."""

from __future__ import annotations

import contextlib

import jax

from fathom.recipe import Recipe
from fathom.train.compilation_cache import compilation_cache
from fathom.train.goodput import RunClock
from fathom.train.profiler import StepProfiler
from fathom.train.spike import SpikeDetector
from fathom.train.text_log import TextLog
from fathom.train.watchdog import Watchdog


class Session(contextlib.ExitStack):
    """A context with the run's clock, log, profiler, watchdog and compilation cache; the run folder must be there.

    Attributes:
      clock: where the time goes. log: log.txt, of the first process. profiler: of the recipe's `profile`.
      spikes: judges losses.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self._folder = recipe.run_dir
        self._is_main = jax.process_index() == 0
        self._first = True
        self.clock = RunClock()
        self.profiler = StepProfiler(recipe.profile.range, recipe.run_dir)
        self.spikes = SpikeDetector(**recipe.train.spike.model_dump())
        self._watchdog = Watchdog(recipe.train.watchdog, self.clock, recipe.run_dir)
        self._cache = compilation_cache(recipe.train.compilation_cache)
        self.log = TextLog(recipe.run_dir, self._is_main)

    def __enter__(self) -> Session:
        # Last in, first out: the log is open to the end.
        with contextlib.ExitStack() as stack:  # leaves those that were entered, should the next one fail
            for context in (self.log, self._cache, self._watchdog, contextlib.closing(self.profiler)):
                stack.enter_context(context)
            self.push(stack.pop_all())
        return self

    def begin(self, start: int, lost: int = 0) -> None:
        """To be called when the steps after `start` begin; `lost` counts those that are done again after a rollback."""
        if self._first and start and self._is_main:
            self.clock.add_stored(self._folder, start)
        self._first = False
        self.clock.lose(lost)

    def store_times(self, step: int) -> None:
        """Writes the clock's times to the run folder."""
        if self._is_main:
            self.clock.store(self._folder, step)

    def saved(self, step: int) -> None:
        """Logs that the checkpoint of `step` is complete."""
        self.log.event(f"checkpoint of step {step} is complete")

    def finish(self, step: int, preempted: bool) -> None:
        """The last line, how the run ended, and the times of what came after the last step."""
        ending = "stopped early, for SIGTERM or train.max_runtime, after" if preempted else "done with"
        self.log.event(f"{ending} step {step}")
        self.store_times(step)
