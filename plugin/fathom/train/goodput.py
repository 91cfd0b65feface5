"""Where the wall time of a run goes: steps, waiting for data, saves, and so on. The share of steps is the goodput."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

TIME_FILE = "time.json"

PHASES = ("step", "data", "save", "restore", "compile", "evaluation", "other")
"""What the process is doing. "compile" is the first step of a stage, its data included, and the first that takes
another program, as a whole. "data" is only what the devices had to wait: a batch that arrives while they still compute
costs nothing. Saves in the background cost what they hold up."""

REDONE = "redone"
"""Time of steps that were lost, to a crash or a rollback, and had to be done again: no phase, taken out of "step"."""

DOWN = "down"
"""Time between two processes of a run, and what one that was killed did after it last stored its own: no phase."""


class RunClock:
    """Divides a run's wall time, from when it is made, among `PHASES`, of which one is under way at any moment.

    Processes that resume a run add up, through `TIME_FILE` in the run folder, with the time between them (`DOWN`).

    Args:
      now: seconds on a clock that never goes back. date: seconds on one that other processes have too.

    Attributes:
      mark: (phase, when the run last got further); one assignment, so that another thread may read it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, date: Callable[[], float] = time.time):
        self._now, self._date = now, date
        self._since, self._begun = now(), date()
        self._phase = "other"
        self._seconds = dict.fromkeys((*PHASES, REDONE, DOWN), 0.0)
        self._steps = 0
        self.mark = (self._phase, self._since)

    def enter(self, phase: str, *, was: str | None = None) -> None:
        """Begins a phase; the time of the one before counts as that of `was`, of itself unless given."""
        moment = self._now()
        self._seconds[was or self._phase] += moment - self._since
        self._since, self._phase = moment, phase
        # Waiting for data and for the step are one wait: only a completed step ends it.
        waits = phase in ("step", "data") and self.mark[0] in ("step", "data")
        self.mark = (phase, self.mark[1] if waits else moment)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase for as long as the context lasts; then the one before goes on."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def step_done(self) -> None:
        """Says that another step was completed."""
        self._steps += 1
        self.mark = (self._phase, self._now())

    def lose(self, steps: int) -> None:
        """Says that so many of the steps counted so far must be done again."""
        steps = min(max(steps, 0), self._steps)
        if steps:
            moved = self._seconds["step"] * steps / self._steps
            self._seconds["step"] -= moved
            self._seconds[REDONE] += moved
            self._steps -= steps

    def metrics(self) -> dict[str, float]:
        """"goodput", from 0 to 1, and "time/<phase>" in seconds, "time/redone" and "time/down" among them."""
        self.enter(self._phase)
        total = sum(self._seconds.values())
        goodput = self._seconds["step"] / total if total else 0.0
        return {"goodput": goodput, **{f"time/{name}": seconds for name, seconds in self._seconds.items()}}

    def summary(self) -> str:
        """One line for people: the total, the goodput, and the shares of what took a hundredth or more."""
        values = self.metrics()
        goodput = values.pop("goodput")
        total = max(sum(values.values()), 1e-9)
        shares = sorted(((v / total, name.removeprefix("time/")) for name, v in values.items()), reverse=True)
        others = [f"{name} {share:.1%}" for share, name in shares if name != "step" and share >= 0.01]
        return f"{total:.0f} s in all, goodput {goodput:.1%}" + "".join(f", {text}" for text in others)

    def store(self, folder: Path, step: int) -> None:
        """Writes the times to <folder>/time.json; `step` is the newest that is done."""
        self.enter(self._phase)
        path = folder / TIME_FILE
        temporary = path.with_name(path.name + ".tmp")
        text = json.dumps({"step": step, "steps": self._steps, "seconds": self._seconds, "date": self._date()})
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def add_stored(self, folder: Path, step: int) -> None:
        """Adds what earlier processes stored; what they did after `step`, where this one resumes, is to be redone."""
        path = folder / TIME_FILE
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            seconds = {name: float(stored["seconds"].get(name, 0.0)) for name in self._seconds}
            steps, last, date = int(stored["steps"]), int(stored["step"]), float(stored["date"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: not the times of a run (%r); goodput counts from now on", path, error)
            return
        for name, value in seconds.items():
            self._seconds[name] += value
        self._seconds[DOWN] += max(self._begun - date, 0.0)  # clocks of two hosts may differ
        self._steps += steps
        self.lose(last - step)
