"""A run in stages: one recipe, cut into stretches of steps that change the data, the mesh and what trains.

    stages:
      - {name: short, until: 1000}
      - {name: warm-up, until: 1200, data: {sequence_length: 16384, batch_size: 64}, train: {stage: indexer-warmup}}
      - {name: long, until: 5000, data: {sequence_length: 65536, batch_size: 16}, mesh: {fsdp: 16, context: 4}}

Each stage has the recipe's own values but for those it names; nothing carries over from the stage before. Schedules
span `train.steps`, where the last stage must end: a stage's `optimizer.learning_rate` is another peak of the same
schedule. A recipe without stages may have a batch ramp, a short way to write
some:

    train: {steps: 5000, batch_ramp: [{until: 100, batch_size: 32}, {until: 300, batch_size: 64}]}

Overrides, errors and `--stage` count stages from 1, and take or tell their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fathom.recipe_blocks import CHAT_DEFAULTS, MESH_AXES
from fathom.recipe_checks import Problem, RecipeError, nearest, schema_problems, stage_label
from fathom.recipe_combinations import cross_problems
from fathom.recipe_files import merged

if TYPE_CHECKING:
    from fathom.recipe import Recipe
    from fathom.recipe_blocks import StageBlock

STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("attention", "query_chunk", "stretch", "balance", "remat", "selection", "recall_target",
              "mla_form"),
    "data": ("source", "path", "pattern", "exclude", "field", "thinking_mode", "sequence_length", "batch_size",
             "packing", "shuffle", "shuffle_rows", "shards", "seed", "max_bytes"),
    "optimizer": ("learning_rate",),
    "mesh": ("data", "fsdp", "expert", "tensor", "context", "preset"),
    "train": ("accumulation", "stage", "hold_moments", "mtp_weight", "mtp_weight_final", "balance_weight",
              "indexer_weight", "router_bias_speed", "eval_every"),
}  # fmt: skip
"""What a stage may change: nothing that the state's weights or the held-out documents depend on."""

TRAINED = {
    "dense": frozenset({"model"}),
    "indexer-warmup": frozenset({"indexer"}),
    "sparse": frozenset({"model", "indexer"}),
}
"""`train.stage` -> what it trains."""


def stage_blocks(recipe: Recipe) -> tuple[StageBlock, ...]:
    """The recipe's stages, those that its batch ramp stands for included; empty when it has neither.

    Raises:
      RecipeError: for a ramp beside stages, or one that is not rising or does not end before the run.
    """
    ramp, steps = recipe.train.batch_ramp, recipe.train.steps
    if not ramp:
        return recipe.stages
    problems, before = [], 0
    if recipe.stages:
        found, expected = f"a ramp of {len(ramp)} beside {len(recipe.stages)} stages", "one of the two"
        fix = "leave the ramp out and set data.batch_size in the stages"
        problems.append(Problem("train.batch_ramp", found, expected, fix))
    for number, part in enumerate(ramp, 1):
        if not before < part.until < steps:
            expected = f"a step after {before} and before {steps}, train.steps"
            fix = "put the ramp in order; data.batch_size is that of the steps after it"
            problems.append(Problem(f"train.batch_ramp.{number}.until", f"{part.until}", expected, fix))
        before = part.until
    if problems:
        raise RecipeError(problems, recipe.name)
    from fathom.recipe_blocks import StageBlock

    parts = [*((part.until, part.batch_size) for part in ramp), (steps, recipe.data.batch_size)]
    return tuple(
        StageBlock(name=f"batches of {size}", until=until, data={"batch_size": size}) for until, size in parts
    )


