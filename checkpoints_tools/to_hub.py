"""A model's weights -> a Hub folder: which tensor goes into which shard in which storage, and writing it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_tools import quant
from checkpoints_tools.hub_source import HubSource
from checkpoints_tools.hub_table import CONFIG_NAME, Stored
from checkpoints_tools.journal import Block, crc32_of
from checkpoints_tools.narrowing import Narrowing
from checkpoints_tools.safetensors_io import NUMPY_DTYPES
from checkpoints_tools.safetensors_writer import Entry, ShardWriter, shard_name, write_index
from checkpoints_tools.step_source import StepSource
from fathom.hub import FP8_BLOCK, HubTensor, scale_shape

MAX_SHARD_BYTES = 16 << 30
"""The release has a shard for each layer, 3.5 GB in Flash and 14 GB in Pro; wider storage is cut at this size."""

_LAYER = re.compile(r"^(?:model\.)?(layers|mtp)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Target:
    """How one weight will be stored.

    Attributes:
      tensor: the weight. entries: its tensor and, where quantised, that of its scales.
      codes: how they come about. "copy" takes codes and scales as they are, "fp8" rewrites FP4 codes as FP8 ones
        of the same numbers, "values" stores or encodes the values.
    """

    tensor: HubTensor
    entries: tuple[Entry, ...]
    codes: str = "values"

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return sum(entry.num_bytes for entry in self.entries)


@dataclasses.dataclass(frozen=True)
class HubPlan:
    """Everything an export will write.

    Attributes:
      source: where the weights come from. dtype: "native", "bf16" or "fp32".
      shards: file name -> what it holds. expert_dtype: see `plan_hub`.
    """

    source: HubSource | StepSource
    dtype: str
    shards: Mapping[str, list[Target]]
    expert_dtype: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(target.num_bytes for shard in self.shards.values() for target in shard)


def plan_hub(
    source: HubSource | StepSource, dtype: str, narrowing: Narrowing, expert_dtype: str | None = None
) -> HubPlan:
    """Plans an export.

    Args:
      source: where the weights come from. dtype: "native" keeps the storage of a source that is or was a Hub
        folder, and gives a trained model that of the release; "bf16" and "fp32" store plain weights, of which
        those that the release has in float32 and in integers stay so.
      narrowing: weights that shall be stored in fewer bits, by name.
      expert_dtype: "fp8" stores in native dtype as FP8 what would be FP4.
    """
    targets = [_target(source, stored, dtype, narrowing, expert_dtype) for stored in source.stored.values()]
    of_name = {target.entries[0].name: target for target in targets}
    for copy, name in source.spec.hub_copies(source.spec.config).items():
        target = of_name[name]
        (entry,) = target.entries
        targets.append(dataclasses.replace(target, entries=(entry._replace(name=copy),)))
    groups: list[list[Target]] = []
    last, size = None, 0
    for target in sorted(targets, key=lambda t: _shard_order(t.entries[0].name)):
        group = _shard_order(target.entries[0].name)
        if group != last or size + target.num_bytes > MAX_SHARD_BYTES:
            groups.append([])
            last, size = group, 0
        groups[-1].append(target)
        size += target.num_bytes
    shards = {shard_name(number, len(groups)): group for number, group in enumerate(groups, 1)}
    return HubPlan(source, dtype, shards, expert_dtype)


def _shard_order(name: str) -> tuple[int, int]:
    """The release's order: embedding, layers, head and other roots, MTP."""
    found = _LAYER.match(name)
    if found:
        return (1 if found[1] == "layers" else 3), int(found[2])
    return (0, 0) if name.removeprefix("model.").startswith("embed") else (2, 0)


def _target(
    source: HubSource | StepSource, stored: Stored, dtype: str, narrowing: Narrowing, expert_dtype: str | None
) -> Target:
    tensor = stored.tensor
    if dtype == "native" and (isinstance(source, HubSource) or source.as_stored):
        if stored.kind == "plain":
            spelled = narrowing.apply(tensor.name, stored.dtype)
            return Target(tensor, (Entry(tensor.name, spelled, tensor.shape),))
        if stored.kind == "fp4" and expert_dtype == "fp8":
            return Target(tensor, _entries(dataclasses.replace(tensor, storage="fp8")), "fp8")
        entries = (
            Entry(tensor.name, stored.dtype, stored.shape),
            Entry(tensor.scale_name, source.scale_dtype(tensor), scale_shape(tensor.shape, stored.kind)),
        )
        return Target(tensor, entries, "copy")
    if dtype == "native":
        if tensor.storage == "fp4" and expert_dtype == "fp8":
            tensor = dataclasses.replace(tensor, storage="fp8")
        return Target(tensor, _entries(tensor))
    kept = {"f32": "F32", "i64": "I64"}.get(tensor.storage)
    spelled = kept or {"bf16": "BF16", "fp32": "F32"}[dtype]
    spelled = narrowing.apply(tensor.name, spelled)
    return Target(tensor, (Entry(tensor.name, spelled, tensor.shape),))


