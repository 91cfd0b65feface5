"""Checkpoints through orbax v1: a step folder appears complete or not at all, and is verified when
read.

A step folder holds two array items, "model" (params, model_state) and "train" (opt_state, step,
rng), and in `_CHECKPOINT_METADATA` the *payload*, JSON of everything else: the resolved recipe,
versions, data fingerprint and iterator states, and for every array its shape, dtype and checksum.
Orbax finds no flipped bits; the checksums do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import uuid
import zlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.mesh import state_shardings
from fathom.recipe_checks import apply_config
from fathom.train.manifest import checksums, describe_leaves
from fathom.train.state import TrainState, named_leaves, split_model
from fathom.zoo import ModelSpec

logger = logging.getLogger(__name__)

FORMAT = 1
METADATA_FILE = "_CHECKPOINT_METADATA"
VERSIONED = ("fathom-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MODEL_ITEM = ("params", "model_state")
TRAIN_ITEM = ("opt_state", "step", "rng")
# What orbax and TensorStore raise for missing, truncated or garbled files. Other errors (no memory,
# no permission) say nothing about the checkpoint and are passed on.
DAMAGE_ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, EOFError)


class CheckpointError(ValueError):
    """A checkpoint, or the folder for checkpoints, that cannot be used; the text says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A step folder that is incomplete, or whose contents are not what was saved."""


class Restored(NamedTuple):
    """A restored run: the state, this process's data iterator state, and the payload."""

    state: TrainState
    data_state: Any
    payload: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where step folders lie, local or any that orbax reaches ("gs://...").
      keep: how many of the newest are kept. keep_every: also keep multiples of this step.
      async_save: write in the background; at most one save is under way.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int | None = None,
        async_save: bool = True,
    ):
        self.directory = _absolute(directory)
        self._keep, self._keep_every, self._async_save = keep, keep_every, async_save
        self._manager: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, Any] | None = None
        self.saved_step: int | None = None

    def probe(self) -> None:
        """Makes the folder and writes a file into it.

        Raises:
          CheckpointError: when that fails, before anything was compiled.
        """
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

    def save(self, state: TrainState, data_state: Any, description: Mapping[str, Any]) -> None:
        """Starts a save (finishes it, when not async). Older steps go only once this one is
        complete.

        Args:
          state: the state after `state.step` steps.
          data_state: JSON-able state of this process's data iterator at that step.
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
            "data_states": _gather_json(data_state),
            "leaves": leaves,
        }
        custom = {"fathom": payload, "crc32": _json_crc32(payload)}
        try:
            response = self._open().save_checkpointables_async(
                step, tree, force=True, custom_metadata=custom
            )
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
        before it used.

        Args:
          abstract: shapes, dtypes and shardings wanted; any mesh.
          check: called with the payload before arrays are read; raises ValueError to refuse to
            resume.

        Raises:
          CheckpointError: when no step is sound, or the newest sound one holds other arrays.
        """
        for step in reversed(self.steps()):
            folder = self.directory / str(step)
            try:
                payload = _agree(lambda folder=folder: read_payload(folder))
                check(payload)
                items = _as_items(abstract)
                compare_leaves(items, payload, folder)
                loaded = _agree(lambda f=folder, i=items, p=payload: _load_items(f, i, p))
                return Restored(_from_items(abstract, loaded), _own_data_state(payload), payload)
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
        if jax.process_index() == 0:
            target = folder.parent / f"{folder.name}.corrupt"
            if target.exists():
                target = folder.parent / f"{folder.name}.corrupt-{uuid.uuid4().hex[:8]}"
            folder.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {folder.name}")


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def step_folders(directory: str | os.PathLike[str]) -> list[int]:
    """Steps that have a folder in a checkpoint directory, complete or not, rising."""
    directory = _absolute(directory)
    if not directory.exists():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit() and str(int(name)) == name)