def stage_problems(stages: tuple[StageBlock, ...], steps: int | None) -> list[Problem]:
    """What is wrong with the stages by themselves; `steps` is `train.steps`, None where it could not be read."""
    problems, before, label = [], 0, ""
    for number, stage in enumerate(stages, 1):
        label = stage_label(number, stage.name)
        if stage.until <= before:
            found, expected = f"{stage.until}", f"a step after {before}, where the stage before ends"
            problems.append(Problem(f"{label}: until", found, expected, "put the stages in order, none of them empty"))
        before = stage.until
        for block, known in STAGE_KEYS.items():
            for name in getattr(stage, block):
                if name not in known:
                    expected = f"a key that a stage may change: {', '.join(known)}"
                    fix = nearest(str(name), known) or f"set {block}.{name} for the whole run, outside of stages"
                    found = "a key that a stage may not have"
                    problems.append(Problem(f"{label}: {block}.{name}", found, expected, fix))
    if stages and steps is not None and before != steps:
        found, expected = f"{before}", f"{steps}, train.steps"
        fix = f"set stages.{len(stages)}.until={steps}, or train.steps={before}"
        problems.append(Problem(f"{label}: until", found, expected, fix))
    return problems


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage, the whole recipe where it has none; each ends at its `train.stop_at`.

    A stage reads on behind the documents that the one before has read, where both have them in one order: the same
    data, `data.seed` and `data.shuffle` (`fathom.train.data.Loader.follow`).

    Raises:
      RecipeError: listing every problem of every stage, by its key.
    """
    stages = stage_blocks(recipe)
    if not stages:
        return [recipe]
    problems = stage_problems(stages, recipe.train.steps)
    if problems:
        raise RecipeError(problems, recipe.name)
    recipes, wrong, holds = [], [], _holding(recipe, stages)
    for number, stage in enumerate(stages, 1):
        values = _values(recipe, stage)
        if values["train"]["hold_moments"] is None and holds[number - 1]:
            values["train"]["hold_moments"] = True
        try:
            recipes.append(type(recipe).model_validate(values))
        except ValidationError as error:
            wrong += [(number, problem) for problem in schema_problems(error, type(recipe), values)]
    if wrong:
        raise RecipeError(_folded(recipe, stages, wrong), recipe.name)
    return recipes


def _holding(recipe: Recipe, stages: tuple[StageBlock, ...]) -> list[bool]:
    """Of each stage whether stages before it and after it train what it does not."""
    names = [stage.train.get("stage", recipe.train.stage) for stage in stages]
    trained = [TRAINED.get(name, frozenset()) for name in names if isinstance(name, str)]
    if len(trained) < len(names):  # none of these: told elsewhere
        return [False] * len(names)
    around = [(frozenset().union(*trained[:i]), frozenset().union(*trained[i + 1 :])) for i in range(len(names))]
    return [bool((before & after) - now) for (before, after), now in zip(around, trained, strict=True)]


def check_stages(recipe: Recipe, num_devices: int | None) -> list[Problem]:
    """Combinations that cannot work in one of the stages."""
    try:
        recipes = stage_recipes(recipe)
    except RecipeError as error:
        return error.problems
    found = [
        (number, problem)
        for number, stage in enumerate(recipes, 1)
        for problem in cross_problems(blocks_of(stage), num_devices)
    ]
    return _folded(recipe, stage_blocks(recipe), found)


def check_elsewhere(recipe: Recipe, num_devices: int | None) -> list[Problem]:
    """`check_stages` of a recipe that will run on other machines."""
    return found_elsewhere(check_stages(recipe, num_devices))


def found_elsewhere(problems: list[Problem]) -> list[Problem]:
    """Those that are problems on other machines too: whether the data is there is checked there."""
    return [problem for problem in problems if not problem.key.endswith(("data.path", "data.tokenizer"))]


def blocks_of(recipe: Recipe) -> dict[str, BaseModel]:
    """Block name -> block."""
    values = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, BaseModel)}


def _values(recipe: Recipe, stage: StageBlock) -> dict[str, Any]:
    """The stage's recipe as written values."""
    base = recipe.to_dict()
    over: dict[str, Mapping[str, Any]] = {block: dict(getattr(stage, block)) for block in STAGE_KEYS}
    if {"source", "path"} & set(over["data"]):
        for name in ("pattern", "exclude"):
            base["data"].pop(name)  # those of the recipe's own source
    source = over["data"].get("source", base["data"]["source"])
    if (source == "chat") != (base["data"]["source"] == "chat"):
        for name in CHAT_DEFAULTS:
            base["data"].pop(name)  # they mean something else, or nothing, there
    if any(axis in over["mesh"] for axis in MESH_AXES):
        # All are told anew: what is left of another mesh would not multiply to the devices.
        base["mesh"] = {name: base["mesh"][name] for name in ("preset", "simulated_devices", "topology")}
    stop = min(stage.until, recipe.train.stop_at or stage.until)
    return merged(base, {**over, "train": {**over["train"], "stop_at": stop}})


# --- What is told of stages -----------------------------------------------------------------------


def stage_number(stages: Sequence[StageBlock], asked: int | str) -> int | None:
    """Which stage a number, from 1, or a name is, from 1; None for none of them and for a name that several have."""
    if str(asked).isdecimal():
        return int(asked) if 1 <= int(asked) <= max(len(stages), 1) else None
    numbers = [number for number, stage in enumerate(stages, 1) if stage.name == asked]
    return numbers[0] if len(numbers) == 1 else None


def _folded(recipe: Recipe, stages: Sequence[StageBlock], found: Sequence[tuple[int, Problem]]) -> list[Problem]:
    """Problems of stages, each once with all the stages that have it; the whole recipe's as they are."""
    numbers: dict[Problem, list[int]] = {}
    for number, problem in found:
        numbers.setdefault(problem, []).append(number)
    problems = []
    for problem, those in numbers.items():
        whole = len(those) >= len(stages) and not any(_names(stage, problem.key) for stage in stages)
        if not whole:
            names = ", ".join(stages[number - 1].name or "without a name" for number in those)
            named = any(stages[number - 1].name for number in those)
            label = stage_label(_ranges(those), names if named else None)
            problem = problem._replace(key=f"{label}: {problem.key}", fix=_fix(recipe, stages, those, problem.fix))
        problems.append(problem)
    return problems


def _names(stage: StageBlock, key: str) -> bool:
    """Whether a key's value is one of the stage's own."""
    block, _, name = key.partition(".")
    own = getattr(stage, block) if block in STAGE_KEYS else {}
    if block == "mesh" and name in ("", "topology", *MESH_AXES):
        return any(axis in own for axis in MESH_AXES)
    return name in own


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as "1-4,6"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _fix(recipe: Recipe, stages: Sequence[StageBlock], numbers: Sequence[int], fix: str) -> str:
    """The fix with its overrides as those of the stages, where they have a value of their own there."""

    def in_stages(found: re.Match[str]) -> str:
        key, value = found.groups()
        own = [number for number in numbers if _names(stages[number - 1], key)]
        paths = [] if len(own) == len(numbers) else [key]
        for number in own:
            if not recipe.train.batch_ramp:
                paths.append(f"stages.{number}.{key}")
            elif number < len(stages):  # a ramp's parts have nothing but this
                paths.append(f"train.batch_ramp.{number}.batch_size")
            else:
                paths.append(key)
        return " ".join(f"{path}={value}" for path in paths)

    return re.sub(rf"\b((?:{'|'.join(STAGE_KEYS)})\.\w+)=([^\s,;]+)", in_stages, fix)
