"""Conversion between Hub folders and Fathom's step folders: checked first, then written block by block, resumable."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any

from checkpoints_tools.array_store import step_metadata
from checkpoints_tools.hub_source import HubSource, zoo_name
from checkpoints_tools.hub_table import CONFIG_NAME
from checkpoints_tools.journal import (
    Block,
    DestinationError,
    Journal,
    fingerprint,
    read_manifest,
    write_manifest,
)
from checkpoints_tools.model_weights import MeshCut, check_table, model_weights
from checkpoints_tools.narrowing import Narrowing
from checkpoints_tools.safetensors_io import INDEX_NAME, bits_per_element
from checkpoints_tools.step_source import HUB_FILES, StepSource
from checkpoints_tools.to_hub import HubPlan, HubWriter, plan_hub
from checkpoints_tools.to_orbax import (
    BLOCK_BYTES,
    DTYPES,
    OrbaxPlan,
    OrbaxWriter,
    leaves_of,
    plan_orbax,
    unlike_dtypes,
)
from fathom.hub import group_by_path, stacked_shape
from fathom.step_folder import FORMAT, METADATA_FILE, find_step, json_crc32

AUX_SUFFIXES = (".json", ".jinja", ".txt", ".model")
MAX_AUX_BYTES = 64 << 20
PARAM_DTYPE = {"native": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}
SHARDS_AT_A_TIME = 2
BASE_MEMORY = 1 << 30
"""Python, jax and the tables of a conversion, generously."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      source, destination: folders. to: "orbax" or "hf". dtype: "native", "bf16" or "fp32".
      expert_dtype: "fp8" to store FP4 experts as FP8 of the same numbers (to hf, native).
      narrow: rules "NAME=DTYPE" for weights to store in fewer bits.
      mesh: mesh axis -> size, to cut the arrays as this mesh's shards; preset: the sharding preset used with it.
      process, processes: this process's number, and how many share the work.
      threads: of this process; one per core unless given.
    """

    source: Path
    destination: Path
    to: str
    dtype: str = "native"
    expert_dtype: str | None = None
    narrow: tuple[str, ...] = ()
    mesh: Mapping[str, int] | None = None
    preset: str = "default"
    process: int = 0
    processes: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.to not in ("orbax", "hf"):
            problems.append(f"to: found {self.to!r}, expected 'orbax' or 'hf'")
        if self.dtype not in DTYPES:
            problems.append(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            problems.append(f"process: found {self.process} of {self.processes}, expected 0 to processes - 1")
        if self.expert_dtype not in (None, "fp8"):
            problems.append(f"expert_dtype: found {self.expert_dtype!r}, expected 'fp8' or nothing")
        elif self.expert_dtype and (self.to, self.dtype) != ("hf", "native"):
            problems.append("expert_dtype: only a Hub folder in native dtype stores experts so; leave it out")
        if self.mesh is not None and self.to == "hf":
            problems.append("mesh: a Hub folder is not cut for a mesh; leave it out")
        if self.destination.resolve() == self.source.resolve():
            problems.append(f"destination: {self.destination} is the source; give another folder")
        if problems:
            raise ValueError("convert: " + "; ".join(problems))


@dataclasses.dataclass
class Outcome:
    """How a conversion ended, or what it would do.

    Attributes:
      complete: the destination is whole. tensors: weights of the model. source_bytes, target_bytes: of all of
        them. blocks: all there are; done_before: found written; done_now: written by this process.
      seconds: spent. memory: upper estimate of resident bytes.
    """

    complete: bool
    tensors: int
    source_bytes: int
    target_bytes: int
    blocks: int
    done_before: int = 0
    done_now: int = 0
    seconds: float = 0.0
    memory: int = 0


Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


def convert(request: Request, progress: Progress | None = None, dry_run: bool = False) -> Outcome:
    """Does a conversion, or the rest of one that was interrupted.

    Everything that can be wrong with the source is looked for first, and nothing is written when something is.
    The destination is complete only once every process has done its share; each call says whether it is.

    Args:
      request: what to do. progress: told of every write. dry_run: check and plan, write nothing.

    Raises:
      ValueError, OSError: naming every problem of the source, an impossible request, a destination that holds
        something else (`DestinationError`), too little space.
    """
    job = _OrbaxJob(request) if request.to == "orbax" else _HubJob(request)
    outcome = job.outcome()
    if dry_run:
        return outcome
    begin = time.monotonic()
    if job.is_complete():
        _check_same(request.destination, job.plan_json())
        outcome.complete, outcome.done_before = True, outcome.blocks
        return outcome
    journal = Journal(request.destination, job.plan_json())
    try:
        done = {key for key, block in journal.done.items() if job.still_there(block)}
        outcome.done_before = len(done)
        job.check_space(outcome, [journal.done[key] for key in done])
        outcome.done_now = job.work(journal, done, progress or (lambda count: None))
        outcome.complete = _finish(job, journal)
    finally:
        journal.close()
    outcome.seconds = time.monotonic() - begin
    return outcome


def _check_same(destination: Path, plan: Mapping[str, Any]) -> None:
    try:
        about, _ = read_manifest(destination)
    except FileNotFoundError:
        about = {}
    if about.get("fingerprint") != fingerprint(plan):
        raise DestinationError(
            f"{destination}: already holds another checkpoint; give a folder that does not exist, or remove it"
        )


def _finish(job: _Job, journal: Journal) -> bool:
    """Completes the destination when nothing is left to do for any process."""
    if job.is_complete():  # another process was as fast
        return True
    recorded = journal.read()
    keys = job.keys()
    blocks = [recorded[key] for key in keys if key in recorded]
    if len(blocks) < len(keys):
        return job.is_complete()
    destination = job.request.destination
    about = {"fingerprint": journal.fingerprint, "to": job.request.to, "dtype": job.request.dtype}
    write_manifest(destination, about, blocks)
    job.complete()
    journal.clean()
    return True


class _Job(abc.ABC):
    """One direction of a conversion: its plan, its work and its last act."""

    request: Request

    @abc.abstractmethod
    def plan_json(self) -> dict[str, Any]:
        """What decides the result: two conversions with equal plans may finish one another."""

    @abc.abstractmethod
    def keys(self) -> list[tuple]:
        """Keys of all blocks, whichever process writes them."""

    @abc.abstractmethod
    def outcome(self) -> Outcome:
        """What there is to do; nothing of it done."""

    @abc.abstractmethod
    def is_complete(self) -> bool:
        """Whether the destination has its last file."""

    @abc.abstractmethod
    def still_there(self, block: Block) -> bool:
        """Whether what the journal says was written is there."""

    @abc.abstractmethod
    def work(self, journal: Journal, done: set[tuple], progress: Progress) -> int:
        """Writes this process's share of what is not done; returns how many blocks."""

    @abc.abstractmethod
    def complete(self) -> None:
        """Writes what makes the destination whole."""

    @property
    def threads(self) -> int:
        return self.request.threads or os.cpu_count() or 1

    def check_space(self, outcome: Outcome, done: Iterable[Block]) -> None:
        """Refuses to begin what the disk cannot hold."""
        needed = outcome.target_bytes - sum(block.num_bytes for block in done)
        free = shutil.disk_usage(self.request.destination).free
        if needed > free:
            raise OSError(
                f"{self.request.destination}: needs {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are "
                "free; make room or give another destination"
            )


