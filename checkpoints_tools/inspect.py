"""What a checkpoint is, from headers alone: model, tensors, dtypes, bytes by group, problems."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.hub_source import find_family, zoo_name
from checkpoints_tools.hub_table import (
    CONFIG_NAME,
    KIND_OF_DTYPE,
    Place,
    find_places,
    match_table,
    settle_mtp,
    size_problem,
)
from checkpoints_tools.safetensors_io import (
    INDEX_NAME,
    SafetensorsCheckpoint,
    SafetensorsError,
    SafetensorsFile,
    TensorInfo,
)
from fathom import zoo

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_SHOWN = 20
WRITERS = ("fathom-jax", "jax")

# A name counts under the first group it matches; names are native Hub names or our paths.
_GROUPS = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        ("mtp", r"(^|[./])mtp[./]"),
        ("experts", r"[./]experts([./]|$)"),
        ("shared experts", r"[./]shared(_experts)?[./]"),
        ("router", r"[./](gate|router)[./]"),
        ("hc", r"(^|[./])hc_|_hc[./]"),
        ("indexer", r"[./]indexer[./]"),
        ("compressor", r"[./]compressor[./]"),
        ("attention", r"[./](self_)?attn[./]"),
        ("embed", r"(^|[./])embed"),
        ("head", r"(^|[./])(lm_)?head[./]"),
        ("norm", r"norm"),
    )
)


def group_of(name: str) -> str:
    """The group that a tensor counts under, by its name."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


@dataclasses.dataclass
class Report:
    """What `fathom inspect` found.

    Attributes:
      path: what was looked at. kind: "hub folder", "safetensors file" or "fathom checkpoint".
      model: the zoo's name, a description when the zoo has no such size, None when unknown.
      config: the architecture's fields, empty when unknown.
      tensors, parameters, num_bytes: counts; of quantised tensors `parameters` counts stored
        elements.
      dtypes: dtype as spelled in the files -> [tensors, bytes].
      groups: group (embed, attention, experts, ...) -> bytes.
      details: further facts, name -> text.
      notes: remarkable and sound. problems: what is wrong.
    """

    path: str
    kind: str
    model: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    num_bytes: int = 0
    dtypes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    groups: dict[str, int] = dataclasses.field(default_factory=dict)
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def count(self, name: str, dtype: str, elements: int, num_bytes: int) -> None:
        """Adds one tensor."""
        self.tensors += 1
        self.parameters += elements
        self.num_bytes += num_bytes
        entry = self.dtypes.setdefault(dtype, [0, 0])
        entry[0] += 1
        entry[1] += num_bytes
        group = group_of(name)
        self.groups[group] = self.groups.get(group, 0) + num_bytes

    def to_text(self) -> str:
        """The report for people."""
        rows = [("path", self.path), ("kind", self.kind), ("model", self.model or "unknown")]
        rows += list(self.details.items())
        rows.append(("tensors", f"{self.tensors:,} ({self.parameters:,} elements)"))
        rows.append(("size", _size(self.num_bytes)))
        lines = [f"{name:<12}{text}" for name, text in rows]
        if self.dtypes:
            lines.append("dtypes")
            ordered = sorted(self.dtypes.items(), key=lambda item: -item[1][1])
            lines += [f"  {name:<14}{n:>8,} tensors  {_size(b):>12}" for name, (n, b) in ordered]
        if self.groups:
            lines.append("groups")
            ordered = sorted(self.groups.items(), key=lambda item: -item[1])
            lines += [f"  {name:<14}{_size(b):>12}" for name, b in ordered]
        lines += [f"note        {note}" for note in self.notes]
        lines.append(f"problems    {len(self.problems) or 'none'}")
        lines += [f"  {problem}" for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"  and {len(self.problems) - MAX_SHOWN} more (--json lists all)")
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes every field, lists in full."""
        text = json.dumps(dataclasses.asdict(self), indent=1, default=str)
        Path(path).write_text(text + "\n", encoding="utf-8")


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if value < 1024:
            break
        value /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{value:.2f} {unit}"


# --- The Hub's side ------------------------------------------------------------------------------


def is_hub_path(path: Path) -> bool:
    """Whether a path is for `inspect_hub`: a file, or a folder with a config or weight files."""
    if path.is_file():
        return True
    if (path / INDEX_NAME).exists() or any(path.glob("*.safetensors")):
        return True
    return (path / CONFIG_NAME).is_file() or any(
        file.suffix in PICKLED for file in path.iterdir() if file.is_file()
    )


def inspect_hub(path: str | os.PathLike[str]) -> Report:
    """The report on a safetensors file or a Hub-format folder, from headers, never tensor data."""
    path = Path(path)
    report = Report(str(path), "hub folder" if path.is_dir() else "safetensors file")
    tensors = _read_headers(path, report.problems)
    spec, config = _read_config(path, report)
    if spec is not None:
        report.model = _model_name(config)
        report.config = json.loads(json.dumps(dataclasses.asdict(config)))
    places, problems = find_places(tensors, spec.hub_pieces if spec is not None else None)
    report.problems += problems
    natives: dict[str, str] = {}
    for native, place in places.items():
        natives.setdefault(place.name, native)
    for name, info in tensors.items():
        report.count(natives.get(name, name), info.dtype, math.prod(info.shape), info.num_bytes)
    if path.is_dir() and spec is not None and tensors:
        _compare(spec, config, places, report)
    _storage_notes(config, places, report)
    return report


def _read_headers(path: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """Name -> header entry. Damaged files are told and left out."""
    pickled = [f.name for f in _files(path) if f.suffix in PICKLED]
    problems += [f"{name}: pickled, which is never read; convert it elsewhere" for name in pickled]
    if path.is_file() and path.suffix in PICKLED:
        return {}
    try:
        return dict(SafetensorsCheckpoint(path).tensors)
    except FileNotFoundError as error:
        problems += [] if pickled else [str(error)]
        return {}
    except SafetensorsError as error:
        problems += [line.strip() for line in str(error).splitlines()]
    found: dict[str, TensorInfo] = {}
    for file in _files(path):
        if path.is_dir() and file.suffix == ".safetensors":
            try:
                found |= SafetensorsFile(file).tensors
            except SafetensorsError:
                continue  # among the problems already
    return found


def _files(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]


def _read_config(path: Path, report: Report) -> tuple[zoo.ModelSpec | None, Any]:
    """The zoo's spec whose `config_from_hf` understands the folder's config, and the config."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not file.is_file():
        if path.is_dir():
            report.problems.append(f"{CONFIG_NAME} is missing: the model is unknown")
        return None, None
    report.notes += zoo.all_specs()[1]
    try:
        spec = find_family(file.parent)
        return spec, spec.config_from_hf(file)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
    return None, None


