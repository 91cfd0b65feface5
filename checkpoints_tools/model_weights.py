"""What a model says of its own weights, without allocating any: which are trained, and where a mesh cuts them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.mesh import abstract_mesh, partition_spec, state_shardings, variable_axes


class Weight(NamedTuple):
    """collection: "params" or "model_state"; shape; axes: its logical axes."""

    collection: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def model_weights(spec: zoo.ModelSpec) -> dict[tuple, Weight]:
    """Parameter path -> Weight, for every variable of the model."""
    state = _abstract_state(spec)
    trained, others = nnx.split_state(state, nnx.Param, ...)
    found = {}
    for collection, part in (("params", trained), ("model_state", others)):
        for path, variable in nnx.to_flat_state(part):
            shape = variable.get_value().shape
            found[path] = Weight(collection, shape, variable_axes(variable) or (None,) * len(shape))
    return found


def _abstract_state(spec: zoo.ModelSpec) -> Any:
    return nnx.split(nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0), ComputeOptions())))[1]


def check_table(path: Path, weights: Mapping[tuple, Weight], shapes: Mapping[tuple, tuple[int, ...]]) -> None:
    """Raises ValueError where the model and its Hub table name or shape parameters differently."""
    unlike = [
        f"{'/'.join(map(str, name))}: {weights[name].shape if name in weights else 'absent'} in the model, "
        f"{shapes.get(name, 'absent')} in its Hub table"
        for name in sorted(weights.keys() | shapes.keys(), key=str)
        if name not in weights or weights[name].shape != shapes.get(name)
    ]
    if unlike:
        raise ValueError(f"{path}: the model and its Hub table differ:\n  " + "\n  ".join(unlike))


class MeshCut:
    """Where a mesh of some processes cuts every parameter, and who then holds what.

    Args:
      spec: the model. weights: `model_weights(spec)`. mesh_shape: mesh axis -> size. preset: of the model's
        sharding presets. processes: that share the devices equally, in order.

    Raises:
      ValueError: for unknown axes, sizes that do not divide a weight, or devices that the processes cannot share.
    """

    def __init__(
        self,
        spec: zoo.ModelSpec,
        weights: Mapping[tuple, Weight],
        mesh_shape: Mapping[str, int],
        preset: str,
        processes: int,
    ):
        mesh = abstract_mesh(mesh_shape)
        self._sizes = dict(mesh.shape)
        self._processes = processes
        devices = math.prod(self._sizes.values())
        if devices % processes:
            raise ValueError(f"mesh of {devices} devices: {processes} processes cannot share them equally")
        rules = spec.preset(preset)
        state_shardings(_abstract_state(spec), mesh, rules)  # names the weight that does not divide
        self._weights = weights
        self._entries = {}
        for path, weight in weights.items():
            entries = partition_spec(weight.axes, rules, "/".join(map(str, path)))
            self._entries[path] = [
                (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries
            ]

    def shards(self, path: tuple) -> tuple[int, ...]:
        """Into how many pieces each dimension of a parameter is cut."""
        return tuple(math.prod(self._sizes[a] for a in axes) for axes in self._entries[path])

    def owners(self, path: tuple, start: tuple[int, ...]) -> tuple[int, ...]:
        """The processes that hold the element at `start` (its first dimensions, any of the others)."""
        coordinates: dict[str, int] = {}
        shape = self._weights[path].shape
        for position, size, axes in zip(start, shape, self._entries[path], strict=False):
            shard = position * math.prod(self._sizes[a] for a in axes) // size
            for axis in reversed(axes):
                shard, coordinates[axis] = divmod(shard, self._sizes[axis])
        choices = [
            [coordinates[axis]] if axis in coordinates else range(size) for axis, size in self._sizes.items()
        ]
        per_process = math.prod(self._sizes.values()) // self._processes
        found = set()
        for point in itertools.product(*choices):
            device = 0
            for coordinate, size in zip(point, self._sizes.values(), strict=True):
                device = device * size + coordinate
            found.add(device // per_process)
        return tuple(sorted(found))
