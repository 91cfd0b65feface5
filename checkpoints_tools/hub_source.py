"""A Hub folder as the weights of a model: every tensor found, checked against the model's table, and read.

Whatever spelling and storage the files have, this is the one place that says where a weight lies in them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools import quant
from checkpoints_tools.hub_table import (
    CONFIG_NAME,
    Stored,
    find_places,
    match_table,
    settle_mtp,
    size_problem,
)
from checkpoints_tools.safetensors_io import SafetensorsCheckpoint, list_problems
from fathom import zoo
from fathom.hub import HubTensor

logger = logging.getLogger(__name__)


class HubProblems(ValueError):
    """A folder that does not hold the model its config describes; the text lists every problem."""


class HubSource:
    """The weights of a Hub folder.

    Attributes:
      path: the folder. spec: the model, its config that of the folder.
      files: the safetensors files. stored: native name -> Stored, in the table's order.

    Raises:
      FileNotFoundError: without config.json or safetensors files.
      HubProblems: (a ValueError) listing every problem of names, shapes, dtypes and scales at once. Values are
        looked at by `value_problems`.
      ValueError: for damaged files, a config that is not understood.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        family = find_family(self.path)
        config = family.config_from_hf(self.path)
        self.files = SafetensorsCheckpoint(self.path)
        places, problems = find_places(self.files.tensors, family.hub_pieces)
        config, places, left_out = settle_mtp(config, places)
        if left_out is not None:
            logger.warning("%s: %s", self.path, left_out)
        if too_many := size_problem(config, len(places)):
            raise HubProblems(f"{self.path}: {too_many}")
        self.spec = family.with_config(config)
        self.stored, found = match_table(family.hub_tensors(config), places)
        if problems := problems + found:
            raise HubProblems(
                f"{self.path}: the files do not hold the model that {CONFIG_NAME} describes, "
                f"{len(problems)} problems:\n{list_problems(problems)}"
            )
        self._log_narrow()

    def _log_narrow(self) -> None:
        """A file that somebody cast as a whole has lost bits the model counts on; say so."""
        narrow = [n for n, s in self.stored.items() if s.tensor.storage == "f32" and s.dtype != "F32"]
        if narrow:
            logger.warning(
                "%s: %d tensors that belong in float32 are stored narrower (%s first); they are widened, the "
                "lost bits stay lost",
                self.path,
                len(narrow),
                narrow[0],
            )

    def value_problems(self) -> Iterator[str]:
        """Scales that are no numbers, tables with ids that do not exist, copies that are none. Reads those only."""
        yield from self._copy_problems()
        for stored in self.stored.values():
            if stored.scale is not None:
                yield from quant.check_scales(self.files.fetch(stored.scale), stored.scale)
            elif stored.tensor.limit is not None:
                yield from self._table_problems(stored)

    def _table_problems(self, stored: Stored) -> Iterator[str]:
        values = self.files.fetch(stored.name, stored.index)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if low < 0 or high >= stored.tensor.limit:
            yield (
                f"{self.files.file_of(stored.name)}: tensor {stored.name}: found values {low} to {high}, "
                f"expected 0 to {stored.tensor.limit - 1}"
            )

    def _copy_problems(self) -> Iterator[str]:
        for copy, name in self.spec.hub_copies(self.spec.config).items():
            if copy not in self.files.tensors or name not in self.stored:
                continue
            stored = self.stored[name]
            one, other = self.files.fetch(copy), self.files.fetch(stored.name, stored.index)
            if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
                yield (
                    f"{self.files.file_of(copy)}: tensor {copy}: differs from {name}, expected a copy of it: the "
                    "model has one of them only"
                )

    def check_values(self) -> None:
        """Raises HubProblems with all of `value_problems`."""
        problems = list(self.value_problems())
        if problems:
            raise HubProblems(f"{self.path}: {len(problems)} bad values:\n{list_problems(problems)}")

    def read(
        self, tensor: HubTensor, dtype: np.dtype | None = None, region: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """A weight, or a region of it, in our layout.

        Args:
          tensor: an entry of the table. dtype: what to decode quantised weights to and to cast others to; None
            keeps plain weights as they are.
          region: slices with start and stop of our dimensions; everything unless given.
        """
        stored = self.stored[tensor.name]
        if region is None:
            region = tuple(slice(0, size) for size in tensor.our_shape)
        window, layout, inner = tensor.layout.hub_window(tensor.shape, region)
        if stored.kind == "plain":
            part = self.files.fetch(stored.name, _narrow_index(stored.index, window))
            if dtype is not None and part.dtype != dtype:
                part = part.astype(dtype)
        else:
            part = self._decode(stored, window, np.dtype(np.float32 if dtype is None else dtype))
        return layout.to_ours(part)[inner]

    def _decode(self, stored: Stored, window: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        rows, columns = window
        wide = dtype if dtype.name in ("float32", "bfloat16") else np.dtype(np.float32)
        scales = self.files.fetch(stored.scale)
        if stored.kind == "fp8":
            codes = self.files.fetch(stored.name, (*stored.index, rows))[:, columns]
            part = quant.decode_fp8(codes, scales, wide, row0=rows.start, col0=columns.start)
        else:
            even = slice(columns.start // 2, -(-columns.stop // 2))
            packed = self.files.fetch(stored.name, (*stored.index, rows))[:, even]
            part = quant.decode_fp4(packed, scales, wide, row0=rows.start, col0=2 * even.start)
            part = part[:, columns.start - 2 * even.start :][:, : columns.stop - columns.start]
        return part.astype(dtype, copy=False)

    def scale_dtype(self, tensor: HubTensor) -> str:
        """Dtype of a quantised weight's scales, as spelled in the file."""
        return self.files.tensors[self.stored[tensor.name].scale].dtype

    def hub_files(self) -> Path | None:
        """Folder with the small files beside the weights: this one."""
        return self.path

    def read_codes(self, tensor: HubTensor) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales) of a quantised weight exactly as stored, in the Hub's layout."""
        stored = self.stored[tensor.name]
        return self.files.fetch(stored.name, stored.index), self.files.fetch(stored.scale)


def _narrow_index(
    index: tuple[int | slice, ...], window: tuple[slice, ...]
) -> tuple[int | slice, ...]:
    """The index of a window inside an indexed piece."""
    entries, dims = list(index), list(window)
    for position, entry in enumerate(entries):
        if isinstance(entry, slice):
            inner, start = dims.pop(0), entry.start or 0
            entries[position] = slice(start + inner.start, start + inner.stop)
    return (*entries, *dims)


def find_family(path: Path) -> zoo.ModelSpec:
    """The zoo's model whose Hub configs are like the folder's, by `model_type`; of several sizes the first.

    Raises:
      FileNotFoundError, ValueError: naming the file, what was found and what is known.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; it says which model the safetensors hold")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    known = {}
    for spec in reversed(zoo.all_specs()[0].values()):
        if spec.hub_model_type is not None:
            known[spec.hub_model_type] = spec
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{file}: model_type {kind!r}, supported: {', '.join(sorted(known))}")
    return known[kind]


def zoo_name(config: Any) -> str | None:
    """The zoo's name for an architecture, None where it is a size of its own."""

    def core(value: Any) -> dict[str, Any]:
        # How a file stores its experts does not make it another model.
        return {k: v for k, v in dataclasses.asdict(value).items() if k != "expert_dtype"}

    for name, spec in zoo.all_specs()[0].items():
        if type(spec.config) is type(config) and core(spec.config) == core(config):
            return name
    return None
