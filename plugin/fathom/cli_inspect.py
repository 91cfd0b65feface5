"""`fathom inspect` on any path: Hub formats by `checkpoints_tools`, runs by `fathom.train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.inspect import Report, inspect_hub, inspect_step, is_hub_path
from checkpoints_tools.journal import WORK_FOLDER
from fathom.cli_problem import ArgumentProblem
from fathom.zoo import ModelSpec


def inspect_path(path: str | os.PathLike[str], *, verify: bool = False) -> Report:
    """The report on a Hub file or folder, or on a Fathom run, checkpoints folder or step.

    Raises:
      ArgumentProblem: when the path does not exist or holds no checkpoint of either kind.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentProblem(f"{path}: no such file or folder")
    report = _report(path)
    if verify:
        _verify(path, report)
    return report


def _verify(path: Path, report: Report) -> None:
    """Adds what the checksums say to the report."""
    from checkpoints_tools.verify import has_manifest, verify

    if not has_manifest(path):
        raise ArgumentProblem(f"{path}: has no manifest; only the destination of a conversion can be verified")
    problems = verify(path)
    report.problems += problems
    report.details["verified"] = f"{len(problems)} blocks differ" if problems else "every block as it was written"


def _report(path: Path) -> Report:
    if (path / WORK_FOLDER).is_dir():
        return Report(
            str(path), "unfinished conversion", problems=["run the same conversion again to finish it"]
        )
    if is_hub_path(path):
        return inspect_hub(path)
    from fathom.step_folder import CheckpointError, find_step, read_payload, step_folders

    folder = find_step(path)
    candidates = [folder] if folder is not None else []
    for directory in (path, path / "checkpoints"):
        candidates += [directory / str(step) for step in reversed(step_folders(directory))]
    if not candidates:
        raise ArgumentProblem(
            f"{path}: no checkpoint; expected a Hub-format folder (config.json, *.safetensors), a "
            "safetensors file, a Fathom run folder, its checkpoints folder, or one step"
        )
    folder = Path(candidates[0])
    directory = folder.parent
    problems = []
    for step in step_folders(directory):
        try:
            read_payload(directory / str(step))
        except CheckpointError as error:
            problems.append(str(error))
    problems += [
        f"{damaged.name} was set aside as damaged by an earlier run"
        for damaged in sorted(directory.glob("*.corrupt*"))
    ]
    try:
        payload = read_payload(folder)
    except CheckpointError as error:
        text = str(error)
        problems += [] if text in problems else [text]
        return Report(str(path), "fathom checkpoint", problems=problems)
    spec = _spec_of(payload, folder, problems)
    return inspect_step(folder, payload, step_folders(directory), spec, problems)


def _spec_of(payload: Mapping[str, Any], folder: Any, problems: list[str]) -> ModelSpec | None:
    """The saved model at its saved size; what stands in the way is added to `problems`."""
    from fathom.step_folder import CheckpointError, saved_spec

    try:
        return saved_spec(payload, folder)
    except CheckpointError as error:
        problems += [line.strip() for line in str(error).splitlines()[1:]]
    except ValueError as error:
        problems.append(f"{error}; install the package that adds this model")
    return None