class _OrbaxJob(_Job):
    def __init__(self, request: Request):
        self.request = request
        self.source = HubSource(request.source)
        spec = self.source.spec
        weights = model_weights(spec)
        table = group_by_path(s.tensor for s in self.source.stored.values())
        shapes = {path: stacked_shape(str(path), parts)[1] for path, parts in table.items()}
        check_table(request.source, weights, shapes)
        cut = None
        if request.mesh is not None:
            cut = MeshCut(spec, weights, request.mesh, request.preset, request.processes)
        narrowing = Narrowing(request.narrow, self.source.stored)
        collections = {path: weight.collection for path, weight in weights.items()}
        self.plan: OrbaxPlan = plan_orbax(self.source, request.dtype, collections, narrowing, cut)
        self.source.check_values()
        self.writer = OrbaxWriter(self.plan, request.destination)

    def plan_json(self) -> dict[str, Any]:
        request = self.request
        return {
            "to": "orbax",
            "dtype": request.dtype,
            "narrow": sorted(request.narrow),
            "mesh": dict(request.mesh) if request.mesh else None,
            "preset": request.preset,
            "source": _identity(self.source),
        }

    def keys(self) -> list[tuple]:
        return [key for unit in self.plan.units for key in self.writer.keys(unit)]

    def outcome(self) -> Outcome:
        tensors = self.source.files.tensors.values()
        block = max((s.tensor.stored()[0].num_bytes for s in self.source.stored.values()), default=0)
        largest = min(4 * block, BLOCK_BYTES) + block
        return Outcome(
            complete=False,
            tensors=len(self.source.stored),
            source_bytes=sum(info.num_bytes for info in tensors),
            target_bytes=self.plan.num_bytes,
            blocks=len(self.keys()),
            memory=BASE_MEMORY + 4 * self.threads * largest,
        )

    def is_complete(self) -> bool:
        return (self.request.destination / METADATA_FILE).is_file()

    def still_there(self, block: Block) -> bool:
        return self.writer.written(block)

    def work(self, journal: Journal, done: set[tuple], progress: Progress) -> int:
        self.writer.create()
        process, processes = self.request.process, self.request.processes
        mine = []
        for number, unit in enumerate(self.plan.units):
            owners = unit.processes or range(processes)
            if owners[number % len(owners)] == process and not done.issuperset(self.writer.keys(unit)):
                mine.append(unit)

        def one(unit: Any) -> int:
            blocks = self.writer.run(unit)
            journal.add(*blocks)
            progress(sum(block.num_bytes for block in blocks))
            return len(blocks)

        return _run_all(one, mine, self.threads)

    def complete(self) -> None:
        destination = self.request.destination
        _copy_aux(self.source.path, destination / HUB_FILES)
        self.writer.finish()
        payload = _payload(self.plan, self.request)
        custom = {"fathom": payload, "crc32": json_crc32(payload)}
        content = step_metadata(sorted(self.plan.arrays), custom, time.time_ns())
        os.sync()  # everything is on the disk before anything says that it is complete
        partial = destination / f".{METADATA_FILE}.{uuid.uuid4().hex}"
        partial.write_text(json.dumps(content), "utf-8")
        partial.replace(destination / METADATA_FILE)


