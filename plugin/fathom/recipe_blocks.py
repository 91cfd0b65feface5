"""The blocks of a recipe, with their defaults: one class per top-level key of the YAML."""

from __future__ import annotations

import contextlib
import re
import sysconfig
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fathom.layers.options import (
    ATTENTION_IMPLEMENTATIONS,
    MLA_FORMS,
    REMAT_POLICIES,
    SELECTIONS,
    STAGES,
    ComputeOptions,
)
from fathom.topology import parse_topology

STDLIB = "stdlib:"
"""A data path that stands for the running Python's standard library: real text on any machine."""

STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idlelib")
"""Folders there that are not the standard library, or that not every installation has."""

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")  # fathom.mesh.AXES, without its jax

PATTERNS = {
    "text": "**/*.txt",
    "jsonl": "**/*.jsonl",
    "chat": "**/*.jsonl",
    "parquet": "**/*.parquet",
    "array_record": "**/*.array_record",
}

CHAT_DEFAULTS = {"field": "messages", "thinking_mode": "chat"}
"""Values of the data block that are others, or only have a meaning, where its source is "chat"."""


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
    `shards` is the number of document streams that a batch's rows come from, which decides the order of the data;
    unless given, as many as there are processes with rows of their own at the first start (`fathom.train.streams`).
    `shuffle` orders documents anew each epoch; `shuffle_rows` also mixes that many packed rows at a time, so that the
    pieces of one long document do not fill whole batches. At the end of a stage what is left of them is not trained on,
    unless the next one's rows are the same.

    Of the source "array_record" nothing is done or kept for each document: held out is an even grid of each file's
    records, and the files' indices alone are read at the start (`fathom.train.array_records`). An index in memory takes
    8 bytes for each group of records: write very many documents with a `group_size` above 1.

    The source "chat" is JSON lines whose `field` ("messages" unless given) is a conversation, encoded as the models'
    releases do; only the assistant's answers are trained. `thinking_mode` is for it alone (`fathom.train.chat`):
    "chat" leaves reasoning out, "thinking" expects it with every last answer, "mixed" takes it where there is some.
    """

    source: Literal["text", "jsonl", "chat", "parquet", "array_record"] = "text"
    location: str = Field(alias="path", min_length=1)
    pattern: str = Field(min_length=1)
    exclude: tuple[str, ...] = ()
    field: str = "text"
    thinking_mode: Literal["chat", "thinking", "mixed"] | None = None
    tokenizer: str = "bytes"
    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    packing: Literal["concat_split", "first_fit", "best_fit", "none"] = "concat_split"
    shuffle: bool = True
    shuffle_rows: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    shards: int | None = Field(None, ge=1)
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
        if values.get("source") == "chat":
            for name, value in CHAT_DEFAULTS.items():
                if values.get(name) is None:
                    values[name] = value
        return values

    @property
    def path(self) -> str:
        """The file or folder to read on this machine."""
        return sysconfig.get_paths()["stdlib"] if self.location == STDLIB else self.location

    @property
    def batch_names(self) -> tuple[str, ...]:
        """The arrays of a batch, each [B, S] int32: conversations also say which targets count."""
        return ("tokens", "segment_ids", "positions", *(("loss_mask",) if self.source == "chat" else ()))


class OptimizerBlock(Block):
    """AdamW, or Muon for matrices and AdamW for the rest: warmup, a constant stretch, then `decay_steps` down to
    `final_ratio` of the peak.

    `momentum_dtype` is the storage of first moments; second moments are float32. `muon_dtype` is that of Muon's
    products, `muon_rms` the root mean square of its updates at a learning rate of 1. b1, b2 and eps are AdamW's.
    Norms, biases, scales and sinks decay with `decay_all` only, as the V4 report has it.
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
    decay_all: bool = False
    clip_norm: float | None = Field(1.0, gt=0)


