"""`fathom.load`: a Hub-format folder or a Fathom checkpoint as a module ready to call.

The module is built abstractly and filled with the file's arrays, each cut to the pieces that its
devices hold, so that nothing larger than one parameter's shard is copied at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from checkpoints_tools.safetensors_io import SafetensorsCheckpoint, list_problems
from fathom import zoo
from fathom.hub import HubTensor
from fathom.layers.options import ComputeOptions
from fathom.mesh import state_shardings

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# model_type of a Hub config -> (name in the zoo, module with `native_pieces`).
_FAMILIES = {"deepseek_v4": ("deepseek-v4-flash", "fathom.models.deepseek_v4.hf_mapping")}
_FLOAT_DTYPES = ("F32", "BF16", "F16")
_INT_DTYPES = ("I64", "I32")
_QUANTISED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one weight lies in the files: the tensor that holds it, and the index of the piece."""

    tensor: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    dtype: str


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "fp32",
    *,
    simulate_quant: bool = False,
    attention: str = "auto",
) -> nnx.Module:
    """Loads a model with its weights.

    Args:
      path: a Hub-format folder (`config.json` and safetensors, in DeepSeek's names or as
        `transformers` saves them) or a checkpoint that `fathom train` wrote.
      mesh: lay the weights out over this mesh by the model's default preset; one device without it.
      dtype: "fp32" or "bf16", of the weights and of the computation. Weights that the reference
        keeps in float32 stay float32, and integer tables int32.
      simulate_quant: reproduce the rounding of the released inference code.
      attention: which version of the attention op, see `ComputeOptions`.

    Returns:
      The module; call it as `module(tokens, positions=None, segment_ids=None)`.

    Raises:
      FileNotFoundError: when there is nothing at the path.
      ValueError: for a config that is not understood, quantised weights, and listing at once every
        missing, left over, doubled or wrongly shaped tensor.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {sorted(DTYPES)}")
    options = ComputeOptions(
        dtype=DTYPES[dtype],
        param_dtype=DTYPES[dtype],
        attention=attention,
        simulate_quant=simulate_quant,
    )
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_file():
        raise ValueError(f"{path}: found a file, expected the folder it lies in")
    if is_hub_folder(path):
        return _load_hub(path, mesh, options)
    from fathom.train.checkpoint_model import load_model

    # The caller names the dtype here, so converting to it is asked for; it is logged.
    return load_model(path, mesh, options, allow_cast=True)


def is_hub_folder(path: str | Path) -> bool:
    """Whether a folder is in the Hub's format: it holds `config.json` or safetensors files."""
    path = Path(path)
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def _load_hub(path: Path, mesh: Mesh | None, options: ComputeOptions) -> nnx.Module:
    spec, native_pieces = _family(path)
    config = spec.config_from_hf(path)
    checkpoint = SafetensorsCheckpoint(path)
    sources, problems = _find_sources(checkpoint, native_pieces)
    config = _without_absent_mtp(config, checkpoint, sources)
    table = spec.hub_tensors(config)
    problems += _compare(table, sources)
    if problems:
        raise ValueError(
            f"{path}: the files do not hold the model that config.json describes:\n"
            f"{list_problems(problems)}"
        )
    _log_narrow(path, table, sources)
    abstract = nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), options))
    graphdef, state = nnx.split(abstract)
    shardings = None
    if mesh is not None:
        shardings = dict(nnx.to_flat_state(state_shardings(state, mesh, spec.preset("default"))))
    by_path = _group(table)
    flat = dict(nnx.to_flat_state(state))
    _check_same_paths(path, flat, by_path)
    for name, variable in flat.items():
        sharding = None if shardings is None else shardings[name].get_value()
        value = _parameter(checkpoint, name, by_path[name], sources, variable.get_value(), sharding)
        flat[name] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _family(path: Path) -> tuple[zoo.ModelSpec, Callable[..., list]]:
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; it says which model the safetensors hold")
    try:
        raw = json.loads(config.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: not readable as JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in _FAMILIES:
        raise ValueError(f"{config}: model_type {kind!r}, supported: {', '.join(_FAMILIES)}")
    name, mapping = _FAMILIES[kind]
    return zoo.get(name), importlib.import_module(mapping).native_pieces


def _find_sources(
    checkpoint: SafetensorsCheckpoint, native_pieces: Callable[..., list]
) -> tuple[dict[str, _Source], list[str]]:
    """Native name -> where it lies, and the problems of spelling and storage."""
    quantised = [
        f"{name}: stored as {info.dtype}"
        for name, info in checkpoint.tensors.items()
        if info.dtype in _QUANTISED_DTYPES
    ]
    if quantised:
        raise ValueError(
            f"{checkpoint.path}: {len(quantised)} tensors are quantised, which load does not read; "
            f"give a folder with F32, BF16 or F16 weights:\n{list_problems(quantised)}"
        )
    sources: dict[str, _Source] = {}
    problems = []
    for name, info in checkpoint.tensors.items():
        for native, index in native_pieces(name, info.shape):
            shape = np.broadcast_to(np.empty(()), info.shape)[index].shape
            if native in sources:
                problems.append(f"{native}: found twice, as {sources[native].tensor} and {name}")
            sources[native] = _Source(name, index, shape, info.dtype)
    return sources, problems


def _without_absent_mtp(
    config: Any, checkpoint: SafetensorsCheckpoint, sources: Mapping[str, _Source]
) -> Any:
    """`transformers` saves no multi-token prediction although its config still announces it."""
    announced = getattr(config, "num_mtp_layers", 0)
    saved_by_transformers = any(name.startswith("model.") for name in checkpoint.tensors)
    if not announced or not saved_by_transformers:
        return config
    if any(name.startswith("mtp.") for name in sources):
        return config
    logger.warning(
        "%s: config.json announces %d layers of multi-token prediction and the files have none, as "
        "transformers saves them; loading without",
        checkpoint.path,
        announced,
    )
    return dataclasses.replace(config, num_mtp_layers=0, mtp_kind="mtp", dspark=None)


def _compare(table: list[HubTensor], sources: Mapping[str, _Source]) -> list[str]:
    """Every difference between the model's tensors and those in the files."""
    problems = []
    for tensor in table:
        source = sources.get(tensor.name)
        if source is None:
            problems.append(f"{tensor.name}: missing, expected shape {list(tensor.shape)}")
            continue
        if source.shape != tensor.shape:
            problems.append(
                f"{tensor.name}: found shape {list(source.shape)}, expected {list(tensor.shape)}"
            )
        allowed = _INT_DTYPES if tensor.storage == "i64" else _FLOAT_DTYPES
        if source.dtype not in allowed:
            problems.append(f"{tensor.name}: found {source.dtype}, expected {' or '.join(allowed)}")
    known = {tensor.name for tensor in table}
    for name, source in sources.items():
        if name not in known:
            problems.append(
                f"{source.tensor}: left over, the model has no such tensor "
                f"(shape {list(source.shape)})"
            )
    return problems


def _log_narrow(path: Path, table: list[HubTensor], sources: Mapping[str, _Source]) -> None:
    """A file that somebody cast as a whole has lost bits the model counts on; say so."""
    narrow = [t.name for t in table if t.storage == "f32" and sources[t.name].dtype != "F32"]
    if narrow:
        logger.warning(
            "%s: %d tensors that belong in float32 are stored narrower (%s first); they are "
            "widened, the lost bits stay lost",
            path,
            len(narrow),
            narrow[0],
        )


def _group(table: list[HubTensor]) -> dict[tuple, dict[tuple[int, ...], HubTensor]]:
    """Path -> leading index -> tensor."""
    grouped: dict[tuple, dict[tuple[int, ...], HubTensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.path, {})[tensor.index] = tensor
    return grouped


def _check_same_paths(path: Path, flat: Mapping[tuple, Any], by_path: Mapping[tuple, Any]) -> None:
    unlike = set(flat) ^ set(by_path)
    if unlike:
        names = sorted("/".join(map(str, name)) for name in unlike)
        raise ValueError(
            f"{path}: the model and its Hub table name different parameters: {', '.join(names)}"
        )


def _parameter(
    checkpoint: SafetensorsCheckpoint,
    name: tuple,
    parts: Mapping[tuple[int, ...], HubTensor],
    sources: Mapping[str, _Source],
    abstract: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One parameter, assembled from its Hub tensors."""
    first = next(iter(parts.values()))
    lead = tuple(max(index[axis] for index in parts) + 1 for axis in range(len(first.index)))
    shape = lead + first.our_shape
    if shape != abstract.shape or len(parts) != int(np.prod(lead)):
        raise ValueError(
            f"parameter {'/'.join(map(str, name))}: {len(parts)} Hub tensors make shape {shape}, "
            f"the model has {abstract.shape}"
        )
    for tensor in parts.values():
        if tensor.storage == "i64":
            _check_table(checkpoint, sources[tensor.name], tensor)

    def window(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
        out = np.empty([len(one) for one in ranges], abstract.dtype)
        outer, inner = ranges[: len(lead)], tuple(index[len(lead) :])
        for place in itertools.product(*(range(len(one)) for one in outer)):
            tensor = parts[tuple(one[i] for one, i in zip(outer, place, strict=True))]
            source = sources[tensor.name]
            array = checkpoint.read(source.tensor)[source.index]
            out[place] = tensor.to_ours(array)[inner]
        return out

    if sharding is None:
        return jax.device_put(window((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, window)


def _check_table(checkpoint: SafetensorsCheckpoint, source: _Source, tensor: HubTensor) -> None:
    """Integers of a hash table fit int32 and are not negative; the model checks nothing later."""
    values = checkpoint.read(source.tensor)[source.index]
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high >= tensor.limit:
        raise ValueError(
            f"{checkpoint.file_of(source.tensor)}: tensor {source.tensor}: found values {low} to "
            f"{high}, expected 0 to {tensor.limit - 1}"
        )
