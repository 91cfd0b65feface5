"""Checkpoints through orbax v1: a step folder appears complete or not at all, and is verified when
read; what is in one is said in `fathom.step_folder`.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from fathom.step_folder import (
    FORMAT,
    CheckpointError,
    DamagedCheckpointError,
    absolute,
    json_crc32,
    read_payload,
    step_folders,
)
from fathom.train.checkpoint_format import agree, compare_leaves, gather_json, load_items, nest, reading
from fathom.train.manifest import checksums, describe_leaves
from fathom.train.state import TrainState, named_leaves

logger = logging.getLogger(__name__)

MODEL_ITEM = ("params", "model_state")
TRAIN_ITEM = ("opt_state", "step", "rng")


MIN_SLICE_BYTES = 64 << 10
"""What several devices hold copies of is written in slices, one by each, where a slice has at least this size."""


class Restored(NamedTuple):
    """A restored run: the state, the states of the data streams, and the payload."""

    state: TrainState
    data_states: list[Any]
    payload: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where step folders lie, local or any that orbax reaches ("gs://...").
      keep: how many of the newest are kept. keep_every: also keep multiples of this step.
      async_save: write in the background; at most one save is under way.
      on_saved: called with the step of each save that has completed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int | None = None,
        async_save: bool = True,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        self.directory = absolute(directory)
        self._keep, self._keep_every, self._async_save = keep, keep_every, async_save
        self._on_saved = on_saved
        self._manager: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, Any] | None = None
        self.saved_step: int | None = None

    def probe(self) -> None:
        """Makes the folder and writes a file into it.

        Raises:
          CheckpointError: when that fails in any process, before anything was compiled.
        """
        agree(self._probe)

    def _probe(self) -> None:
        probe = self.directory / f".probe-{uuid.uuid4().hex}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("fathom")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {self.directory} cannot be written ({error}); "
                "set checkpoint.directory to a folder that can be"
            ) from error

    def save(self, state: TrainState, data_states: Sequence[Any], description: Mapping[str, Any]) -> None:
        """Starts a save (finishes it, when not async). Older steps go only once this one is
        complete.

        Args:
          state: the state after `state.step` steps.
          data_states: JSON-able states at that step of the data streams that this process answers for; the
            checkpoint holds those of all processes.
          description: JSON-able facts about the run, see `describe_run`.

        Raises:
          CheckpointError: when this or the previous save failed.
        """
        self.wait()
        step = int(state.step)
        tree = _as_items(state)
        leaves = describe_leaves(tree)
        for name, value in checksums(tree).items():
            leaves[name]["checksum"] = value
        payload = {
            **description,
            "format": FORMAT,
            "step": step,
            "data_states": list(itertools.chain.from_iterable(gather_json(list(data_states)))),
            "leaves": leaves,
        }
        custom = {"fathom": payload, "crc32": json_crc32(payload)}
        try:
            response = self._open().save_checkpointables_async(step, tree, force=True, custom_metadata=custom)
        except Exception as error:
            raise self._save_failed(step, error) from error
        self._pending = (step, response)
        if not self._async_save:
            self.wait()

    def poll(self) -> None:
        """Raises CheckpointError when a save that runs in the background has failed; never waits."""
        self._finish(timeout=0)

    def wait(self) -> None:
        """Waits until the save under way is complete; CheckpointError when it failed."""
        self._finish(timeout=None)

    def close(self) -> None:
        """Releases the writer's threads. Errors of saves are those of `wait`, to be called first."""
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        try:
            manager.close()
        except Exception as error:  # orbax raises the error of a failed save here once more
            logger.debug("closing %s: %s", self.directory, error)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A save under way when the run fails is of a good step: let it complete, and report the
        # first failure.
        try:
            self.wait()
        except CheckpointError as late:
            if error is None:
                raise
            logger.error("%s", late)
        finally:
            self.close()

    def _finish(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result(timeout=timeout)
        except TimeoutError as error:
            if timeout is not None:
                return
            raise self._save_failed(step, error) from error
        except Exception as error:
            self._pending = None
            raise self._save_failed(step, error) from error
        self._pending, self.saved_step = None, step
        self._on_saved(step)

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"saving step {step} to {self.directory} failed: {error}; the last complete step is "
            f"{max(self.steps(), default='none')}"
        )

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            policies = ocp.training.preservation_policies
            kept = [policies.LatestN(self._keep)]
            if self._keep_every:
                kept.append(policies.EveryNSteps(self._keep_every))
            self._manager = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                context=_writing(),
            )
        return self._manager

    def steps(self) -> list[int]:
        """Steps that have a folder, complete or not, rising."""
        return step_folders(self.directory)

    def restore(
        self, abstract: TrainState, check: Callable[[dict[str, Any]], None] = lambda payload: None
    ) -> Restored | None:
        """The newest sound step, or None when nothing was ever saved here.

        A damaged or half-copied step is renamed to <step>.corrupt, with a warning, and the one
        before it used. One that cannot be read for another reason (no permission, too many open files) stays.

        Args:
          abstract: shapes, dtypes and shardings wanted; any mesh.
          check: called with the payload before arrays are read; raises ValueError to refuse to
            resume.

        Raises:
          CheckpointError: when no step is sound, the newest sound one holds other arrays, or a step cannot be
            read here and now.
        """
        for step in reversed(self.steps()):
            folder = self.directory / str(step)
            try:
                payload = agree(lambda folder=folder: _read_payload(folder))
                check(payload)
                items = _as_items(abstract)
                compare_leaves(items, payload, folder)
                loaded = load_items(folder, items, payload)
                return Restored(_from_items(abstract, loaded), payload["data_states"], payload)
            except DamagedCheckpointError as error:
                self._set_aside(folder, error)
        damaged = sorted(path.name for path in self.directory.glob("*.corrupt*"))
        if damaged:
            raise CheckpointError(
                f"{self.directory} holds no sound checkpoint, only damaged ones ({', '.join(damaged)}); "
                "restore one from a copy, or move them away to start from the beginning"
            )
        return None

    def _set_aside(self, folder: epath.Path, error: Exception) -> None:
        logger.warning("checkpoint %s is not used: %s", folder, error)
        agree(lambda: self._rename(folder))

    def _rename(self, folder: epath.Path) -> None:
        if jax.process_index() != 0:
            return
        target = folder.parent / f"{folder.name}.corrupt"
        if target.exists():
            target = folder.parent / f"{folder.name}.corrupt-{uuid.uuid4().hex[:8]}"
        folder.rename(target)


def _read_payload(folder: epath.Path) -> dict[str, Any]:
    with reading(folder):
        return read_payload(folder)


def _writing() -> ocp.Context:
    """How arrays are written: orbax would compile a program for the slice of every replicated array, however small."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    return context


def _as_items(state: TrainState) -> dict[str, Any]:
    """{"model": ..., "train": ...}: nested dicts with text keys, free of any library's classes."""

    def item(fields):
        return {name: nest(named_leaves(getattr(state, name))) for name in fields}

    scalars = {"step": state.step, "rng": state.rng}
    train = {"opt_state": nest(named_leaves(state.opt_state)), **scalars}
    return {"model": item(MODEL_ITEM), "train": train}


def _from_items(abstract: Any, items: Mapping[str, Any]) -> TrainState:
    def field(name, item):
        leaves = named_leaves(items[item][name])
        tree = getattr(abstract, name)
        return jax.tree.unflatten(jax.tree.structure(tree), [leaves[n] for n in named_leaves(tree)])

    where = {**dict.fromkeys(MODEL_ITEM, "model"), **dict.fromkeys(TRAIN_ITEM, "train")}
    return TrainState(**{name: field(name, item) for name, item in where.items()})
