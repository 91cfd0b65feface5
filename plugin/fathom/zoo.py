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
      update_state: (non-Param state, aux, bias_speed) -> new state, applied after each optimizer step; None
        leaves the state alone.
      frozen: (path of a Param, stage) -> True when the optimizer must not touch it in that stage.
      config_from_hf, config_to_hf, hub_tensors: the Hub's config and tensor names, None where the model has none.
    """

    name: str
    config: Any
    build: Callable[[Any, nnx.Rngs, Any], nnx.Module]
    loss: Callable[..., tuple[jax.Array, dict[str, Any]]]
    sharding_presets: Mapping[str, Rules]
    num_params: Callable[[Any], ParamCount]
    flops_per_token: Callable[[Any, int], float]
    update_state: Callable[[Any, dict[str, Any], float], Any] | None = None
    frozen: Callable[[tuple, str], bool] = lambda path, stage: False
    config_from_hf: Callable[[Mapping[str, Any]], Any] | None = None
    config_to_hf: Callable[[Any], dict[str, Any]] | None = None
    hub_tensors: Callable[[Any], list] | None = None

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


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Names of all models that can be had, without importing any."""
    return sorted(set(_registered) | set(_entry_points()))


def get(name: str) -> ModelSpec:
    """The ModelSpec of that name.

    Raises:
      ValueError: for an unknown name (with the nearest known ones), or when an entry point does not give a
        ModelSpec.
    """
    if name in _registered:
        return _registered[name]
    entry = _entry_points().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, names(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}{hint}")
    spec = entry.load()
    spec = spec if isinstance(spec, ModelSpec) else spec()
    if not isinstance(spec, ModelSpec):
        raise ValueError(
            f"entry point {name!r} ({entry.value}) gave a {type(spec).__name__}, expected a ModelSpec"
        )
    _registered[name] = spec
    return spec
