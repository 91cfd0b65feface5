"""What a step folder holds, and reading it with every byte accounted for.

A step folder holds two array items, "model" (params, model_state) and "train" (opt_state, step,
rng), and in `_CHECKPOINT_METADATA` the *payload*, JSON of everything else: the resolved recipe,
versions, data fingerprint and iterator states, and for every array its shape, dtype and checksum.
Orbax finds no flipped bits; the checksums do.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from fathom.train.manifest import checksums, describe_leaves
from fathom.train.state import named_leaves

FORMAT = 1
METADATA_FILE = "_CHECKPOINT_METADATA"
# What orbax and TensorStore raise for missing, truncated or garbled files. Other errors (no memory,
# no permission) say nothing about the checkpoint and are passed on.
DAMAGE_ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, EOFError)


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


def compare_leaves(
    items: Any, payload: Mapping[str, Any], folder: Any, *, allow_cast: bool = False
) -> None:
    """Refuses a checkpoint whose arrays are not those wanted, listing all differences.

    Raises:
      CheckpointError: for missing or extra arrays, other shapes, or (unless `allow_cast`) other
        dtypes.
    """
    wanted, stored = describe_leaves(items), payload["leaves"]
    prefixes = {f"{item}/" for item in items}
    stored = {n: leaf for n, leaf in stored.items() if any(n.startswith(p) for p in prefixes)}
    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: not in the model" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        for aspect in ("shape",) if allow_cast else ("shape", "dtype"):
            found, expected = stored[name][aspect], wanted[name][aspect]
            if found != expected:
                problems.append(f"{name}: {aspect} {found} in the checkpoint, {expected} wanted")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"checkpoint {folder} does not fit, {len(problems)} differences:\n  {shown}{more}\n"
            "use the model and dtypes it was saved with, or ask for a cast when loading"
        )


def load_items(folder: epath.Path, items: dict[str, Any], payload: Mapping[str, Any]) -> Any:
    """The arrays of some items, in their stored dtypes, verified."""
    stored = payload["leaves"]
    names = iter(named_leaves(items))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, np.dtype(stored[next(names)]["dtype"]), sharding=x.sharding
        ),
        items,
    )
    loaded = {}
    try:
        # One at a time: when one of several cannot be read, orbax leaves the others' coroutines
        # behind.
        for item, abstract in wanted.items():
            loaded |= ocp.load_checkpointables(folder, {item: abstract})
    except DAMAGE_ERRORS as error:
        cause = error.__cause__ or error  # orbax wraps the reader's error in one about handlers
        text = " ".join(str(cause).split())[:300]
        raise DamagedCheckpointError(
            f"{folder} cannot be read ({type(cause).__name__}: {text})"
        ) from error
    sums = checksums(loaded)
    wrong = sorted(name for name, value in sums.items() if stored[name]["checksum"] != value)
    if wrong:
        raise DamagedCheckpointError(
            f"{folder} is damaged: {len(wrong)} arrays have other contents than were saved, "
            f"among them {', '.join(wrong[:5])}"
        )
    return loaded


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves named "a/b/c"."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def json_crc32(value: Any) -> int:
    """Checksum of the JSON text of a value, keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return zlib.crc32(text.encode())