class MeshBlock(Block):
    """Sizes of the mesh axes (`fathom.mesh.AXES`), and the preset that maps a model onto them.

    `simulated_devices` runs on the CPU split into that many devices. `topology` is the TPU slice that the recipe is
    for ("v5p:8x8x8", "2*v6e:16x16"): what `fathom plan` compiles for and `fathom launch` asks for.
    """

    data: int = Field(1, ge=1)
    fsdp: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    preset: str = "default"
    simulated_devices: int | None = Field(None, ge=1)
    topology: str | None = None

    @field_validator("topology")
    @classmethod
    def _names_a_slice(cls, value: str | None) -> str | None:
        if value is not None:
            parse_topology(value)
        return value

    @property
    def shape(self) -> dict[str, int]:
        """Mesh axis -> size, for `fathom.mesh.make_mesh`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


class SpikeBlock(Block):
    """What to do about a spike of the loss; `factor` None, the default, does nothing.

    A step's loss is a spike when it lies above the median of the last `window` losses by more than `factor` times their
    spread (1.4826 times the median absolute deviation, the standard deviation of a normal distribution, and no less
    than a thousandth of the median); so is one that is not finite, beyond what `train.skip_nonfinite` lets pass. It
    takes `window` losses of a stage until one can be a spike. The run then goes
    back to the newest checkpoint, and on from there with the data after the spike: what was read between the two, the
    spike's own batch included, is skipped, and the metrics of these steps are those of the new ones. The checkpoint is
    from before the spike, but may be from after its cause: after `max_rollbacks` the next spike ends the run. All this
    is stored in checkpoints, so that a run that resumes decides as one that was not interrupted.
    """

    factor: float | None = Field(None, gt=0)
    window: int = Field(128, ge=4)
    max_rollbacks: int = Field(3, ge=1)


class AnticipationBlock(Block):
    """Anticipatory routing: experts chosen by the parameters of `delay` steps before (`fathom.train.anticipation`).

    In all steps with `always`; with `after_spike` from each rollback that a spike caused to so many steps after the
    spike's own, in none without one (the paper's way). It costs a forward pass for each of these steps, and the program
    of the step is compiled for both ways of routing. An interrupted run is then no longer bit for bit one that was not.
    """

    delay: int = Field(1, ge=1)
    always: bool = False
    after_spike: int = Field(0, ge=0)


class RampBlock(Block):
    """Rows per step, up to and with step `until`."""

    until: int = Field(ge=1)
    batch_size: int = Field(ge=1)


class TrainBlock(Block):
    """How long, in which stage, with which loss weights. After `max_runtime` seconds, or after step `stop_at`, the
    run saves and stops; schedules still span `steps`.

    `mtp_weight_final` is the MTP loss's weight from the first update of the learning rate's decay on (the paper: 0.3,
    then 0.1); None keeps `mtp_weight`.

    `batch_ramp` lists steps and the `data.batch_size` up to them; after the last one it is the recipe's own. Each is a
    stage with no other values (`fathom.recipe_stages`), which reads on behind the documents of the one before.

    `watchdog` seconds without a completed step end the process with code 4 after all threads' stack traces were
    written; all but steps has an hour more (`fathom.train.watchdog`). `compilation_cache` is a folder for compiled
    programs, which the next start reads instead of compiling (`fathom.train.compilation_cache`). `grace`: seconds a
    preempted host is given to end its step and save; what `fathom launch` asks of the cluster.

    Stages: "dense" attends to everything visible and leaves the indexer alone; "indexer-warmup" does too, and trains
    the indexer and nothing else; "sparse" attends to what the indexer selects and trains all, the indexer by its own
    loss (`indexer_weight`; 0 leaves it as it is). What a stage does not train has no place in the optimizer, but for
    its moments where the stage holds them: `hold_moments`, which `fathom.recipe_stages` sets for a stage between two
    that train what it does not, unless told.
    """

    steps: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    accumulation: int = Field(1, ge=1)
    stage: Literal[STAGES] = "sparse"
    hold_moments: bool | None = None
    mtp_weight: float = Field(0.3, ge=0)
    mtp_weight_final: float | None = Field(None, ge=0)
    balance_weight: float = Field(1e-4, ge=0)
    indexer_weight: float = Field(1e-2, ge=0)
    router_bias_speed: float = Field(1e-3, ge=0)
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)
    skip_nonfinite: int = Field(0, ge=0)
    max_runtime: float | None = Field(None, gt=0)
    stop_at: int | None = Field(None, ge=1)
    batch_ramp: tuple[RampBlock, ...] = ()
    spike: SpikeBlock = SpikeBlock()
    anticipatory_routing: AnticipationBlock = AnticipationBlock()
    watchdog: float | None = Field(None, gt=0)
    grace: int = Field(600, ge=1)
    compilation_cache: str | None = Field(None, min_length=1)

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


LOCAL_FOLDER = "a folder of a mounted file system; for checkpoints alone checkpoint.directory may be a bucket's"


class MetricsBlock(Block):
    """The run folder (runs/<recipe name> unless given) and where else metrics go."""

    directory: str = Field(min_length=1)
    tensorboard: bool = True
    wandb: WandbBlock | None = None

    @field_validator("directory")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(LOCAL_FOLDER)
        return value


STEP_RANGE = "a range of steps like 10-12, or one step; the first is 1"


class ProfileBlock(Block):
    """Steps to trace with jax's profiler into <run folder>/profile: "10-12", both included, or one step
    (`fathom.train.profiler`)."""

    steps: str | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("steps")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        if value is not None:
            found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", value)
            if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
                raise ValueError(STEP_RANGE)
        return value

    @property
    def range(self) -> range:
        """The steps as numbers, empty for none."""
        if self.steps is None:
            return range(0)
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)


class StageBlock(Block):
    """A stretch of the run, up to and with step `until`, with values of its own for keys of five blocks
    (`fathom.recipe_stages.STAGE_KEYS`). A stage that names mesh axes names them all; others are 1."""

    name: str | None = None
    until: int = Field(ge=1)
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    mesh: dict[str, Any] = {}
    train: dict[str, Any] = {}
