"""The frame of a step folder: what makes it complete, and the JSON it says of itself.

A step folder holds array items ("model": params, model_state; "train": opt_state, step, rng) and in
`_CHECKPOINT_METADATA` the *payload*, JSON of everything else: the resolved recipe, versions, data
fingerprint and iterator states, and for every array its shape, dtype and checksum. The train loop and
the conversion tools both write such folders.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from fathom import zoo
from fathom.recipe_checks import Problem, apply_config

logger = logging.getLogger(__name__)

FORMAT = 1
METADATA_FILE = "_CHECKPOINT_METADATA"
MODEL, TRAIN, QUANTISED = "model", "train", "quantised"
"""Items: the model's arrays; optimizer state, step and rng; codes and scales of a model kept in quantised storage."""


class CheckpointError(ValueError):
    """A checkpoint, or the folder for checkpoints, that cannot be used; the text says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A step folder that is incomplete, or whose contents are not what was saved."""


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """A local path made absolute, or a remote one ("gs://...") as it is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def step_folders(directory: str | os.PathLike[str]) -> list[int]:
    """Steps that have a folder in a checkpoint directory, complete or not, rising."""
    directory = absolute(directory)
    if not directory.exists():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit() and str(int(name)) == name)


def read_payload(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON part of a step folder: recipe, versions, model, data, leaves.

    Raises:
      DamagedCheckpointError: when the folder is incomplete or the payload is not what was saved.
    """
    folder = absolute(folder)
    file = folder / METADATA_FILE
    if not file.exists():
        raise DamagedCheckpointError(
            f"{folder} is incomplete: it has no {METADATA_FILE}; a copy was probably cut off"
        )
    try:
        custom = json.loads(file.read_text())["custom_metadata"]
        payload, expected = custom["fathom"], custom["crc32"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{file} is damaged or was not written by fathom ({type(error).__name__}: {error})"
        ) from error
    if json_crc32(payload) != expected:
        raise DamagedCheckpointError(f"{file} is damaged: its checksum does not match")
    if payload["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {payload['format']}, this version reads {FORMAT}"
        )
    if str(payload["step"]) != folder.name and folder.name.isdigit():
        raise DamagedCheckpointError(f"{folder} holds step {payload['step']}; was it renamed?")
    return payload


def json_crc32(value: Any) -> int:
    """Checksum of the JSON text of a value, keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return zlib.crc32(text.encode())


def find_step(path: str | os.PathLike[str]) -> epath.Path | None:
    """The step folder that a path stands for, None when it is no Fathom checkpoint.

    Args:
      path: a step folder, a folder of step folders, or a run folder; of several steps the newest
        complete one.
    """
    path = absolute(path)
    if (path / METADATA_FILE).exists():
        return path
    for directory in (path, path / "checkpoints"):
        for step in reversed(step_folders(directory)):
            if (directory / str(step) / METADATA_FILE).exists():
                return directory / str(step)
            logger.warning("%s is incomplete and skipped", directory / str(step))
    return None


def saved_spec(payload: Mapping[str, Any], folder: Any) -> zoo.ModelSpec:
    """The saved model at its saved size.

    Raises:
      CheckpointError: when its config cannot be read. ValueError: for a model that is not installed.
    """
    spec = zoo.get(payload["model"]["name"])
    problems: list[Problem] = []
    config = apply_config(spec.config, payload["model"]["config"], "model.config", problems)
    if problems:
        raise CheckpointError(
            f"{folder}: its model config cannot be read:\n  " + "\n  ".join(map(str, problems))
        )
    return spec.with_config(config)
