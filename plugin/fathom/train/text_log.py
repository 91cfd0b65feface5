"""log.txt: what happened in a run, for people; every process that resumes it writes on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TextIO

from fathom.train.metrics import LineLogger

LOG_FILE = "log.txt"


class TextLog(logging.Handler):
    """A context that appends lines to <folder>/log.txt, each with the time in UTC and on disk at once.

    Records of the logger "fathom" that its level lets pass are among them, with their level.

    Args:
      folder: the run folder. enabled: False makes every method do nothing; pass `jax.process_index() == 0`.
    """

    def __init__(self, folder: Path, enabled: bool = True):
        super().__init__(logging.INFO)
        self._path, self._enabled = folder / LOG_FILE, enabled
        self._file: TextIO | None = None

    def __enter__(self) -> TextLog:
        if self._enabled:
            self._file = self._path.open("a", encoding="utf-8")
            logging.getLogger("fathom").addHandler(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.event(f"ended by {type(error).__name__}: {error}")
        logging.getLogger("fathom").removeHandler(self)
        self.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def event(self, text: str) -> None:
        """Appends a text; further lines of it are indented."""
        if self._file is not None:
            self._file.write(stamped(text))
            self._file.flush()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.event(f"{record.levelname}: {record.getMessage()}")
        except Exception:
            self.handleError(record)


def stamped(text: str) -> str:
    """A text as it stands in the log."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ  ", time.gmtime()) + text.replace("\n", "\n    ") + "\n"


class LogLines(LineLogger):
    """A line of metrics every N steps in a TextLog; used like any display of progress."""

    def __init__(self, log: TextLog, total: int, *, every: int):
        super().__init__(total, every=every, stream=None)
        self._log = log

    def message(self, text: str) -> None:
        """Appends a line."""
        self._log.event(text)
