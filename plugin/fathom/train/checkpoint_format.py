"""The arrays of a step folder, read with every byte accounted for: orbax finds no flipped bits, the checksums do.

What goes wrong is sorted by its cause: damage condemns the step, a file that cannot be opened here and now does not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fathom.step_folder import CheckpointError, DamagedCheckpointError
from fathom.train.manifest import checksums, describe_leaves
from fathom.train.state import named_leaves

T = TypeVar("T")

DAMAGE_ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError)
"""What orbax and TensorStore raise for missing, truncated or garbled files, and for much else: see `_obstacle`."""

DAMAGE_CODES = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
OTHER_CODES = (
    "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED",
    "ABORTED", "INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "ALREADY_EXISTS",
)  # fmt: skip
"""TensorStore raises ValueError for every status; its text begins with the code (none for INVALID_ARGUMENT)."""

SPARE_FILES = 32
"""A process that cannot open so many more can find nothing out about a step."""

MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


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
            # Integer tables are 64 bits wide on the Hub; a conversion has made sure that 32 hold them.
            if found != expected and (found, expected) != ("int64", "int32"):
                problems.append(f"{name}: {aspect} {found} in the checkpoint, {expected} wanted")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"checkpoint {folder} does not fit, {len(problems)} differences:\n  {shown}{more}\n"
            "use the model and dtypes it was saved with, or ask for a cast when loading"
        )


def load_items(folder: epath.Path, items: dict[str, Any], payload: Mapping[str, Any]) -> Any:
    """The arrays of some items, in their stored dtypes, verified.

    Raises:
      DamagedCheckpointError: for missing, truncated or garbled files, or other contents than were saved.
      CheckpointError: when the files cannot be read here and now, see `reading`.
    """
    stored = payload["leaves"]
    names = iter(named_leaves(items))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, _readable_dtype(stored[next(names)]["dtype"]), sharding=x.sharding
        ),
        items,
    )
    spans_processes = any(not leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(wanted))
    if spans_processes:
        loaded = agree(lambda: _load(folder, wanted))  # before the checksums, in which all processes take part
    else:
        loaded = _load(folder, wanted)
    sums = checksums(loaded)
    # Conversions leave no checksum of whole arrays: every piece of the files carries its own.
    wrong = sorted(n for n, value in sums.items() if stored[n]["checksum"] not in (None, value))
    if wrong:
        raise DamagedCheckpointError(
            f"{folder} is damaged: {len(wrong)} arrays have other contents than were saved, "
            f"among them {', '.join(wrong[:5])}"
        )
    return loaded


def _load(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    loaded = {}
    # Each process reads on its own: orbax would wait for all of them, for ever if one has failed.
    context = ocp.Context()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    with reading(folder), context:
        # One at a time: when one of several cannot be read, orbax leaves the others' coroutines behind.
        for item, abstract in wanted.items():
            loaded |= ocp.load_checkpointables(folder, {item: abstract})
    return loaded


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """A context for reading a step folder, which sorts errors by their cause.

    Raises:
      DamagedCheckpointError: for missing, truncated or garbled files.
      CheckpointError: when the folder cannot be read here and now, which says nothing of its contents: no
        permission, no more open files or memory, storage that does not answer.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) and not isinstance(error, DamagedCheckpointError):
            raise
        obstacle = _obstacle(error)
        if obstacle is None and isinstance(error, DAMAGE_ERRORS):
            obstacle = _closed_file(folder)
        if obstacle is not None:
            raise CheckpointError(
                f"{folder} cannot be read here and now ({_describe(obstacle)}); nothing was changed, the step may be "
                "sound: allow this user to read all of it, raise the limit of open files (ulimit -n), free memory or "
                "wait for the storage, then start again"
            ) from error
        if isinstance(error, DamagedCheckpointError) or not isinstance(error, DAMAGE_ERRORS):
            raise
        raise DamagedCheckpointError(f"{folder} cannot be read ({_describe(_root(error))})") from error


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).partition(" [tensorstore_spec")[0].split())
    if len(text) > 400:  # begins with what was tried and ends with what stopped it
        text = f"{text[:100]} ... {text[-300:]}"
    return f"{type(error).__name__}: {text}"


def _root(error: BaseException) -> BaseException:
    """What began it: orbax wraps the reader's error in some about handlers and array indices."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _obstacle(error: BaseException) -> BaseException | None:
    """The first of an error and its causes that says nothing of the contents of what was read, None without one."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if _is_obstacle(current):
            return current
        seen.append(current)
        current = current.__cause__ or current.__context__
    return None


def _is_obstacle(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, DAMAGE_ERRORS)
    if type(error) is RuntimeError and error.__cause__ is None:
        # "can't start new thread", "random_device: device not available": the process is short of something.
        return True
    text = str(error)
    number = re.search(r"os_error_code='(\d+)'", text)
    if number and isinstance(error, ValueError):
        return int(number[1]) not in MISSING_ERRNOS
    return text.partition(":")[0] in OTHER_CODES


def _closed_file(folder: epath.Path) -> OSError | None:
    """Why a file or folder below a local step cannot be opened, None when all can.

    Libraries ask whether a file exists, and take one that they may not see for one that is not there. They hold
    several files at once, so all must open beside `SPARE_FILES` others.
    """
    if "://" in os.fspath(folder):
        return None

    def refuse(error: OSError) -> None:
        raise error

    try:
        with contextlib.ExitStack() as spare:
            for _ in range(SPARE_FILES):
                spare.enter_context(open(os.devnull, "rb"))
            for parent, _, names in os.walk(folder, onerror=refuse):
                for name in names:
                    with open(os.path.join(parent, name), "rb"):
                        pass
    except OSError as error:
        return None if isinstance(error, DAMAGE_ERRORS) else error
    return None


def _readable_dtype(name: str) -> np.dtype:
    return np.dtype("int32" if name == "int64" else name)


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


# --- All processes alike --------------------------------------------------------------------------

KINDS = (DamagedCheckpointError, CheckpointError, ValueError)
"""Errors that `agree` passes from process to process, by rising rank; others count as the last."""


def agree(action: Callable[[], T]) -> T:
    """`action()`, called by all processes at the same place: an error in one is an error in all.

    Without it the others would wait at the next collective for the one that failed. `action` itself holds none.

    Raises:
      the process's own error when no other process has one of a higher rank in `KINDS`: a step that one process
        cannot open is not to be set aside because another finds it damaged. Else that one's kind and text.
    """
    if jax.process_count() == 1:
        return action()
    value, error = None, None
    try:
        value = action()
    except Exception as caught:
        error = caught
    told = gather_json(None if error is None else [_rank(error), str(error) or repr(error)])
    failed = [(about[0], index, about[1]) for index, about in enumerate(told) if about is not None]
    if not failed:
        return value
    rank, index, text = max(failed, key=lambda failure: failure[0])
    if error is not None and _rank(error) == rank:
        raise error
    raise KINDS[rank](f"process {index}: {text}")


def _rank(error: Exception) -> int:
    return next((rank for rank, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS) - 1)


def gather_json(value: Any) -> list[Any]:
    """The value of every process, in process order, on every process."""
    text = json.dumps(value, allow_nan=False).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