def read_payload(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON part of a step folder: recipe, versions, model, data, leaves.

    Raises:
      DamagedCheckpointError: when the folder is incomplete or the payload is not what was saved.
    """
    folder = _absolute(folder)
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
    if _json_crc32(payload) != expected:
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


def _load_items(folder: epath.Path, items: dict[str, Any], payload: Mapping[str, Any]) -> Any:
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


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _as_items(state: TrainState) -> dict[str, Any]:
    """{"model": ..., "train": ...}: nested dicts with text keys, free of any library's classes."""

    def item(fields):
        return {name: _nest(named_leaves(getattr(state, name))) for name in fields}

    scalars = {"step": state.step, "rng": state.rng}
    train = {"opt_state": _nest(named_leaves(state.opt_state)), **scalars}
    return {"model": item(MODEL_ITEM), "train": train}


def _from_items(abstract: Any, items: Mapping[str, Any]) -> TrainState:
    def field(name, item):
        leaves = named_leaves(items[item][name])
        tree = getattr(abstract, name)
        return jax.tree.unflatten(jax.tree.structure(tree), [leaves[n] for n in named_leaves(tree)])

    where = {**dict.fromkeys(MODEL_ITEM, "model"), **dict.fromkeys(TRAIN_ITEM, "train")}
    return TrainState(**{name: field(name, item) for name, item in where.items()})


def _json_crc32(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return zlib.crc32(text.encode())


def _gather_json(value: Any) -> list[Any]:
    """The value of every process, in process order, on every process."""
    text = json.dumps(value, allow_nan=False).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _own_data_state(payload: Mapping[str, Any]) -> Any:
    states = payload["data_states"]
    if len(states) != jax.process_count():
        raise CheckpointError(
            f"the checkpoint's data order belongs to {len(states)} processes, this run has "
            f"{jax.process_count()}; resume with {len(states)} processes"
        )
    return states[jax.process_index()]


def _agree(read: Callable[[], Any]) -> Any:
    """`read()`, where damage seen by one process is damage for all: they must take the same step."""
    if jax.process_count() == 1:
        return read()
    value, error = None, None
    try:
        value = read()
    except DamagedCheckpointError as caught:
        error = caught
    failed = multihost_utils.process_allgather(np.array([error is not None])).reshape(-1)
    if failed.any():
        bad = [int(i) for i in np.flatnonzero(failed)]
        raise error or DamagedCheckpointError(f"processes {bad} cannot read it")
    return value


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers of a run."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_run(recipe: Mapping[str, Any], spec: ModelSpec, mesh: Mesh, data: Any) -> dict[str, Any]:
    """What a checkpoint says of its run: resolved recipe, model, mesh, versions, data fingerprint."""
    description = {
        "recipe": dict(recipe),
        "model": {
            "name": spec.name,
            "config": dataclasses.asdict(spec.config),
            "num_params": spec.num_params(spec.config)._asdict(),
        },
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "processes": jax.process_count(),
        "versions": versions(),
        "data_fingerprint": data,
    }
    return json.loads(json.dumps(description, allow_nan=False))


def config_differences(payload: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Architecture fields in which the checkpoint's model and `spec` differ, one text each."""
    old, new = payload["model"], json.loads(json.dumps(dataclasses.asdict(spec.config)))
    if old["name"] != spec.name:
        return [f"model.name: {old['name']!r} in the checkpoint, {spec.name!r} in the recipe"]
    return [
        f"model.config.{key}: {old['config'].get(key)!r} in the checkpoint, {new.get(key)!r} in the recipe"
        for key in sorted(old["config"].keys() | new.keys())
        if old["config"].get(key) != new.get(key)
    ]


def find_step(path: str | os.PathLike[str]) -> epath.Path | None:
    """The step folder that a path stands for, None when it is no Fathom checkpoint.

    Args:
      path: a step folder, a folder of step folders, or a run folder; of several steps the newest
        complete one.
    """
    path = _absolute(path)
    if (path / METADATA_FILE).exists():
        return path
    for directory in (path, path / "checkpoints"):
        for step in reversed(step_folders(directory)):
            if (directory / str(step) / METADATA_FILE).exists():
                return directory / str(step)
            logger.warning("%s is incomplete and skipped", directory / str(step))
    return None


def load_model(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    options: ComputeOptions | None = None,
    *,
    preset: str = "default",
    allow_cast: bool = False,
) -> nnx.Module:
    """The model of a Fathom checkpoint, its arrays verified.

    Args:
      path: see `find_step`. mesh: where the arrays go, one device unless given; any mesh will do.
      options: how it computes, as in the checkpoint's recipe unless given.
      preset: the model's sharding preset used with `mesh`.
      allow_cast: convert stored dtypes to those that `options` ask for, logging each; else refused.

    Raises:
      CheckpointError: when there is no checkpoint, it is damaged, or it holds other arrays than the
        model.
    """
    folder = find_step(path)
    if folder is None:
        raise CheckpointError(
            f"{path} holds no Fathom checkpoint; expected a run folder, its checkpoints folder, or a step"
        )
    payload = read_payload(folder)
    spec = zoo.get(payload["model"]["name"])
    problems: list[Any] = []
    spec = spec.with_config(
        apply_config(spec.config, payload["model"]["config"], "model.config", problems)
    )
    problems += config_differences(payload, spec) if not problems else []
    if problems:
        raise CheckpointError(
            f"{folder}: its model config cannot be read:\n  " + "\n  ".join(map(str, problems))
        )
    if options is None:
        block = payload["recipe"]["model"]
        names = [field.name for field in dataclasses.fields(ComputeOptions)]
        options = ComputeOptions(**{name: block[name] for name in names if name in block})
    split = split_model(spec, options)
    states = {"params": split.params, "model_state": split.model_state}
    items = {"model": {k: _nest(_placed(v, spec, mesh, preset)) for k, v in states.items()}}
    compare_leaves(items, payload, folder, allow_cast=allow_cast)
    loaded = _load_items(folder, items, payload)
    filled = {name: _cast_like(states[name], loaded["model"][name]) for name in states}
    return split.merge((filled["params"],), filled["model_state"], jax.random.key(0))


def _placed(state: nnx.State, spec: ModelSpec, mesh: Mesh | None, preset: str) -> dict[str, Any]:
    """Leaf name -> ShapeDtypeStruct with the sharding it will have."""
    leaves = named_leaves(state)
    if mesh is None:
        shardings = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = named_leaves(state_shardings(state, mesh, spec.preset(preset)))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in leaves.items()
    }


def _cast_like(state: nnx.State, loaded: Mapping[str, Any]) -> nnx.State:
    arrays = named_leaves(loaded)
    values = []
    for name, leaf in named_leaves(state).items():
        array = arrays[name]
        if array.dtype != leaf.dtype:
            logger.info("%s: cast from %s to %s", name, array.dtype, leaf.dtype)
            array = array.astype(leaf.dtype)
        values.append(array)
    return jax.tree.unflatten(jax.tree.structure(state), values)