def _model_name(config: Any) -> str:
    """The zoo's name for this architecture, or what it is when the zoo has no such size."""
    if name := zoo_name(config):
        return name
    family = type(config).__name__.removesuffix("Config")
    layers = getattr(config, "num_layers", None)
    return f"{family}, {layers} layers (a size of its own)" if layers else family


def _compare(spec: zoo.ModelSpec, config: Any, places: Mapping[str, Place], report: Report) -> None:
    """Missing, extra and wrongly shaped or typed tensors against the model's table."""
    if too_many := size_problem(config, len(places)):
        report.problems.append(too_many)
        return
    config, places, left_out = settle_mtp(config, places)
    report.notes += [left_out] if left_out is not None else []
    try:
        report.problems += match_table(spec.hub_tensors(config), places)[1]
    except ValueError as error:
        report.problems.append(str(error))


def _storage_notes(config: Any, places: Mapping[str, Place], report: Report) -> None:
    """How the routed experts are stored, told by dtype: the -Base models' configs do not say."""
    found = Counter(
        place.dtype
        for name, place in places.items()
        if name.endswith(".weight") and group_of(name) == "experts"
    )
    if not found:
        return
    spelled = {"I8": "FP4 (two to a byte)", "F8_E4M3": "FP8"}
    report.details["experts"] = ", ".join(spelled.get(dtype, dtype) for dtype in sorted(found))
    if len(found) > 1:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in found.most_common())
        report.notes.append(f"routed experts are stored in different dtypes: {counts}")
    stored = KIND_OF_DTYPE.get(found.most_common(1)[0][0])
    said = getattr(config, "expert_dtype", None)
    if stored and said and stored != said:
        report.notes.append(f"{CONFIG_NAME} says expert_dtype {said}, the tensors are {stored}")


# --- Fathom's side -------------------------------------------------------------------------------


def inspect_step(
    folder: str | os.PathLike[str],
    payload: Mapping[str, Any],
    steps: Iterable[int],
    spec: zoo.ModelSpec | None,
    problems: Iterable[str] = (),
) -> Report:
    """The report on one step folder of a Fathom run.

    Args:
      payload: its JSON part: step, model, versions, mesh, leaves. steps: step folders beside it.
      spec: its model at its size, None when the zoo here has no such model.
      problems: those found already.
    """
    report = Report(str(folder), "fathom checkpoint", problems=list(problems))
    report.model = payload["model"]["name"]
    report.config = dict(payload["model"]["config"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in payload["mesh"].items() if size > 1)
    versions = payload["versions"]
    report.details = {
        "step": str(payload["step"]),
        "steps": ", ".join(map(str, steps)),
        "saved on": f"mesh {mesh or 'of one device'}, {payload['processes']} process(es)",
        "written by": ", ".join(f"{k} {v}" for k, v in versions.items() if k in WRITERS),
    }
    for name, leaf in payload["leaves"].items():
        elements = math.prod(leaf["shape"])
        num_bytes = elements * _itemsize(leaf["dtype"])
        if name.startswith("train/"):
            report.count("optimizer", leaf["dtype"], elements, num_bytes)
        else:
            report.count(name, leaf["dtype"], elements, num_bytes)
    if "other" in report.groups:
        report.groups["optimizer state and step"] = report.groups.pop("other")
    if spec is not None and spec.hub_tensors is not None:
        report.problems += _missing_leaves(spec, payload)
    return report


def _itemsize(dtype: str) -> int:
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _missing_leaves(spec: zoo.ModelSpec, payload: Mapping[str, Any]) -> list[str]:
    """Parameters of the model's table that the step does not hold, and the other way round."""
    expected = {"/".join(map(str, tensor.path)) for tensor in spec.hub_tensors(spec.config)}
    found = {leaf.split("/", 2)[2] for leaf in payload["leaves"] if leaf.startswith("model/")}
    problems = [f"{path}: missing" for path in sorted(expected - found)]
    return problems + [f"{path}: not of this model" for path in sorted(found - expected)]
