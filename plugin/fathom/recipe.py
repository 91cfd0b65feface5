"""Recipes: what a run is, as one short YAML, checked before anything is compiled.

Values come from, in rising order of precedence: the defaults below, the recipe that this one
`extends` (one level), the recipe itself, and `a.b.c=value` overrides.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sysconfig
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fathom.layers.options import (
    ATTENTION_IMPLEMENTATIONS,
    MLA_FORMS,
    REMAT_POLICIES,
    SELECTIONS,
    STAGES,
    ComputeOptions,
)
from fathom.recipe_checks import (
    Problem,
    RecipeError,
    cross_problems,
    flatten,
    model_spec,
    schema_problems,
)
from fathom.recipe_files import apply_overrides, find_recipe, read_with_base
from fathom.recipe_stages import check_stages, stage_recipes

if TYPE_CHECKING:
    from fathom.zoo import ModelSpec

STDLIB = "stdlib:"
"""A data path that stands for the running Python's standard library: real text on any machine."""

STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idlelib")
"""Folders there that are not the standard library, or that not every installation has."""

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")  # fathom.mesh.AXES, without its jax

PATTERNS = {
    "text": "**/*.txt",
    "jsonl": "**/*.jsonl",
    "parquet": "**/*.parquet",
    "array_record": "**/*.array_record",
}


class Block(BaseModel):
    """A part of a recipe: frozen; unknown keys, values of another type, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Lists for tuples, and numbers in text: PyYAML reads 3e-4 as text, and templates quote."""
        hint = cls.model_fields[info.field_name].annotation
        kinds = [typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))]
        if isinstance(value, list) and tuple in kinds:
            return tuple(value)
        for kind in (int, float):
            if isinstance(value, str) and kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(value)
        return value


class ModelBlock(Block):
    """Which model, at which size, and how it computes (see `fathom.layers.options.ComputeOptions`).

    `config` overrides fields of the model's architecture dataclass. `init` is a Fathom checkpoint (a converted one,
    or a run's) that a new run takes its weights from; a run that resumes does not look at it.
    """

    name: str
    init: str | None = Field(None, min_length=1)
    config: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal[ATTENTION_IMPLEMENTATIONS] = "auto"
    query_chunk: int | None = Field(None, ge=1)
    stretch: int | None = Field(None, ge=1)
    balance: bool = False
    remat: Literal[REMAT_POLICIES] = "none"
    simulate_quant: bool = False
    selection: Literal[SELECTIONS] = "exact"
    recall_target: float = Field(0.95, gt=0, le=1)
    mla_form: Literal[MLA_FORMS] = "auto"

    def compute_options(self, train: TrainBlock | None = None) -> ComputeOptions:
        """The ComputeOptions that the model is built with, in the stage of a train block."""
        ours = ("name", "init", "config")
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ours}
        if train is None:
            return ComputeOptions(**values)
        return ComputeOptions(**values, stage=train.stage, indexer_loss=train.trains_indexer)


