"""The error of a command line that cannot be carried out, and what it says of files that could not be written."""

from __future__ import annotations

import os
from pathlib import Path


class ArgumentProblem(ValueError):
    """An argument that cannot be used; exit code 2."""


def output_problem(path: Path) -> str | None:
    """What keeps a file from being written, None for nothing; to be asked before the work that fills it."""
    folder = path.resolve().parent
    if path.is_dir():
        return "found a folder, expected the name of a file"
    if not folder.is_dir():
        return f"no folder {path.parent}, expected one that exists; make it first"
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        return "it cannot be written there; give another place, or change the permissions"
    return None
