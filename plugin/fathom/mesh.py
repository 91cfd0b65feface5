"""Device meshes, logical-axis rules, and the one helper that constrains an activation.

A weight or an activation names its dimensions with logical axes ("embed", "heads", "act_batch", ...). A
*sharding preset* is a plain mapping from logical axis to mesh axis (a name, a tuple of names, or None). Nothing
else in Fathom names a mesh axis. Meshes use Auto axis types: XLA propagates what is not constrained.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "expert", "tensor", "context")
"""Mesh axes, outermost first. `data` replicates weights, `fsdp` shards them, `expert` holds different
experts, `tensor` splits heads and channels, `context` splits the sequence."""

LEVEL_FLAG = "xla_backend_optimization_level"
"""XLA's flag and compiler option for how much LLVM optimises."""

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

_active_rules: contextvars.ContextVar[Rules | None] = contextvars.ContextVar(
    "fathom_rules", default=None
)
_slow_axes: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("fathom_slow_axes", default=())


def _mesh_sizes(shape: Mapping[str, int]) -> tuple[int, ...]:
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; the mesh axes are {list(AXES)}")
    sizes = tuple(int(shape.get(axis, 1)) for axis in AXES)
    if min(sizes) < 1:
        raise ValueError(f"mesh axis sizes must be at least 1, found {dict(shape)}")
    return sizes


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all five axes (missing ones have size 1).

    Args:
      shape: mesh axis -> size; the product must equal the number of devices.
      devices: the devices to use, all of `jax.devices()` unless given.

    Raises:
      ValueError: for an unknown axis, or when the product does not match the device count.
    """
    sizes = _mesh_sizes(shape)
    devices = list(jax.devices() if devices is None else devices)
    if math.prod(sizes) != len(devices):
        named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"the mesh ({named}) needs {math.prod(sizes)} devices, found {len(devices)}; "
            "change the mesh sizes so that their product is the number of devices"
        )
    auto = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=auto)
    slices = _slice_count(devices)
    if slices == 1:
        try:
            return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)
        except NotImplementedError as error:  # no whole axes of the torus fit
            _tell_of_split_axes(sizes, error)
            laid_out = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(laid_out, AXES, axis_types=auto)
    across = across_slices(sizes, slices)
    inside = tuple(size // n for size, n in zip(sizes, across, strict=True))
    try:
        laid_out = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    except NotImplementedError as error:  # the same within each slice
        _tell_of_split_axes(inside, error)
        laid_out = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=auto)


def _tell_of_split_axes(sizes: tuple[int, ...], error: NotImplementedError) -> None:
    """JAX raises it where no axes of the torus together are as long as one of the mesh: 4 x 16 on a torus of 8 x 8.

    The mesh is then laid out with parts of them. It computes the same and may communicate more slowly, so it is told;
    a mesh that cannot be laid out at all raises again there.
    """
    named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
    logger.warning(
        "the mesh (%s) takes parts of the slice's own axes, over which it may communicate more slowly; sizes that are "
        "products of those axes avoid it (%s)", named, str(error).partition(".")[0],
    )  # fmt: skip


def _slice_count(devices: Sequence[Any]) -> int:
    # The devices of a single slice that is not attached have no slice_index.
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def across_slices(sizes: Sequence[int], slices: int) -> tuple[int, ...]:
    """How many slices each axis spans: the outermost axes first, for what crosses between slices is slow."""
    across, left = [], slices
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    return tuple(across)


def simulate_devices(count: int) -> None:
    """Splits this process's CPU into `count` simulated devices; call it before anything uses a jax backend.

    Raises:
      ValueError: when jax already runs with other devices, which a process cannot change.
    """
    _set_cpu_flags()
    with contextlib.suppress(RuntimeError):  # a backend is in use: whether it has the devices is checked below
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    found = jax.local_devices()
    if len(found) != count or found[0].platform != "cpu":
        raise ValueError(
            f"{count} simulated CPU devices asked for, and jax already runs with {len(found)} "
            f"{found[0].platform} devices; start a new process, or ask before anything uses jax"
        )


def _set_cpu_flags() -> None:
    """Adds to XLA_FLAGS what makes small models on a CPU compile and run faster (BENCHMARKS.md, "CPU step"), where it
    is not set already. They stay: XLA reads them when first used, and jax's compilation cache has them in its keys."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("--"):
        return  # the name of a file of flags
    wanted = {LEVEL_FLAG: "1"}
    # jaxlib 0.10 hands reductions on the CPU to a library that takes twice as long as XLA's own loops do. Other
    # versions may not know the flag, and XLA aborts on unknown ones.
    if metadata.version("jaxlib").startswith("0.10."):
        wanted["xla_cpu_experimental_ynn_fusion_type"] = ""
        # In XLA's default order, for cores that this many devices have not, a step holds a third to a half more.
        wanted["xla_cpu_enable_concurrency_optimized_scheduler"] = "false"
    missing = [f"--{flag}={value}" for flag, value in wanted.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, for tracing and lowering a program at any size."""
    return AbstractMesh(_mesh_sizes(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def sharding_scope(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """Makes `mesh` the current mesh and `rules` the active logical-axis rules.

    Everything that traces a model under a mesh runs inside this scope. Without it models are plain
    single-device mathematics and `constrain` does nothing.

    Raises:
      ValueError: when a rule names an axis that the mesh does not have.
    """
    for logical, axes in rules.items():
        missing = [axis for axis in _as_tuple(axes) if axis not in mesh.axis_names]
        if missing:
            raise ValueError(
                f"sharding rule {logical!r} -> {axes!r} names mesh axes {missing}, "
                f"the mesh has {list(mesh.axis_names)}"
            )
    slow = ()
    if isinstance(mesh, Mesh):
        sizes = tuple(mesh.shape.values())
        across = across_slices(sizes, _slice_count(list(mesh.devices.flat)))
        slow = tuple(name for name, slices in zip(mesh.axis_names, across, strict=True) if slices > 1)
    tokens = _active_rules.set(rules), _slow_axes.set(slow)
    set_mesh = (
        jax.sharding.use_abstract_mesh(mesh)
        if isinstance(mesh, AbstractMesh)
        else jax.set_mesh(mesh)
    )
    try:
        with set_mesh:
            yield
    finally:
        _active_rules.reset(tokens[0])
        _slow_axes.reset(tokens[1])


def active_rules() -> Rules | None:
    """The rules of the innermost `sharding_scope`, or None outside of one."""
    return _active_rules.get()


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_axes(logical: str | None, rules: Rules | None = None) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over under the active (or given) rules.

    Raises:
      ValueError: when the rules do not mention the logical axis.
    """
    rules = active_rules() if rules is None else rules
    if logical is None or rules is None:
        return ()
    if logical not in rules:
        raise ValueError(
            f"logical axis {logical!r} is not in the sharding preset; "
            f"it knows {sorted(rules)}; add {logical!r} to it (None keeps the dimension whole)"
        )
    return _as_tuple(rules[logical])


def axis_size(logical: str | None) -> int:
    """Into how many pieces the active rules cut a dimension with this logical axis."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in mesh_axes(logical))


def split_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes larger than 1 that the active rules split a logical axis over."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return tuple(axis for axis in mesh_axes(logical) if sizes.get(axis, 1) > 1)


def replica_axes(logical_axes: Sequence[str | None]) -> tuple[str, ...]:
    """The mesh axes larger than 1 along which an array with these logical axes lies as a whole on every device, and
    whose devices are of one slice, so that they may share work on it and exchange its results."""
    sizes = jax.sharding.get_abstract_mesh().shape
    taken = {*_slow_axes.get(), *(axis for logical in logical_axes for axis in mesh_axes(logical))}
    return tuple(axis for axis, size in sizes.items() if size > 1 and axis not in taken)


def check_divisible(*checks: tuple[str, int, str]) -> None:
    """Checks (name, size, logical axis): the active rules cut a dimension of that size into equal pieces.

    Raises:
      ValueError: for the first that they do not.
    """
    for name, size, logical in checks:
        if size % axis_size(logical):
            raise ValueError(
                f"{name} {size} is not divisible by {axis_size(logical)}, the size of the mesh "
                f"axes {mesh_axes(logical)} that {logical!r} maps to; change the mesh or the {name}"
            )


def vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Inside a shard_map: the array typed as different along mesh axes on which it is equal.

    The transpose sums: the gradient is that of all devices along the axes.
    """
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def partition_spec(
    logical_axes: Sequence[str | None], rules: Rules | None = None, name: str = "array"
) -> PartitionSpec:
    """Maps logical axes to a PartitionSpec under the active (or given) rules.

    Raises:
      ValueError: when two dimensions land on the same mesh axis, naming the array, or a logical axis is unknown.
    """
    try:
        per_dim = [mesh_axes(axis, rules) for axis in logical_axes]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    flat = [axis for axes in per_dim for axis in axes]
    twice = sorted({axis for axis in flat if flat.count(axis) > 1})
    if twice:
        raise ValueError(
            f"{name} with logical axes {tuple(logical_axes)} would be split twice over mesh axes "
            f"{twice}; map one of its logical axes to None in the sharding preset"
        )
    entries = [axes if len(axes) > 1 else (axes[0] if axes else None) for axes in per_dim]
    return PartitionSpec(*entries)


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Constrains an activation's sharding under the active rules; the identity outside of a scope.

    Works under Auto meshes (a constraint) and under Explicit ones (a reshard).
    """
    if active_rules() is None:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if len(logical_axes) != x.ndim:
        raise ValueError(
            f"constrain: {len(logical_axes)} logical axes {tuple(logical_axes)} for an array of "
            f"shape {x.shape}"
        )
    spec = partition_spec(logical_axes, name="activation")
    if mesh.are_all_axes_auto:
        return jax.lax.with_sharding_constraint(x, spec)
    return jax.reshard(x, spec)


def variable_axes(variable: nnx.Variable) -> tuple[str | None, ...] | None:
    """The logical axes that a weight declared where it was made, or None."""
    return variable.get_metadata().get("out_sharding")


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """A NamedSharding for every variable of an (abstract) NNX state, in a tree of the same structure.

    Raises:
      ValueError: naming the weight, when a dimension is not divisible by the mesh axes it maps to, when two
        dimensions map to one mesh axis, or when the preset does not know a logical axis.
    """
    sizes = dict(mesh.shape)

    def one(path, variable):
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        value = variable.get_value()
        axes = variable_axes(variable)
        if axes is None:
            return variable.replace(NamedSharding(mesh, PartitionSpec()))
        spec = partition_spec(axes, rules, name)
        for dim, entry in zip(value.shape, spec, strict=True):
            pieces = math.prod(sizes[axis] for axis in _as_tuple(entry))
            if dim % pieces:
                raise ValueError(
                    f"weight {name} of shape {value.shape}: dimension {dim} is not divisible by "
                    f"{pieces} (mesh axes {entry}); choose mesh sizes that divide it or map its "
                    f"logical axis to None in the sharding preset (axes {axes})"
                )
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        one, state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def batch_sharding(mesh: Mesh | AbstractMesh, rules: Rules) -> NamedSharding:
    """How [batch, sequence] integer inputs are laid out."""
    return NamedSharding(mesh, partition_spec(("act_batch", "act_sequence"), rules, "batch"))
