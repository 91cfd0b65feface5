"""The model zoo: `ModelSpec`, everything the loop and the tools know of a model, and its registry.

Third parties add models by the entry-point group `fathom.models`: each entry point is a ModelSpec or a function
without arguments that returns one, and its name is the name a recipe uses.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the registry is read before jax is needed, e.g. by `fathom --help`
    import jax
    from flax import nnx

    from fathom.mesh import Rules

ENTRY_POINT_GROUP = "fathom.models"


class ParamCount(NamedTuple):
    """Numbers of parameters: all, and those one token passes through."""

    total: int
    active: int


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What the products of a train step depend on beside the config.

    Attributes:
      sequence_length: of a row, one document. stage: the recipe's `train.stage`.
      passes: how often the products of blocks run forward (`fathom.layers.remat.forward_passes`).
      tokens: of a row on one device. heads_cut: into how many pieces the mesh cuts the attention's heads.
      stretch: the recipe's `model.stretch`. dtype: of activations.
    """

    sequence_length: int
    stage: str
    passes: float
    tokens: int
    heads_cut: int = 1
    stretch: int | None = None
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything the train loop and the checkpoint tools know of a model.

    Attributes:
      name: the name a recipe uses.
      config: the architecture, a frozen dataclass of plain numbers.
      build: (config, rngs, ComputeOptions) -> nnx.Module. Weights declare logical axes; runs inside jit.
      loss: (module, batch, LossWeights, LossCounts) -> (float32 scalar, aux). Sums divided by the counts of the
        whole batch, so that losses and gradients of microbatches add up. `aux` maps names beginning with
        "loss/" to float32 scalars that add up likewise; other entries are arrays that add up.
      sharding_presets: name -> rules from logical axis to mesh axes; "default" must be there.
      num_params: config -> ParamCount.
      flops_per_token: (config, sequence length) -> training flops (forward and backward) per token.
      step_flops: (config, StepShape) -> {purpose: flops per token} of a train step, recomputation and all, which
        `fathom plan` compares with the program; None where nobody has written it down.
      update_state: (non-Param state, aux, bias_speed) -> new state, applied after each optimizer step; None
        leaves the state alone.
      route: (module, batch) -> {name: int32 [B, ...]}, the experts that learned routers choose, as `loss` takes it
        under "routing" of a batch; None for a model that cannot be told its experts.
      frozen: (path of a Param, stage) -> True when the optimizer must not touch it in that stage.
      config_from_hf, config_to_hf, hub_tensors: the Hub's config and tensor table, None where the model has none.
      hub_model_type: `model_type` of the Hub configs that `config_from_hf` reads.
      hub_pieces: (name in any spelling, shape) -> [(native name, index of the piece)].
      hub_copies: config -> {name of a tensor that repeats another in released files: that other's native name}.
    """

    name: str
    config: Any
    build: Callable[[Any, nnx.Rngs, Any], nnx.Module]
    loss: Callable[..., tuple[jax.Array, dict[str, Any]]]
    sharding_presets: Mapping[str, Rules]
    num_params: Callable[[Any], ParamCount]
    flops_per_token: Callable[[Any, int], float]
    step_flops: Callable[[Any, StepShape], Mapping[str, float]] | None = None
    update_state: Callable[[Any, dict[str, Any], float], Any] | None = None
    route: Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]] | None = None
    frozen: Callable[[tuple, str], bool] = lambda path, stage: False
    config_from_hf: Callable[[Mapping[str, Any]], Any] | None = None
    config_to_hf: Callable[[Any], dict[str, Any]] | None = None
    hub_tensors: Callable[[Any], list] | None = None
    hub_model_type: str | None = None
    hub_pieces: Callable[[str, tuple[int, ...]], list] | None = None
    hub_copies: Callable[[Any], dict[str, str]] = lambda config: {}

    def __post_init__(self) -> None:
        if "default" not in self.sharding_presets:
            raise ValueError(
                f"model {self.name!r}: sharding_presets has {sorted(self.sharding_presets)}, "
                "expected a preset named 'default' among them"
            )

    def preset(self, name: str) -> Rules:
        """The sharding preset of that name; ValueError lists the ones there are."""
        if name not in self.sharding_presets:
            raise ValueError(
                f"model {self.name!r} has no sharding preset {name!r}; it has "
                f"{sorted(self.sharding_presets)}"
            )
        return self.sharding_presets[name]

    def with_config(self, config: Any) -> ModelSpec:
        """The same model at another size."""
        return dataclasses.replace(self, config=config)


_registered: dict[str, ModelSpec] = {}


def register(spec: ModelSpec) -> ModelSpec:
    """Adds a spec for this process; raises ValueError when another model has the name."""
    if spec.name in _registered and _registered[spec.name] != spec:
        raise ValueError(f"a different model named {spec.name!r} is already registered")
    _registered[spec.name] = spec
    return spec


class BrokenEntryPointError(ValueError):
    """An installed model that cannot be had.

    Attributes:
      package: the distribution that declares the entry point.
    """

    def __init__(self, entry: metadata.EntryPoint, what: str):
        self.package = entry.dist.name if entry.dist is not None else "an unknown package"
        super().__init__(
            f"model {entry.name!r}: entry point {entry.value!r} of package {self.package} {what}; "
            f"repair, upgrade or uninstall {self.package}"
        )


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Names of all models that can be had, without importing any."""
    return sorted(set(_registered) | set(_entry_points()))


def get(name: str) -> ModelSpec:
    """The ModelSpec of that name.

    Raises:
      ValueError: for an unknown name, with the nearest known ones.
      BrokenEntryPointError: (a ValueError) when the entry point of that name fails, or does not give a ModelSpec.
    """
    if name in _registered:
        return _registered[name]
    entry = _entry_points().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, names(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}{hint}")
    try:
        spec = entry.load()
        spec = spec if isinstance(spec, ModelSpec) else spec()
    except Exception as error:  # it is somebody else's code: anything may come out of it
        raise BrokenEntryPointError(entry, f"failed with {type(error).__name__}: {error}") from error
    if not isinstance(spec, ModelSpec):
        raise BrokenEntryPointError(entry, f"gave a {type(spec).__name__}, expected a ModelSpec")
    _registered[name] = spec
    return spec


def all_specs() -> tuple[dict[str, ModelSpec], list[str]]:
    """Name -> ModelSpec of every model that can be had, sorted by name, and why the others cannot, one text each."""
    specs, broken = {}, []
    for name in names():
        try:
            specs[name] = get(name)
        except BrokenEntryPointError as error:
            broken.append(str(error))
    return specs, broken
