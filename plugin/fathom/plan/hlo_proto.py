"""The compiler's program as data: the fields read here of XLA's HloProto.

A serialised HloProto keeps its field numbers from version to version, as the text of a program does not. Only fields
that are used are declared; the others are skipped when a message is read.
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_INTEGER, _BYTES, _TEXT, _FLAG = 3, 12, 9, 8  # types of descriptor.proto

# message -> field name -> (number, type or message, repeated)
_MESSAGES: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "Shape": {
        "element_type": (2, _INTEGER, False),
        "dimensions": (3, _INTEGER, True),
        "tuple_shapes": (4, "Shape", True),
    },
    "OpMetadata": {"op_name": (2, _TEXT, False)},
    "ReplicaGroup": {"replica_ids": (1, _INTEGER, True)},
    "SourceTarget": {"source": (1, _INTEGER, False), "target": (2, _INTEGER, False)},
    "IotaGroups": {
        "num_replica_groups": (1, _INTEGER, False),
        "num_devices_per_group": (2, _INTEGER, False),
        "iota_reshape_dims": (3, _INTEGER, True),
        "iota_transpose_perm": (4, _INTEGER, True),
    },
    "DeviceList": {
        "replica_groups": (1, "ReplicaGroup", True),
        "iota": (2, "IotaGroups", False),
    },
    "MeshAxis": {"name": (1, _TEXT, False), "size": (2, _INTEGER, False)},
    "DeviceMesh": {"axes": (1, "MeshAxis", True), "device_ids": (2, _INTEGER, True)},
    "SubAxis": {"pre_size": (1, _INTEGER, False), "size": (2, _INTEGER, False)},
    "AxisRef": {"mesh_axis_index": (1, _INTEGER, False), "sub_axis": (2, "SubAxis", False)},
    "MeshGroups": {"mesh": (1, "DeviceMesh", False), "axes": (2, "AxisRef", True)},
    "Literal": {"s32s": (4, _INTEGER, True), "s64s": (5, _INTEGER, True), "u32s": (6, _INTEGER, True)},
    "Attribute": {"key": (1, _TEXT, False), "value": (2, _TEXT, False)},
    "Attributes": {"map": (1, "Attribute", True)},
    "Instruction": {
        "name": (1, _TEXT, False),
        "opcode": (2, _TEXT, False),
        "shape": (3, "Shape", False),
        "metadata": (7, "OpMetadata", False),
        "literal": (8, "Literal", False),
        "id": (35, _INTEGER, False),
        "operand_ids": (36, _INTEGER, True),
        "called_computation_ids": (38, _INTEGER, True),
        "backend_config": (43, _BYTES, False),
        "replica_groups": (49, "ReplicaGroup", True),
        "source_target_pairs": (52, "SourceTarget", True),
        "comparison_direction": (63, _TEXT, False),
        "frontend_attributes": (68, "Attributes", False),
        "device_list": (87, "DeviceList", False),
        "iota_groups": (92, "IotaGroups", False),
        "mesh_groups": (93, "MeshGroups", False),
    },
    "Computation": {
        "name": (1, _TEXT, False),
        "instructions": (2, "Instruction", True),
        "id": (5, _INTEGER, False),
    },
    "Module": {
        "name": (1, _TEXT, False),
        "computations": (3, "Computation", True),
        "entry_computation_id": (6, _INTEGER, False),
    },
    "Location": {
        "instruction_name": (2, _TEXT, False),
        "shape_index": (3, _INTEGER, True),
        "instruction_id": (4, _INTEGER, False),
    },
    "LogicalBuffer": {
        "id": (1, _INTEGER, False),
        "size": (2, _INTEGER, False),
        "defined_at": (3, "Location", False),
    },
    "Allocation": {
        "index": (1, _INTEGER, False),
        "size": (2, _INTEGER, False),
        "is_thread_local": (3, _FLAG, False),
        "is_entry_computation_parameter": (5, _FLAG, False),
        "maybe_live_out": (7, _FLAG, False),
        "color": (8, _INTEGER, False),
    },
    "Event": {
        "kind": (1, _INTEGER, False),
        "buffer_id": (2, _INTEGER, False),
        "instruction_name": (4, _TEXT, False),
        "share_with_canonical_id": (5, _INTEGER, False),
    },
    "Trace": {
        "events": (1, "Event", True),
        "buffer_allocation_index": (3, _INTEGER, False),
    },
    "Buffers": {
        "logical_buffers": (1, "LogicalBuffer", True),
        "allocations": (3, "Allocation", True),
        "traces": (4, "Trace", True),
    },
    "Hlo": {"module": (1, "Module", False), "buffers": (3, "Buffers", False)},
}  # fmt: skip


def _message_classes() -> dict[str, type]:
    file = descriptor_pb2.FileDescriptorProto(name="fathom_hlo.proto", package="fathom_hlo", syntax="proto3")
    for message, fields in _MESSAGES.items():
        kind = file.message_type.add(name=message)
        for name, (number, field_type, repeated) in fields.items():
            field = kind.field.add(name=name, number=number, label=3 if repeated else 1)
            if isinstance(field_type, str):
                field.type, field.type_name = 11, f".fathom_hlo.{field_type}"
            else:
                field.type = field_type
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"fathom_hlo.{name}")) for name in _MESSAGES
    }


_CLASSES = _message_classes()


def parse_hlo(data: bytes):
    """An HloProto: `.module`, and `.buffers` where the compiler has assigned them."""
    return _CLASSES["Hlo"].FromString(data)


def parse_module(data: bytes):
    """An HloModuleProto, as an executable of JAX serialises its own."""
    return _CLASSES["Module"].FromString(data)


NEWEST_FIELD = 93
"""Of an instruction, when this was written: a higher one may say what the ones here used to."""

ELEMENT_BITS = {
    1: 8, 2: 8, 3: 16, 4: 32, 5: 64, 6: 8, 7: 16, 8: 32, 9: 64, 10: 16, 11: 32, 12: 64, 15: 64, 16: 16, 18: 128,
    19: 8, 20: 8, 21: 4, 22: 4, 23: 8, 24: 8, 25: 8, 28: 8, 29: 8, 32: 4, 33: 8,
}  # fmt: skip
"""Bits of an element of each of XLA's primitive types; tokens and tuples (absent) hold none."""


def shape_bytes(shape) -> int:
    """Bytes of an array, or of all arrays in a tuple, without the padding of a layout."""
    if shape.tuple_shapes:
        return sum(shape_bytes(part) for part in shape.tuple_shapes)
    count = 1
    for size in shape.dimensions:
        count *= size
    return -(-count * ELEMENT_BITS.get(shape.element_type, 0) // 8)