class DataBlock(Block):
    """Where text comes from and how it becomes rows.

    The key `path` is a file or a folder ("stdlib:" is the running Python's standard library); in a
    folder, files that match the glob `pattern` are read, except below folders named in `exclude`.
    `location` is that key as written, which is what recipes and checkpoints store; the property `path`
    is where it lies on this machine.
    `batch_size` counts rows per optimizer step over all processes and microbatches. `holdout` is
    the fraction of documents kept for evaluation. `max_bytes` stops reading after that much text.
    `shuffle` orders documents anew each epoch; `shuffle_rows` also mixes that many packed rows at a time, so that the
    pieces of one long document do not fill whole batches.
    """

    source: Literal["text", "jsonl", "parquet", "array_record"] = "text"
    location: str = Field(alias="path", min_length=1)
    pattern: str = Field(min_length=1)
    exclude: tuple[str, ...] = ()
    field: str = "text"
    tokenizer: str = "bytes"
    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    packing: Literal["concat_split", "first_fit", "best_fit", "none"] = "concat_split"
    shuffle: bool = True
    shuffle_rows: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    holdout: float = Field(0.0, ge=0, lt=1)
    max_bytes: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_source(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        stdlib = values.get("path") == STDLIB
        if values.get("pattern") is None:
            by_source = PATTERNS.get(str(values.get("source", "text")), "*")
            values["pattern"] = "**/*.py" if stdlib else by_source
        if stdlib and values.get("exclude") is None:
            values["exclude"] = STDLIB_EXCLUDE
        return values

    @property
    def path(self) -> str:
        """The file or folder to read on this machine."""
        return sysconfig.get_paths()["stdlib"] if self.location == STDLIB else self.location


class OptimizerBlock(Block):
    """AdamW, or Muon for matrices and AdamW for the rest: warmup, a constant stretch, then `decay_steps` down to
    `final_ratio` of the peak.

    `momentum_dtype` is the storage of first moments; second moments are float32. `muon_dtype` is that of Muon's
    products, `muon_rms` the root mean square of its updates at a learning rate of 1. b1, b2 and eps are AdamW's.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)
    final_ratio: float = Field(0.1, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-20, gt=0)
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_rms: float = Field(0.18, gt=0)
    muon_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)


class MeshBlock(Block):
    """Sizes of the mesh axes (`fathom.mesh.AXES`), and the preset that maps a model onto them.

    `simulated_devices` runs on the CPU split into that many devices.
    """

    data: int = Field(1, ge=1)
    fsdp: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    preset: str = "default"
    simulated_devices: int | None = Field(None, ge=1)

    @property
    def shape(self) -> dict[str, int]:
        """Mesh axis -> size, for `fathom.mesh.make_mesh`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


class TrainBlock(Block):
    """How long, in which stage, with which loss weights. After `max_runtime` seconds, or after step `stop_at`, the
    run saves and stops; schedules still span `steps`.

    Stages: "dense" attends to everything visible and leaves the indexer alone; "indexer-warmup" does too, and trains
    the indexer and nothing else; "sparse" attends to what the indexer selects and trains all, the indexer by its own
    loss (`indexer_weight`; 0 leaves it as it is). What a stage does not train has no place in the optimizer.
    """

    steps: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    accumulation: int = Field(1, ge=1)
    stage: Literal[STAGES] = "sparse"
    mtp_weight: float = Field(0.3, ge=0)
    balance_weight: float = Field(1e-4, ge=0)
    indexer_weight: float = Field(1e-2, ge=0)
    router_bias_speed: float = Field(1e-3, ge=0)
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)
    skip_nonfinite: int = Field(0, ge=0)
    max_runtime: float | None = Field(None, gt=0)
    stop_at: int | None = Field(None, ge=1)

    @property
    def trains_indexer(self) -> bool:
        """Whether the indexer has a loss of its own."""
        return self.stage != "dense" and self.indexer_weight > 0

    @property
    def parameter_stage(self) -> str:
        """The stage that says which parameters train: without a loss for the indexer those of "dense"."""
        return self.stage if self.trains_indexer else "dense"


class CheckpointBlock(Block):
    """Where and how often to save. `directory` is <run folder>/checkpoints unless given."""

    directory: str | None = None
    every: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    async_save: bool = True
    resume: bool = True


class WandbBlock(Block):
    """A Weights & Biases run; only imported when a recipe has this block."""

    project: str
    entity: str | None = None
    name: str | None = None


class MetricsBlock(Block):
    """The run folder (runs/<recipe name> unless given) and where else metrics go."""

    directory: str = Field(min_length=1)
    tensorboard: bool = True
    wandb: WandbBlock | None = None


class StageBlock(Block):
    """A stretch of the run, up to and with step `until`, with values of its own for keys of four blocks
    (`fathom.recipe_stages.STAGE_KEYS`). A stage that names mesh axes names them all; others are 1."""

    name: str | None = None
    until: int = Field(ge=1)
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    mesh: dict[str, Any] = {}
    train: dict[str, Any] = {}


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
        """Splits the CPU into `mesh.simulated_devices` devices; nothing where the recipe has none.

        Raises:
          RecipeError: when jax already runs with other devices, which a process cannot change.
        """
        wanted = self.mesh.simulated_devices
        if wanted is None:
            return
        from fathom.mesh import simulate_devices

        try:
            simulate_devices(wanted)
        except ValueError as error:
            problem = Problem(
                "mesh.simulated_devices",
                str(error),
                "a fresh process, or one with as many CPU devices",
                "start a new process, or call this before anything uses jax",
            )
            raise RecipeError([problem], self.name) from None

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


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      source: a YAML file, or the name of one in recipes/.
      overrides: "a.b.c=value" strings; the value is read as YAML.

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
        problems += cross_problems(_readable_blocks(values), None)
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
    "optimizer.",
    "mesh.",
    "train.steps",
    "train.accumulation",
    "train.mtp_weight",
    "train.balance_weight",
    "train.router_bias_speed",
    "train.log_every",
    "train.eval_every",
    "train.skip_nonfinite",
    "train.max_runtime",
    "train.stop_at",
    "checkpoint.",
    "metrics.",
    "stages",
)
"""Keys (those that end in a dot: whole blocks) that a resumed run may change: none of them alters
the shape of the state, the order of the data or what the weights mean. Data may lie elsewhere: that it
is the same is what its fingerprint in the checkpoint says. Of stages, the one that the checkpoint lies in is compared,
its own values in place."""

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