class _HubJob(_Job):
    def __init__(self, request: Request):
        self.request = request
        self.source = open_weights(request.source)
        narrowing = Narrowing(request.narrow, self.source.stored)
        self.plan: HubPlan = plan_hub(self.source, request.dtype, narrowing, request.expert_dtype)
        if isinstance(self.source, HubSource):
            self.source.check_values()
        self.writer = HubWriter(self.plan, request.destination, f"{request.process}of{request.processes}")

    def plan_json(self) -> dict[str, Any]:
        request = self.request
        return {
            "to": "hf",
            "dtype": request.dtype,
            "expert_dtype": request.expert_dtype,
            "narrow": sorted(request.narrow),
            "source": _identity(self.source),
        }

    def keys(self) -> list[tuple]:
        return [key for shard in self.plan.shards for key in self.writer.keys(shard)]

    def outcome(self) -> Outcome:
        stored = self.source.stored.values()
        source_bytes = sum(_stored_bytes(self.source, s) for s in stored)
        block = max((_stored_bytes(self.source, s) for s in stored), default=0)
        return Outcome(
            complete=False,
            tensors=len(self.source.stored),
            source_bytes=source_bytes,
            target_bytes=self.plan.num_bytes,
            blocks=len(self.keys()),
            memory=2 * BASE_MEMORY + 6 * self.threads * block,
        )

    def is_complete(self) -> bool:
        return (self.request.destination / INDEX_NAME).is_file()

    def still_there(self, block: Block) -> bool:
        return self.writer.written(block.array)

    def work(self, journal: Journal, done: set[tuple], progress: Progress) -> int:
        for stale in self.request.destination.glob(f"*.partial-{self.request.process}of{self.request.processes}"):
            stale.unlink()  # what this process was writing when it was killed
        mine = [
            shard
            for number, shard in enumerate(self.plan.shards)
            if number % self.request.processes == self.request.process
            and not done.issuperset(self.writer.keys(shard))
        ]
        with ThreadPoolExecutor(self.threads) as pool:

            def one(shard: str) -> int:
                blocks = self.writer.run(shard, pool, progress)
                journal.add(*blocks)
                return len(blocks)

            # The next shard is written while one is being synced.
            return _run_all(one, mine, SHARDS_AT_A_TIME)

    def complete(self) -> None:
        destination = self.request.destination
        aux = self.source.hub_files()
        if aux is not None:
            _copy_aux(aux, destination, without=(CONFIG_NAME,))
        os.sync()
        self.writer.finish(aux)


