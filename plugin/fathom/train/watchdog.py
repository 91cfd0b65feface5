"""Ends a process whose training stands still, so that whatever started it starts it again."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import TextIO

import jax

from fathom.train.goodput import RunClock
from fathom.train.text_log import LOG_FILE, stamped

EXIT_HUNG = 4
"""Exit code of a process that was ended for standing still."""

ALLOWANCE = 3600.0
"""Seconds that everything but steps may take beyond `train.watchdog`: making or restoring the state, the first step of
a stage with its compilation, a save, an evaluation; each by itself."""

LAST_WORDS = 30.0
"""Seconds for writing the stack traces: the run folder's file system may be what hangs."""

STEADY = ("step", "data")


class Watchdog:
    """A context in whose thread the process ends, with `EXIT_HUNG`, when no step completes for too long.

    Before that it writes the stack traces of all threads to standard error and to <folder>/hang.<process>.txt. Should
    the interpreter itself be held up, so that no thread of it runs, faulthandler writes them to standard error a minute
    later and ends the process with code 1.

    Args:
      limit: seconds; None watches nothing. clock: says what the process is doing. folder: the run folder.
    """

    def __init__(self, limit: float | None, clock: RunClock, folder: Path):
        self._limit, self._clock, self._folder = limit, clock, folder
        self._process = jax.process_index()  # asked for now: jax may be what stands still
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fathom-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._limit is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def allowed(self, phase: str) -> float:
        """Seconds that a phase may last without progress."""
        return self._limit if phase in STEADY else self._limit + ALLOWANCE

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit / 4, 5.0)):
            phase, since = self._clock.mark
            waited = time.monotonic() - since
            left = self.allowed(phase) - waited
            if left <= 0:
                self._end(phase, waited)
            # Replaces the one before; it has a thread that needs no interpreter.
            faulthandler.dump_traceback_later(left + 60.0, exit=True, file=2)

    def _end(self, phase: str, waited: float) -> None:
        threading.Timer(LAST_WORDS, os._exit, [EXIT_HUNG]).start()
        path = self._folder / f"hang.{self._process}.txt"
        text = (
            f"process {self._process}: no step has completed for {waited:.0f} s, train.watchdog is "
            f"{self._limit:g} s, in phase {phase!r}; the process ends with code {EXIT_HUNG}; stack traces of all "
            f"threads: {path}"
        )
        try:
            os.write(2, f"{text}\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
            self._folder.mkdir(parents=True, exist_ok=True)  # which only the first process has made
            with path.open("a", encoding="utf-8") as file:
                _write_traces(file, text)
            if self._process == 0:
                # Not through the run's own log: what stands still may hold its lock.
                with (self._folder / LOG_FILE).open("a", encoding="utf-8") as file:
                    file.write(stamped(text))
        finally:
            os._exit(EXIT_HUNG)


def _write_traces(file: TextIO, text: str) -> None:
    file.write(stamped(text))
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.flush()
    os.fsync(file.fileno())
