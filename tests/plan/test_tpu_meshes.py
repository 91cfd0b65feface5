"""Meshes over slices of TPUs that are not there."""

from __future__ import annotations

from jax.experimental import topologies

from fathom.mesh import make_mesh


def devices(name: str, slices: int = 1):
    extra = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices


def slices_of(mesh, axis: str) -> set[int]:
    """How many slices the devices lie on that differ along one axis alone."""
    number = mesh.axis_names.index(axis)
    lines = mesh.devices.swapaxes(0, number).reshape(mesh.devices.shape[number], -1).T
    return {len({device.slice_index for device in line}) for line in lines}


def test_the_outermost_axis_spans_the_slices():
    mesh = make_mesh({"data": 2, "fsdp": 4, "expert": 4}, devices("v6e:4x4", 2))
    assert mesh.shape["data"] == 2 and slices_of(mesh, "data") == {2}
    assert slices_of(mesh, "fsdp") == slices_of(mesh, "expert") == {1}
    mesh = make_mesh({"fsdp": 8, "expert": 4}, devices("v6e:4x4", 2))  # what divides the slices, wherever it is
    assert slices_of(mesh, "fsdp") == {2} and slices_of(mesh, "expert") == {1}
    mesh = make_mesh({"data": 2, "fsdp": 8, "expert": 2}, devices("v6e:4x4", 2))  # 8 x 2 on a torus of 4 x 4
    assert slices_of(mesh, "data") == {2} and slices_of(mesh, "fsdp") == {1}


def test_an_axis_may_take_a_part_of_one_of_the_torus():
    mesh = make_mesh({"fsdp": 4, "expert": 16}, devices("v6e:8x8"))
    assert mesh.devices.shape == (1, 4, 16, 1, 1)
    assert len({device.id for device in mesh.devices.flat}) == 64
