"""The bound of a step's time and what crosses between slices, against figures calculated by hand."""

from __future__ import annotations

import re

import pytest

from fathom.plan.collectives import Traffic, step_traffic
from fathom.plan.hlo_proto import _CLASSES
from fathom.plan.roofline import step_bound
from fathom.topology import parse_topology

SHAPE = {"data": 2, "fsdp": 32, "expert": 8}
ACROSS = {"data": 2, "fsdp": 2, "expert": 1}
FOUR_SLICES = parse_topology("4*v5p:4x4x8")
"""512 chips; each sends 600 GB/s within its slice and 6.25 GB/s out of it."""
GB = 10**9

ALL = "{1,2,3,4}x{0:127}"
FSDP = "{{100000,200000},{100001,200001},{300000,400000}}"
DATA = "{{100000,300000},{200000,400000}}"
EXCHANGED = "{{100000,100001,200000,200001},{300000,300001,400000,400001}}"
SHIFTED = "{" + ",".join(f"{{{s}000{n:02}->{s % 4 + 1}00000}}" for s in (1, 2, 3, 4) for n in range(8)) + "}"
"""Of each slice's 128 devices eight send to the next slice."""


def add(computation, opcode: str, gigabytes: int, **attributes: str):
    """An instruction that is given so many GB."""
    number = 2 * len(computation.instructions) + 1
    computation.instructions.add(id=number, opcode="parameter").shape.element_type = 11
    computation.instructions[-1].shape.dimensions.append(gigabytes * GB // 4)
    added = computation.instructions.add(id=number + 1, opcode=opcode, name=f"{opcode}.1", operand_ids=[number])
    for key, value in attributes.items():
        added.frontend_attributes.map.add(key=f"_xla_{key}", value=value)
    return added


def crossing(kind: str, target: str, gigabytes: int = 1, handler: str = "xla_megascale_runtime"):
    """A program of one exchange between slices."""
    module = _CLASSES["Module"](entry_computation_id=1)
    told = {"megascale_transfer_type": kind, "megascale_target": target, "host_transfer_handler_name": handler}
    add(module.computations.add(id=1), "send", gigabytes, **told)
    return module


@pytest.mark.parametrize(
    ("kind", "target", "found", "axes", "sent"),
    [
        ("ALL_GATHER", ALL, "all-gather", ("data", "fsdp"), 3),
        ("ALL_GATHER", FSDP, "all-gather", ("fsdp",), 1),
        ("ALL_REDUCE", DATA, "all-reduce", ("data",), 1),
        ("ALL_REDUCE", ALL, "all-reduce", ("data", "fsdp"), 2 * 3 / 4),
        ("REDUCE_SCATTER", ALL, "reduce-scatter", ("data", "fsdp"), 3 / 4),
        ("ALL_TO_ALL", EXCHANGED, "all-to-all", ("fsdp",), 1 / 2),  # of four devices two are in the other slice
        ("ONE_TO_ONE", SHIFTED, "collective-permute", ("data", "fsdp"), 8 / 128),
        ("ONE_TO_ONE", "{{100000->200000}}", "collective-permute", ("fsdp",), 1 / 512),
    ],
)
def test_what_leaves_a_slice(kind, target, found, axes, sent):
    (traffic,) = step_traffic(crossing(kind, target), SHAPE, across=ACROSS)
    assert traffic == Traffic(found, axes, 1.0, pytest.approx(sent * GB), between_slices=True)
    bound = step_bound(FOUR_SLICES, 0.0, None, [traffic], 0)
    assert (bound.seconds, bound.limited_by) == (pytest.approx(sent / 6.25), "network")


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("ALL_SORTS", ALL, "send.1: between slices found 'ALL_SORTS', expected one of ALL_GATHER"),
        ("ALL_GATHER", "", "send.1: the devices between slices are told as '', expected"),
        ("ALL_GATHER", "{1,2}x{0:3}x{0:3}", "told as '{1,2}x{0:3}x{0:3}'"),
        ("ALL_GATHER", "{{100000,200000}", "told as '{{100000,200000}'"),
    ],
)
def test_exchanges_in_other_forms_are_refused(kind, target, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        step_traffic(crossing(kind, target), SHAPE, across=ACROSS)


def test_what_is_sent_to_others_is_no_traffic():
    assert step_traffic(crossing("", "", handler="a callback"), SHAPE, across=ACROSS) == []


def test_a_gather_over_two_of_four_slices():
    """Of 1 GB of each of an axis' 32 devices, 16 in either slice: 1 GB to the other slice, 2 GB to 15 in its own."""
    module = crossing("ALL_GATHER", FSDP)
    inside = add(module.computations[0], "all-gather", 2)
    for expert in range(8):
        inside.device_list.replica_groups.add(replica_ids=range(expert, 128, 8))  # the program is that of one slice
    traffic = step_traffic(module, SHAPE, across=ACROSS)
    assert traffic == [
        Traffic("all-gather", ("fsdp",), 1.0, 30 * GB),
        Traffic("all-gather", ("fsdp",), 1.0, 1 * GB, between_slices=True),
    ]
    bound = step_bound(FOUR_SLICES, 0.0, None, traffic, 0)
    assert bound.network == bound.seconds == pytest.approx(max(30 / 600, 1 / 6.25))


@pytest.mark.parametrize(
    ("slice_", "flops", "state", "limited_by", "seconds"),
    [
        ("v5p:2x2x1", 4 * 459e12 * 3, 0, "compute", 3.0),
        ("v5p:2x2x1", 0.0, 2765 * GB, "memory", 2.0),  # read and written
        ("tpu7x:2x2x1", 0.0, 7380 * GB, "memory", 4.0),  # a chip's two devices share its memory
    ],
)
def test_the_other_bounds(slice_, flops, state, limited_by, seconds):
    bound = step_bound(parse_topology(slice_), flops, flops / 2, [], state)
    assert (bound.limited_by, bound.seconds) == (limited_by, pytest.approx(seconds))
    assert bound.mfu == pytest.approx(0.5 if flops else 0.0)