def _entries(tensor: HubTensor) -> tuple[Entry, ...]:
    return tuple(Entry(s.name, s.dtype, s.shape) for s in tensor.stored())


class HubWriter:
    """Writes the shards of a plan.

    Args:
      plan: what to write. destination: the folder. suffix: of temporary names, one's own.
    """

    def __init__(self, plan: HubPlan, destination: Path, suffix: str):
        self.plan, self.destination, self._suffix = plan, destination, suffix

    def keys(self, shard: str) -> list[tuple]:
        """Keys of the blocks of a shard."""
        return [(shard, entry.name, None) for target in self.plan.shards[shard] for entry in target.entries]

    def written(self, shard: str) -> bool:
        """Whether the file is there; it has its name only when it is complete."""
        return (self.destination / shard).is_file()

    def run(self, shard: str, pool: Executor, advance: Callable[[int], None]) -> list[Block]:
        """Writes one shard, its tensors in parallel."""
        targets = self.plan.shards[shard]
        entries = [entry for target in targets for entry in target.entries]
        with ShardWriter(self.destination / shard, entries, {"format": "pt"}, self._suffix) as writer:

            def one(target: Target) -> list[Block]:
                blocks = []
                arrays = make_arrays(self.plan.source, target)
                for entry, array in zip(target.entries, arrays, strict=True):
                    data = writer.write(entry.name, array)
                    blocks.append(
                        Block(target.tensor.name, shard, data.size, crc32_of(data), name=entry.name)
                    )
                advance(target.num_bytes)
                return blocks

            futures = [pool.submit(one, target) for target in targets]
            try:
                return [block for future in futures for block in future.result()]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def finish(self, aux: Path | None) -> None:
        """Writes config.json and the index: with them the folder is a model."""
        weight_map = {
            entry.name: shard
            for shard, targets in self.plan.shards.items()
            for target in targets
            for entry in target.entries
        }
        config = hub_config(self.plan, aux)
        partial = self.destination / f".{CONFIG_NAME}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        partial.replace(self.destination / CONFIG_NAME)
        write_index(self.destination, weight_map, self.plan.num_bytes)


def make_arrays(source: HubSource | StepSource, target: Target) -> Iterator[np.ndarray]:
    """The arrays of a target's entries, in their order.

    Raises:
      ValueError: naming the weight, when its values cannot be stored so.
    """
    tensor, entry = target.tensor, target.entries[0]
    if target.codes == "copy":
        yield from source.read_codes(tensor)
        return
    if target.codes == "fp8":
        codes, scales = source.read_codes(tensor)
        try:
            yield from quant.fp4_to_fp8(codes.view(np.uint8), scales)
        except ValueError as error:
            raise ValueError(f"{source.path}: {tensor.name}: {error}; keep FP4, or decode to bf16") from error
        return
    if len(target.entries) == 1:
        values = tensor.to_hub(source.read(tensor, NUMPY_DTYPES[entry.dtype]))
        yield values
        return
    values = np.ascontiguousarray(tensor.to_hub(source.read(tensor)))
    if values.dtype not in (np.float32, ml_dtypes.bfloat16):
        values = values.astype(np.float32)
    encode = quant.encode_fp8 if tensor.storage == "fp8" else quant.encode_fp4
    try:
        codes, scales = encode(values)
    except ValueError as error:
        raise ValueError(f"{source.path}: {tensor.name}: {error}") from error
    yield codes.view(NUMPY_DTYPES[entry.dtype])
    yield scales


def hub_config(plan: HubPlan, aux: Path | None) -> dict[str, Any]:
    """config.json of the export: that of the folder it came from where there is one, with the storage corrected.

    Args:
      aux: folder with the original `config.json`, or None.
    """
    spec = plan.source.spec
    original = aux / CONFIG_NAME if aux is not None else None
    if original is not None and original.is_file():
        config = json.loads(original.read_text("utf-8"))
        if _mtp_kind(spec.config_from_hf(original)) != _mtp_kind(spec.config):
            config = spec.config_to_hf(spec.config)  # it announces stages that were left out
        if plan.dtype == "native" and not _encoded(plan):
            return config | ({"expert_dtype": plan.expert_dtype} if plan.expert_dtype else {})
    else:
        config = spec.config_to_hf(spec.config)
    config.pop("quantization_config", None)
    if plan.dtype == "native":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
        config["torch_dtype"] = "bfloat16"
        if plan.expert_dtype:
            config["expert_dtype"] = plan.expert_dtype
    else:
        config.pop("expert_dtype", None)
        config["torch_dtype"] = {"bf16": "bfloat16", "fp32": "float32"}[plan.dtype]
        if "dtype" in config:
            config["dtype"] = config["torch_dtype"]
    return config


def _mtp_kind(config: Any) -> str | None:
    return getattr(config, "mtp_kind", None)


def _encoded(plan: HubPlan) -> bool:
    """Whether quantised storage is made anew, rather than copied."""
    return any(
        len(target.entries) > 1 and target.codes == "values" for shard in plan.shards.values() for target in shard
    )
