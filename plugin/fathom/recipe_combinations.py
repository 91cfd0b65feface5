"""Combinations of a recipe's values that cannot work together, found before anything is compiled.

`cross_problems` is the list of them; each check is a function of the blocks it needs. Nothing here imports jax until a
check needs the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.recipe_checks import Problem, model_spec, nearest
from fathom.topology import parse_topology

if TYPE_CHECKING:
    from fathom.zoo import ModelSpec

MAX_WEIGHT_PROBLEMS = 8
"""Weights named when a mesh does not divide them; one wrong axis size usually hits dozens."""


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
            f"take such a slice, or {_axes_for(mesh.shape, slice_.devices, slice_.slices)}",
        )
        if num_devices == slice_.devices:  # told
            return
    if simulated is not None and simulated != needed:
        yield Problem(
            "mesh.simulated_devices",
            f"{simulated}",
            f"{needed}, the product of the mesh axes ({named})",
            f"set mesh.simulated_devices={needed}, or change the axes",
        )
    elif num_devices is not None and needed != num_devices:
        fix = f"change the mesh axes: {_axes_for(mesh.shape, num_devices, 1)}"
        if slice_ is not None and slice_.devices == needed:
            launch = f"launch it on {slice_}, `fathom launch RECIPE --on jobset`, `xpk` or `tpu-vm`"
            # What a slice is needed for has no place on a few devices, however they are cut.
            fix = launch if num_devices * 4 < needed else f"{launch}, or {fix}"
        yield Problem(
            "mesh",
            f"{named}, which needs {needed} devices",
            f"axes whose product is {num_devices}, the number of devices",
            fix,
        )


def _axes_for(shape: Mapping[str, int], devices: int, slices: int) -> str:
    """Overrides that scale a mesh to other devices: experts, context and tensor as far as they divide, then fsdp."""
    left, axes = devices, {}
    for axis in ("tensor", "context", "expert"):
        axes[axis] = math.gcd(left, shape[axis])
        left //= axes[axis]
    data = math.lcm(shape["data"], slices)  # so that nothing else crosses between slices
    axes["data"] = next(size for size in (data, slices, math.gcd(left, data)) if left % size == 0)
    axes["fsdp"] = left // axes["data"]
    changes = [f"mesh.{axis}={axes[axis]}" for axis in shape if axes[axis] != shape[axis]]
    return f"begin with {' '.join(changes)}"


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
