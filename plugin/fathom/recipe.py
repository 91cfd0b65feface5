"""Recipes: what a run is, as one short YAML, checked before anything is compiled.

Values come from, in rising order of precedence: the defaults below, the recipe that this one
`extends` (which may extend another), the recipe itself, and `a.b.c=value` overrides, in which a stage
is named by its number, from 1, or by its name: `stages.2.data.batch_size=8`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from fathom.recipe_blocks import (
    Block,
    CheckpointBlock,
    DataBlock,
    MeshBlock,
    MetricsBlock,
    ModelBlock,
    OptimizerBlock,
    ProfileBlock,
    StageBlock,
    TrainBlock,
)
from fathom.recipe_checks import (
    Problem,
    RecipeError,
    flatten,
    model_spec,
    schema_problems,
)
from fathom.recipe_combinations import cross_problems
from fathom.recipe_files import apply_overrides, find_recipe, read_with_base
from fathom.recipe_stages import check_stages, found_elsewhere, stage_recipes

if TYPE_CHECKING:
    from fathom.layers.options import ComputeOptions
    from fathom.zoo import ModelSpec

class Recipe(Block):
    """Everything that decides a run, made by `load_recipe` or `Recipe.model_validate(dict)`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelBlock
    data: DataBlock
    optimizer: OptimizerBlock
    mesh: MeshBlock = MeshBlock()
    train: TrainBlock
    checkpoint: CheckpointBlock = CheckpointBlock()
    metrics: MetricsBlock
    profile: ProfileBlock = ProfileBlock()
    stages: tuple[StageBlock, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_run_folder(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        metrics = values.get("metrics") or {}
        if isinstance(metrics, Mapping) and metrics.get("directory") is None:
            metrics = {**metrics, "directory": f"runs/{values.get('name')}"}
        return {**values, "metrics": metrics}

    @property
    def run_dir(self) -> Path:
        """The run folder: metrics, loss.png, and checkpoints unless they have their own place."""
        return Path(self.metrics.directory)

    @property
    def checkpoint_dir(self) -> str:
        """Where checkpoints go: `checkpoint.directory`, or <run folder>/checkpoints."""
        return self.checkpoint.directory or str(self.run_dir / "checkpoints")

    def model_spec(self) -> ModelSpec:
        """The zoo's spec with `model.config` applied; RecipeError when that is impossible."""
        spec, problems = model_spec(self.model)
        if problems:
            raise RecipeError(problems, self.name)
        return spec

    def compute_options(self) -> ComputeOptions:
        """The ComputeOptions that the model is built with, `train.stage` included."""
        return self.model.compute_options(self.train)

    def check(self, num_devices: int) -> None:
        """Refuses impossible combinations before any compilation, in every stage.

        Args:
          num_devices: devices of all processes, `jax.device_count()`.

        Raises:
          RecipeError: listing every problem found.
        """
        problems = check_stages(self, num_devices)
        if problems:
            raise RecipeError(problems, self.name)

    def use_simulated_devices(self) -> None:
        """Splits the CPU into this process's share of `mesh.simulated_devices`; nothing where the recipe has none.

        Raises:
          RecipeError: when the processes cannot share them evenly, or jax already runs with other devices, which a
            process cannot change.
        """
        wanted = self.mesh.simulated_devices
        if wanted is None:
            return
        from fathom.distributed import process_count
        from fathom.mesh import simulate_devices

        expected = "a fresh process, or one with as many CPU devices"
        fix = "start a new process, or call this before anything uses jax"
        try:
            count = process_count()
            if wanted % count:
                expected, fix = f"a multiple of {count}, the number of processes", "change one of the two"
                raise ValueError(f"{wanted} devices for {count} processes")
            simulate_devices(wanted // count)
        except ValueError as error:
            raise RecipeError([Problem("mesh.simulated_devices", str(error), expected, fix)], self.name) from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON-able values; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` reads it back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """A hash of the resolved recipe: 16 hex digits, the same on every machine and Python."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _readable_blocks(values: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks that can be read once their wrong keys are left out, None for the others.

    Cross checks then run on what there is, so that all problems are told at once. A mesh is wholly right or not
    looked at: with a default in place of a wrong axis its product means nothing.
    """
    blocks: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Block)):
            continue
        found = values.get(name) or {}
        try:
            blocks[name] = kind.model_validate(found)
        except ValidationError as error:
            wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
            readable = wrong and kind is not MeshBlock
            kept = {k: v for k, v in found.items() if k not in wrong} if readable else None
            try:
                blocks[name] = kind.model_validate(kept)
            except ValidationError:
                blocks[name] = None
    return blocks


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Recipe:
    """Reads a recipe.

    Args:
      source: a YAML file, or the name of one in recipes/.
      overrides: "a.b.c=value" strings; the value is read as YAML. Stages and parts of a batch ramp are counted from 1,
        "stages.2.until=5"; a stage's name will do too.
      elsewhere: it is for other machines: whether its data is on this one is no problem.

    Raises:
      RecipeError: listing every problem at once, combinations that cannot work included as far as
        the blocks can be read. A recipe that loads may still be impossible on the devices there
        are: see `Recipe.check`.
    """
    path = find_recipe(str(source), None, "recipe")
    problems: list[Problem] = []
    values = apply_overrides(read_with_base(path), overrides, problems)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += schema_problems(error, Recipe, values)
        combinations = cross_problems(_readable_blocks(values), None)
        problems += found_elsewhere(combinations) if elsewhere else combinations
    if not problems:
        stage_recipes(recipe)
    if problems:
        raise RecipeError(problems, str(path))
    return recipe


# --- Resuming ------------------------------------------------------------------------------------

SAFE_TO_CHANGE = (
    "name",
    "model.init",
    "model.attention",
    "model.query_chunk",
    "model.stretch",
    "model.balance",
    "model.remat",
    "model.mla_form",
    "data.path",
    "data.shards",
    "optimizer.",
    "mesh.",
    "train.steps",
    "train.accumulation",
    "train.mtp_weight",
    "train.mtp_weight_final",
    "train.balance_weight",
    "train.router_bias_speed",
    "train.log_every",
    "train.eval_every",
    "train.skip_nonfinite",
    "train.max_runtime",
    "train.stop_at",
    "train.batch_ramp",
    "train.spike.",
    "train.anticipatory_routing.",
    "train.watchdog",
    "train.grace",
    "train.compilation_cache",
    "checkpoint.",
    "metrics.",
    "profile.",
    "stages",
)
"""Keys (those that end in a dot: whole blocks) that a resumed run may change: none of them alters
the shape of the state, the order of the data or what the weights mean. Data may lie elsewhere: that it
is the same is what its fingerprint in the checkpoint says; of how many streams, the loop compares. Of stages, and those
of a batch ramp, the one that the checkpoint lies in is compared, its own values in place."""

NEVER_SAFE = ("optimizer.name",)
"""Exceptions inside the safe blocks: another optimizer has another state."""


def _is_safe(key: str) -> bool:
    if key in NEVER_SAFE:
        return False
    return any(key == s or (s.endswith(".") and key.startswith(s)) for s in SAFE_TO_CHANGE)


def compare_for_resume(old: Mapping[str, Any], new: Recipe) -> list[str]:
    """Keys that differ from the checkpoint's recipe and are not safe to change.

    Args:
      old: the resolved recipe stored in the checkpoint (`Recipe.to_dict`). Keys that it does not
        have, because a later version added them, count as their defaults.
      new: the recipe to resume with.

    Returns:
      One text per key, sorted: "model.config.index_top_k: 16 in the checkpoint, 8 in the recipe".
    """
    new_values = flatten(new.to_dict())
    old = json.loads(json.dumps(dict(old)))
    if isinstance(old.get("train"), dict):
        old["train"].setdefault("indexer_weight", 0.0)  # before there was such a loss, the indexer did not train
    try:
        old_values = flatten(Recipe.model_validate(dict(old)).to_dict())
    except ValidationError:
        old_values = flatten(old)
    weights = [values.get("train.indexer_weight", 0) for values in (old_values, new_values)]
    if all(weights):  # any weight above 0 trains the same parameters
        new_values["train.indexer_weight"] = old_values["train.indexer_weight"]
    return list(_differences(old_values, new_values))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    absent = object()

    def text(value: Any) -> str:
        return "absent" if value is absent else repr(value)

    for key in sorted(set(old) | set(new)):
        before, after = old.get(key, absent), new.get(key, absent)
        if before != after and not _is_safe(key):
            yield f"{key}: {text(before)} in the checkpoint, {text(after)} in the recipe"
