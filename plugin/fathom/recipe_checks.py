"""What can be wrong with a recipe, found before anything is compiled and told all at once.

`schema_problems` puts pydantic's errors into our words; `cross_problems` looks at combinations.
Nothing here imports jax until a check needs the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from fathom.topology import parse_topology

if TYPE_CHECKING:
    from fathom.zoo import ModelSpec

MAX_WEIGHT_PROBLEMS = 8
"""Weights named when a mesh does not divide them; one wrong axis size usually hits dozens."""


class Problem(NamedTuple):
    """One thing wrong with a recipe: the key path, what is there, what should be, what to do."""

    key: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}; expected {self.expected}; fix: {self.fix}"


class RecipeError(ValueError):
    """A recipe that cannot run.

    Attributes:
      problems: every Problem found.
      source: the recipe's file or name.
    """

    def __init__(self, problems: list[Problem], source: str):
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        head = f"recipe {source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """"did you mean ...?" for the known word nearest to a wrong one, None when nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty mapping stays a value, lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- Schema --------------------------------------------------------------------------------------


def _block_type(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """Key as a recipe spells it -> field."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in _keys(model).items():
        block = _block_type(field.annotation)
        yield f"{prefix}{name}"
        if block is not None and typing.get_origin(field.annotation) is not tuple:  # items of a list have no path
            yield from _key_paths(block, f"{prefix}{name}.")


def _unknown_key(model: type[BaseModel], loc: tuple, value: Any) -> Problem:
    block: type[BaseModel] = model
    for part in loc[:-1]:
        if isinstance(part, int):  # an item of a list, whose block is that of the list
            continue
        block = _block_type(_keys(block)[part].annotation)
    prefix = "".join(f"{part}." for part in loc[:-1])
    known = list(_keys(block))
    match = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if match:
        fix = f"did you mean {prefix}{match[0]}?"
    else:
        # The key may be right and its block wrong: look at every key's last part.
        last = {key: key.rsplit(".", 1)[-1] for key in _key_paths(model)}
        near = difflib.get_close_matches(str(loc[-1]), last.values(), n=1, cutoff=0.8)
        elsewhere = [key for key, name in last.items() if name in near]
        fix = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else "remove it"
    where = f"block {prefix[:-1]!r}" if prefix else "a recipe"
    key = ".".join(map(str, loc))
    expected = f"a key of {where}: {', '.join(known)}"
    return Problem(key, f"an unknown key (value {value!r})", expected, fix)


def _choices(text: str) -> list[str]:
    return [part for part in text.split("'")[1::2]]


def schema_problems(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> list[Problem]:
    """pydantic's errors, each with its key path and a fix."""
    problems = []
    for item in error.errors(include_url=False):
        loc, kind, value = item["loc"], item["type"], item["input"]
        key = ".".join(map(str, loc)) or "recipe"
        message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if kind == "extra_forbidden":
            problems.append(_unknown_key(model, loc, value))
        elif kind == "missing":
            problems.append(Problem(key, "nothing", "a value", f"add {key} to the recipe"))
        elif kind == "literal_error":
            fix = nearest(str(value), _choices(message)) or f"set {key} to one of those"
            problems.append(Problem(key, repr(value), message, fix))
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            fix = f"write {key} as `key: value` lines"
            problems.append(Problem(key, repr(value), "a mapping of keys to values", fix))
        else:
            fix = f"set {key} to a value {message}"
            if message.startswith("a "):
                fix = f"set {key} to {message.split(',')[0]}"
            problems.append(Problem(key, _as_read(value), message, _meant(key, kind, value) or fix))
    return problems


def _as_read(value: Any) -> str:
    if isinstance(value, bool):
        return f"{value!r} (YAML reads yes, no, on and off as booleans too)"
    return repr(value)


def _meant(key: str, kind: str, value: Any) -> str | None:
    """The fix for a value of another type that can only mean one thing."""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"set {key}={int(value)}, without a point or exponent"
    if kind == "bool_type" and value in (0, 1):
        return f"set {key}={'true' if value else 'false'}"
    return None


# --- Combinations --------------------------------------------------------------------------------


def cross_problems(blocks: Mapping[str, Any], num_devices: int | None) -> list[Problem]:
    """Combinations that cannot work.

    Args:
      blocks: block name -> the block, or None (or absent) where it could not be read; checks that
        need it are left out then.
      num_devices: devices there are, None where that is not known yet.
    """
    have = {name: block for name, block in blocks.items() if block is not None}
    problems: list[Problem] = []
    problems += _mesh_problems(have, num_devices)
    problems += _precision_problems(have)
    problems += _schedule_problems(have)
    problems += _data_problems(have)
    spec = None
    if "model" in have:
        spec, found = model_spec(have["model"])
        problems += found
    if spec is not None:
        problems += _length_problems(have, spec.config)
        problems += _tokenizer_problems(have, spec.config)
        problems += _routing_problems(have, spec)
        problems += _sharding_problems(have, spec)
    return problems


def _mesh_problems(have: Mapping[str, Any], num_devices: int | None) -> Iterator[Problem]:
    if "mesh" not in have:
        return
    mesh = have["mesh"]
    needed = math.prod(mesh.shape.values())
    named = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1"
    simulated = mesh.simulated_devices
    slice_ = None if mesh.topology is None else parse_topology(mesh.topology)
    if slice_ is not None and slice_.devices != needed:
        yield Problem(
            "mesh.topology",
            f"{slice_}, of {slice_.devices} devices",
            f"a slice of {needed} devices, the product of the mesh axes ({named})",
            "change the axes or the slice so that they agree",
        )
    if simulated is not None and simulated != needed:
        yield Problem(
            "mesh.simulated_devices",
            f"{simulated}",
            f"{needed}, the product of the mesh axes ({named})",
            f"set mesh.simulated_devices={needed}, or change the axes",
        )
    elif num_devices is not None and needed != num_devices:
        yield Problem(
            "mesh",
            f"{named}, which needs {needed} devices",
            f"axes whose product is {num_devices}, the number of devices",
            f"change the mesh axes; for example mesh.fsdp={num_devices} and the others 1",
        )


def _precision_problems(have: Mapping[str, Any]) -> Iterator[Problem]:
    if "model" in have and have["model"].param_dtype == "bfloat16":
        yield Problem(
            "model.param_dtype",
            "'bfloat16'",
            "'float32': the weights that the optimizer updates are the only copy, and in bfloat16 an update "
            "below about a thousandth of a weight is rounded away (1 - 2.7e-4 is 1 again)",
            "set model.param_dtype=float32; model.dtype=bfloat16 computes in bfloat16 all the same",
        )


def _schedule_problems(have: Mapping[str, Any]) -> Iterator[Problem]:
    if "train" not in have:
        return
    train = have["train"]
    if "optimizer" in have:
        warmup, decay = have["optimizer"].warmup_steps, have["optimizer"].decay_steps
        if warmup + decay > train.steps:
            yield Problem(
                "optimizer.warmup_steps + optimizer.decay_steps",
                f"{warmup} + {decay} = {warmup + decay}",
                f"at most train.steps, {train.steps}",
                "shorten warmup or decay, or raise train.steps",
            )
        if train.mtp_weight_final is not None and not decay:
            yield Problem(
                "train.mtp_weight_final",
                f"{train.mtp_weight_final}, with optimizer.decay_steps 0",
                "a decay of the learning rate, with which it begins",
                "set optimizer.decay_steps, or leave train.mtp_weight_final out",
            )
    if "profile" in have and have["profile"].range and have["profile"].range[-1] > train.steps:
        yield Problem(
            "profile.steps",
            f"{have['profile'].steps!r}",
            f"steps up to {train.steps}, train.steps",
            "choose steps that the run has",
        )
    if "data" in have and train.eval_every and not have["data"].holdout:
        yield Problem(
            "train.eval_every",
            f"{train.eval_every}, with data.holdout 0",
            "documents held out for evaluation",
            "set data.holdout (0.01 keeps one document in a hundred), or train.eval_every=0",
        )


def _routing_problems(have: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    if "train" not in have:
        return
    block, key = have["train"].anticipatory_routing, "train.anticipatory_routing"
    if block.after_spike and have["train"].spike.factor is None:
        yield Problem(
            f"{key}.after_spike",
            f"{block.after_spike}, with train.spike.factor null",
            "rollbacks to come after",
            "set train.spike.factor, or train.anticipatory_routing.always=true to route so in all steps",
        )
    if (block.always or block.after_spike) and spec.route is None:
        yield Problem(
            key,
            f"steps that anticipate, with model {spec.name!r}, which cannot be told its experts",
            "a model whose ModelSpec has `route`",
            "leave train.anticipatory_routing out",
        )


def _data_problems(have: Mapping[str, Any]) -> Iterator[Problem]:
    if "data" not in have:
        return
    data = have["data"]
    # Remote paths (gs://...) are looked at when the run opens them: a recipe may be planned where they are not.
    if "://" not in data.path and not Path(data.path).expanduser().exists():
        yield Problem(
            "data.path", repr(data.path), "a file or folder that exists", "correct data.path"
        )
    if not _tokenizer_may_exist(data.tokenizer):
        yield Problem(
            "data.tokenizer",
            repr(data.tokenizer),
            "'bytes', or the path of a tokenizer.json",
            nearest(data.tokenizer, ["bytes"]) or "correct data.tokenizer",
        )
    if data.thinking_mode is not None and data.source != "chat":
        yield Problem(
            "data.thinking_mode",
            f"{data.thinking_mode!r}, with data.source {data.source!r}",
            "none: it says how conversations are encoded",
            "set data.source=chat, or remove data.thinking_mode",
        )
    accumulation = have["train"].accumulation if "train" in have else 1
    if data.batch_size % accumulation:
        yield Problem(
            "data.batch_size",
            f"{data.batch_size}, with train.accumulation {accumulation}",
            f"a multiple of {accumulation}",
            f"set data.batch_size={_next_multiple(data.batch_size, accumulation)}, "
            "or change train.accumulation",
        )
    if data.shards and data.batch_size % data.shards:
        yield Problem(
            "data.shards",
            f"{data.shards}, with data.batch_size {data.batch_size}",
            f"a number that divides {data.batch_size}: each stream gives as many rows of a batch",
            f"set data.shards={math.gcd(data.shards, data.batch_size)}, or change data.batch_size",
        )


def _tokenizer_may_exist(name: str) -> bool:
    """Whether a tokenizer is there, or is remote, so that only the run will tell."""
    return name == "bytes" or "://" in name or Path(name).expanduser().is_file()


def _next_multiple(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _length_problems(have: Mapping[str, Any], config: Any) -> Iterator[Problem]:
    """Sequence length against the architecture; fields that a model does not have do not bind."""
    if "data" not in have:
        return
    length = have["data"].sequence_length
    block = max(getattr(config, "compress_ratios", ()) or (0,))
    if length < block:
        yield Problem(
            "data.sequence_length",
            f"{length}",
            f"at least {block}, the model's longest compression block: none closes in shorter rows",
            f"set data.sequence_length={block} or more, or shorten model.config.compress_ratios",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        yield Problem(
            "data.sequence_length",
            f"{length}",
            f"at most {longest}, the model's max_position_embeddings",
            f"set data.sequence_length={longest} or less, or raise "
            "model.config.max_position_embeddings",
        )


def _tokenizer_problems(have: Mapping[str, Any], config: Any) -> Iterator[Problem]:
    vocab = getattr(config, "vocab_size", None)
    if "data" not in have or vocab is None:
        return
    name = have["data"].tokenizer
    if "://" in name or not _tokenizer_may_exist(name):
        return  # looked at when the run opens it, or told already
    from fathom.train.chat import ChatTokenizer
    from fathom.train.tokenizers import load_tokenizer

    load = ChatTokenizer if have["data"].source == "chat" else load_tokenizer
    try:
        size = load(name).vocab_size
    except ValueError as error:
        fix = "give the path of a tokenizer.json"
        yield Problem("data.tokenizer", f"{name!r} ({error})", "a readable tokenizer", fix)
        return
    if size > vocab:
        yield Problem(
            "data.tokenizer",
            f"{name!r} with {size} tokens",
            f"at most {vocab}, the model's vocab_size",
            f"set model.config.vocab_size={size} or more, or use another tokenizer",
        )


def _sharding_problems(have: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    """The preset against the model, the batch and the weights, for the mesh asked for."""
    if "mesh" not in have:
        return
    from fathom.mesh import mesh_axes

    mesh = have["mesh"]
    if mesh.preset not in spec.sharding_presets:
        known = sorted(spec.sharding_presets)
        yield Problem(
            "mesh.preset",
            repr(mesh.preset),
            f"a sharding preset of {spec.name}: {', '.join(known)}",
            nearest(mesh.preset, known) or "use one of those",
        )
        return
    rules = spec.preset(mesh.preset)

    def pieces(logical: str) -> int:
        return math.prod(mesh.shape[axis] for axis in mesh_axes(logical, rules))

    try:
        rows, columns = pieces("act_batch"), pieces("act_sequence")
    except (KeyError, ValueError) as error:
        text = f"a preset that cannot be used: {error}"
        yield Problem("mesh.preset", text, "known axes", f"correct the preset of {spec.name}")
        return
    yield from _batch_problems(have, rows, columns)
    yield from _weight_problems(have, spec, rules)


def _batch_problems(have: Mapping[str, Any], rows: int, columns: int) -> Iterator[Problem]:
    if "data" not in have:
        return
    data = have["data"]
    accumulation = have["train"].accumulation if "train" in have else 1
    unit = rows * accumulation
    if data.batch_size % unit and not data.batch_size % accumulation:
        yield Problem(
            "data.batch_size",
            f"{data.batch_size}",
            f"a multiple of {unit}: {rows} pieces of the batch in the mesh x train.accumulation "
            f"{accumulation}",
            f"set data.batch_size={_next_multiple(data.batch_size, unit)}, or change the mesh",
        )
    if data.sequence_length % columns:
        yield Problem(
            "data.sequence_length",
            f"{data.sequence_length}",
            f"a multiple of {columns}, the pieces of the sequence in the mesh",
            f"set data.sequence_length={_next_multiple(data.sequence_length, columns)}, "
            "or change mesh.context",
        )


def _weight_problems(have: Mapping[str, Any], spec: ModelSpec, rules: Any) -> Iterator[Problem]:
    """Weights that the mesh does not divide; the model is built as shapes only."""
    from flax import nnx

    from fathom.mesh import abstract_mesh, state_shardings

    train = have.get("train")
    try:
        mesh, options = abstract_mesh(have["mesh"].shape), have["model"].compute_options(train)
    except ValueError as error:
        yield Problem("model", str(error), "options that go together", "correct the one named")
        return
    try:
        module = nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), options))
    except ValueError as error:
        found = f"a model that cannot be built: {error}"
        yield Problem("model", found, "an architecture that builds", "correct model.config")
        return
    if train is not None:
        yield from _stage_problems(spec, module, train)
    count = 0
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        try:
            state_shardings({"/".join(map(str, path)): variable}, mesh, rules)
        except ValueError as error:
            count += 1
            if count <= MAX_WEIGHT_PROBLEMS:
                fix = "change that mesh axis, or that dimension in model.config"
                yield Problem("mesh", str(error), "mesh sizes that divide every weight", fix)
    if count > MAX_WEIGHT_PROBLEMS:
        more = count - MAX_WEIGHT_PROBLEMS
        yield Problem("mesh", f"{more} more weights like these", "none", "see the first ones")


def _stage_problems(spec: ModelSpec, module: Any, train: Any) -> Iterator[Problem]:
    """A stage that would train nothing."""
    from flax import nnx

    if train.stage == "indexer-warmup" and not train.trains_indexer:
        fix = "set train.indexer_weight above 0"
        yield Problem("train.indexer_weight", f"{train.indexer_weight}", "a weight for the only loss of the stage", fix)
        return
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    if all(spec.frozen(path, train.parameter_stage) for path in paths):
        yield Problem(
            "train.stage",
            f"{train.stage!r} with model {spec.name!r}, which then has no parameter to train",
            "a stage whose parameters the model has",
            "set train.stage=sparse, or give the model layers with an indexer",
        )


# --- The architecture ----------------------------------------------------------------------------


def model_spec(block: Any) -> tuple[ModelSpec | None, list[Problem]]:
    """The zoo's spec with a model block's sound config overrides applied, and the problems.

    The spec is None when the model is unknown.
    """
    from fathom import zoo

    try:
        spec = zoo.get(block.name)
    except ValueError as error:
        known = zoo.names()
        expected, fix = ", ".join(known), nearest(block.name, known) or "use one of those"
        if isinstance(error, zoo.BrokenEntryPointError):
            expected = "an entry point that gives a ModelSpec"
            fix = f"repair or uninstall {error.package}, or use another model"
        return None, [Problem("model.name", f"{block.name!r} ({error})", expected, fix)]
    problems: list[Problem] = []
    config = apply_config(spec.config, block.config, "model.config", problems)
    return spec.with_config(config), problems


def apply_config(
    config: Any, overrides: Mapping[str, Any], key: str, problems: list[Problem]
) -> Any:
    """`dataclasses.replace` with checked names and types; nested dataclasses take mappings.

    What is wrong is added to `problems` and left out of the result.
    """
    names = [field.name for field in dataclasses.fields(config) if field.init]
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        path = f"{key}.{name}"
        if name not in names:
            fix = nearest(str(name), names)
            fix = fix or f"remove it; the fields are {', '.join(names)}"
            expected = f"a field of {type(config).__name__}"
            problems.append(Problem(path, f"an unknown field (value {value!r})", expected, fix))
            continue
        before = len(problems)
        converted = _convert(value, hints[name], getattr(config, name), path, problems)
        if len(problems) == before:
            changes[name] = converted
    try:
        return dataclasses.replace(config, **changes)
    except (ValueError, TypeError) as error:
        if not problems:  # else it may only follow from what is told already
            problems.append(Problem(key, str(error), "a sound architecture", f"correct {key}"))
        return config


def _convert(value: Any, hint: Any, current: Any, key: str, problems: list[Problem]) -> Any:
    """A YAML value as the field's type: list to tuple, mapping to dataclass, 1 to 1.0."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
            if dataclasses.is_dataclass(current):
                return apply_config(current, value, key, problems)
            return _make(origin, value, key, problems)
        if origin is tuple and isinstance(value, list | tuple):
            item = (typing.get_args(kind) or (Any,))[0]
            parts = enumerate(value)
            return tuple(_convert(v, item, None, f"{key}.{i}", problems) for i, v in parts)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin in (bool, str) and isinstance(value, origin):
            return value
        plain = (int, float, bool, str, tuple, type(None))
        if origin not in plain and not dataclasses.is_dataclass(origin):
            return value  # a type that YAML knows nothing of: the dataclass judges
    expected = getattr(hint, "__name__", str(hint)) if not _is_union(hint) else str(hint)
    problems.append(Problem(key, repr(value), f"a value of type {expected}", f"correct {key}"))
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _make(kind: type, values: Mapping[str, Any], key: str, problems: list[Problem]) -> Any:
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        found = f"{dict(values)!r} ({error})"
        problems.append(Problem(key, found, f"fields {names}", f"correct {key}"))
        return None