def open_weights(path: Path) -> HubSource | StepSource:
    """The weights of a Hub folder or a Fathom checkpoint.

    Raises:
      FileNotFoundError: when there is nothing of either kind. Otherwise as the two.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if find_step(path) is not None:
        return StepSource(path)
    return HubSource(path)


def _run_all(one: Callable[[Any], int], items: Sequence[Any], threads: int) -> int:
    """Runs all items in threads; the first error stops those not begun."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _identity(source: HubSource | StepSource) -> Any:
    """What tells one source from another: names and sizes of files, or the payload's checksum."""
    if isinstance(source, StepSource):
        return {"step": source.payload["step"], "payload": json_crc32(source.payload)}
    files = {}
    for file in source.files.files:
        about = file.path.stat()
        files[file.path.name] = [about.st_size, about.st_mtime_ns]
    return {"files": files, "config": json_crc32((source.path / CONFIG_NAME).read_text("utf-8"))}


def _stored_bytes(source: HubSource | StepSource, stored: Any) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count * bits_per_element(stored.dtype) // 8


def _copy_aux(source: Path, destination: Path, without: tuple[str, ...] = ()) -> None:
    """Copies the small files beside the weights (config, tokenizer, chat template)."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix not in AUX_SUFFIXES or file.name in (INDEX_NAME, *without) or not file.is_file():
            continue
        # Download caches link to their blobs; a link to anywhere else is not a part of the folder.
        real = file.resolve()
        inside = real.parent == source.resolve() or real.parent.name == "blobs"
        if inside and real.stat().st_size <= MAX_AUX_BYTES:
            shutil.copyfile(real, destination / file.name)


def _payload(plan: OrbaxPlan, request: Request) -> dict[str, Any]:
    spec = plan.source.spec
    dtype = PARAM_DTYPE[request.dtype]
    name = request.destination.name
    payload = {
        "recipe": {"model": {"dtype": dtype, "param_dtype": dtype}},
        "model": {
            "name": zoo_name(spec.config) or spec.name,
            "config": dataclasses.asdict(spec.config),
            "num_params": spec.num_params(spec.config)._asdict(),
        },
        "mesh": dict(request.mesh or {}),
        "processes": request.processes,
        "versions": {
            "python": platform.python_version(),
            "fathom-jax": metadata.version("fathom-jax"),
            "tensorstore": metadata.version("tensorstore"),
        },
        "data_fingerprint": {},
        "conversion": {"dtype": request.dtype, "dtypes": unlike_dtypes(plan)},
        "format": FORMAT,
        "step": int(name) if name.isdigit() else 0,
        "data_states": [],
        "leaves": leaves_of(plan),
    }
    return json.loads(json.dumps(payload, allow_nan=False))
