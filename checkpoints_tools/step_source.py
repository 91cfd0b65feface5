"""A Fathom step folder as the weights of a model, read block by block, with the interface of `HubSource`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools import quant
from checkpoints_tools.array_store import ArrayStore, numpy_dtype
from checkpoints_tools.hub_table import KIND_OF_DTYPE, Stored
from checkpoints_tools.safetensors_io import DTYPE_NAMES, NUMPY_DTYPES
from fathom.hub import HubTensor
from fathom.step_folder import MODEL, QUANTISED, CheckpointError, find_step, read_payload, saved_spec

CACHE_BYTES = 1 << 30
"""A training run saves whole shards; the decoded one is kept while its weights are read one by one."""

HUB_FILES = "hub"
"""Folder with the small files of the Hub folder that a step was converted from."""


class StepSource:
    """The weights of a step folder, whether converted or trained.

    Attributes:
      path: the step folder. payload: what it says of itself. spec: the model.
      stored: native name -> Stored; `name` there is the array's path, joined with "/".
      as_stored: True when it was converted with native storage and nothing was trained since.

    Raises:
      CheckpointError: when there is no step, it is damaged, or the model has no Hub table.
    """

    def __init__(self, path: str | os.PathLike[str]):
        folder = find_step(path)
        if folder is None:
            raise CheckpointError(f"{path}: no complete Fathom checkpoint there")
        self.path = Path(folder)
        self.payload = read_payload(self.path)
        conversion = self.payload.get("conversion") or {}
        self.as_stored = conversion.get("dtype") == "native"
        self._dtypes: dict[str, str] = conversion.get("dtypes", {})
        self.spec = saved_spec(self.payload, self.path)
        if self.spec.hub_tensors is None:
            raise CheckpointError(f"{self.path}: model {self.spec.name} has no Hub format")
        self._stores: dict[str, ArrayStore] = {}
        leaves = self.payload["leaves"]
        places = {}
        for leaf in leaves:
            item, _, rest = leaf.partition("/")
            if item in (MODEL, QUANTISED):
                places[rest.partition("/")[2]] = leaf
        self.stored = {}
        missing = []
        for tensor in self.spec.hub_tensors(self.spec.config):
            path = "/".join(map(str, tensor.path))
            if path in places:
                self.stored[tensor.name] = self._plain(tensor, places[path], leaves[places[path]])
            elif f"{path}/codes" in places:
                self.stored[tensor.name] = self._codes(tensor, places[f"{path}/codes"])
            else:
                missing.append(path)
        if missing:
            raise CheckpointError(f"{self.path}: arrays missing: {', '.join(sorted(set(missing))[:20])}")

    def _plain(self, tensor: HubTensor, leaf: str, about: dict[str, Any]) -> Stored:
        dtype = self._dtypes.get(tensor.name, DTYPE_NAMES[numpy_dtype(about["dtype"])])
        return Stored(tensor, leaf, tensor.index, tensor.shape, dtype, "plain", None)

    def _codes(self, tensor: HubTensor, leaf: str) -> Stored:
        dtype = self._dtypes[tensor.name]
        kind = KIND_OF_DTYPE[dtype]
        rows, columns = tensor.shape
        shape = (rows, columns // 2) if dtype in ("I8", "U8") else tensor.shape
        scale = leaf.removesuffix("codes") + "scales"
        return Stored(tensor, leaf, tensor.index, shape, dtype, kind, scale)

    def scale_dtype(self, tensor: HubTensor) -> str:
        """Dtype of a quantised weight's scales, as spelled in the files it came from."""
        return self._dtypes[tensor.scale_name]

    def _read(self, leaf: str, region: tuple[int | slice, ...]) -> np.ndarray:
        item, *path = leaf.split("/")
        if item not in self._stores:
            self._stores[item] = ArrayStore(self.path / item, cache_bytes=CACHE_BYTES)
        return self._stores[item].read(tuple(path), region)

    def read(self, tensor: HubTensor, dtype: np.dtype | None = None) -> np.ndarray:
        """A weight in our layout, decoded and cast to `dtype` where it is given."""
        stored = self.stored[tensor.name]
        if stored.kind == "plain":
            values = self._read(stored.name, tensor.index)
            return values if dtype is None else values.astype(dtype, copy=False)
        codes, scales = self.read_codes(tensor)
        decode = quant.decode_fp8 if stored.kind == "fp8" else quant.decode_fp4
        return tensor.to_ours(decode(codes, scales, np.dtype(np.float32 if dtype is None else dtype)))

    def read_codes(self, tensor: HubTensor) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales) of a quantised weight as the Hub has them."""
        stored = self.stored[tensor.name]
        codes, scales = self._read(stored.name, tensor.index), self._read(stored.scale, tensor.index)
        if stored.dtype != "F4":
            codes = codes.view(NUMPY_DTYPES[stored.dtype])
        return codes, scales.view(NUMPY_DTYPES[self.scale_dtype(tensor)])

    def hub_files(self) -> Path | None:
        """Folder with the small files of the Hub folder it came from, where there is one."""
        folder = self.path / HUB_FILES
        return folder if folder.is_dir() else None
