"""Collectives of a program compiled for a TPU slice: bytes, runs and axes, with every loop as often as it runs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from fathom.mesh import make_mesh
from fathom.plan.collectives import Traffic, step_traffic
from fathom.plan.hlo_proto import parse_module

pytestmark = pytest.mark.xdist_group("collectives")
SHAPE = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
ROWS, WIDTH, TRIPS = 64, 256, 5
SHARD = ROWS * WIDTH * 4
"""Bytes of one device's part of the array that travels, float32."""


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(SHAPE, topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices)


SLICES_SHAPE = {"data": 2, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
ACROSS = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1, "context": 1}


@pytest.fixture(scope="module")
def slices():
    """Four slices of four chips."""
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=4)
    return make_mesh(SLICES_SHAPE, found.devices)


def traffic_of(mesh, exchange, **options):
    """The collectives of TRIPS runs of an exchange of a device's [ROWS, WIDTH]."""

    def body(x, _):
        # Nothing may be merged, moved out of the loop or taken together.
        return jnp.tanh(exchange(jnp.sin(x))), None

    spec = P(mesh.axis_names)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def step(x):
        return jax.lax.scan(body, x, None, length=TRIPS)[0]

    x = jax.ShapeDtypeStruct((mesh.size * ROWS, WIDTH), jnp.float32)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    compiled = jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(x).compile()
    module = compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
    return step_traffic(parse_module(module), dict(mesh.shape), **options)


def gather(axes, x):
    return jax.lax.all_gather(x, axes, tiled=True).reshape(-1, *x.shape).sum(0)


def scatter(axes, x):
    wide = jnp.concatenate([x] * jax.lax.axis_size(axes))
    return jax.lax.psum_scatter(wide * jnp.arange(wide.shape[0])[:, None], axes, tiled=True)


@pytest.mark.parametrize(
    ("exchange", "kind", "axes", "sent"),
    [
        (functools.partial(gather, "fsdp"), "all-gather", ("fsdp",), 3 * SHARD),
        (functools.partial(gather, ("fsdp", "expert")), "all-gather", ("fsdp", "expert"), 7 * SHARD),
        (lambda x: jax.lax.psum(x, "expert"), "all-reduce", ("expert",), 2 * SHARD / 2),
        (functools.partial(scatter, "fsdp"), "reduce-scatter", ("fsdp",), 3 * SHARD),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), "all-to-all", ("fsdp",), 3 * SHARD / 4),
        (
            lambda x: jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)]),
            "collective-permute",
            ("expert",),
            SHARD,
        ),
    ],
)
def test_bytes_axes_and_runs(mesh, exchange, kind, axes, sent):
    assert traffic_of(mesh, exchange) == [Traffic(kind, axes, TRIPS, TRIPS * sent)]


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        (functools.partial(gather, "data"), [("all-gather", ("data",), SHARD, True)]),
        (
            functools.partial(gather, "fsdp"),
            [("all-gather", ("fsdp",), 2 * SHARD, False), ("all-gather", ("fsdp",), SHARD, True)],
        ),
        (
            lambda x: jax.lax.psum(x, ("data", "fsdp")),
            [
                ("all-gather", ("fsdp",), SHARD / 2, False),
                ("all-reduce", ("data", "fsdp"), 2 * 3 / 4 * SHARD / 2, True),
                ("reduce-scatter", ("fsdp",), SHARD / 2, False),
            ],
        ),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), [("all-to-all", ("fsdp",), SHARD / 2, True)]),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3)]),
            [("collective-permute", ("fsdp",), SHARD, False), ("collective-permute", ("fsdp",), SHARD / 4, True)],
        ),
        (lambda x: jax.lax.psum(x, "expert"), [("all-reduce", ("expert",), SHARD, False)]),
    ],
)
def test_within_slices_and_between_them(slices, exchange, expected):
    found = traffic_of(slices, exchange, across=ACROSS)
    wanted = [Traffic(kind, axes, TRIPS, TRIPS * sent, between) for kind, axes, sent, between in expected]
    assert sorted(found, key=dataclasses.astuple) == sorted(wanted, key=dataclasses.astuple)


def test_a_loop_as_long_as_the_data_says_runs_as_often_as_it_is_told(mesh):
    def exchange(x):
        turns = jnp.int32(jnp.abs(x[0, 0]))
        return jax.lax.fori_loop(0, turns, lambda _, x: jax.lax.psum(x, "expert") * 0.5, x)

    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32)
    sharding = jax.sharding.NamedSharding(mesh, P(("fsdp", "expert")))
    spec = P(("fsdp", "expert"))
    step = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(x).compile()
    module = parse_module(compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto())
    for loops in (1.0, 7.0):
        assert step_traffic(module, SHAPE, loops) == [Traffic("all-reduce", ("expert",), loops, loops * SHARD)]


def test_groups_of_devices_in_either_form():
    from fathom.plan import collectives
    from fathom.plan.hlo_proto import _CLASSES

    listed = _CLASSES["Instruction"]()
    for ids in ([0, 2], [1, 3]):
        listed.device_list.replica_groups.add(replica_ids=ids)
    iota = _CLASSES["Instruction"]()
    iota.iota_groups.iota_reshape_dims.extend([2, 2])
    iota.iota_groups.iota_transpose_perm.extend([1, 0])
    iota.iota_groups.num_replica_groups, iota.iota_groups.num_devices_per_group = 2, 2
    assert collectives._groups(listed, 4) == collectives._groups(iota, 4) == [[0, 2], [1, 3]]
    assert collectives._groups(_CLASSES["Instruction"](), 4) == [[0, 1, 2, 3]]
    meshed = _CLASSES["Instruction"]()
    for size in (2, 4):
        meshed.mesh_groups.mesh.axes.add(name="axis", size=size)
    meshed.mesh_groups.axes.add(mesh_axis_index=0)
    assert collectives._groups(meshed, 8) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    part = meshed.mesh_groups.axes.add(mesh_axis_index=1).sub_axis  # the outer half of four devices
    part.pre_size, part.size = 1, 2
    assert collectives._groups(meshed, 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    data = _CLASSES["Instruction"](name="all-gather.1").SerializeToString() + b"\xf2\x05\x01x"  # field 94
    with pytest.raises(ValueError, match=r"all-gather.1.*fields \[94\]"):
        collectives._groups(_CLASSES["Instruction"].FromString(data), 8)
    assert collectives._axes([[0, 2]], SHAPE) == ("fsdp",)
    assert collectives._axes(np.arange(8).reshape(1, 8), SHAPE) == ("fsdp", "expert")
