"""As much of JSON Schema as `jobset.schema.json` uses; "$ref" names one of its definitions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
KNOWN = {"about", "type", "properties", "required", "additionalProperties", "items", "enum", "const", "pattern",
         "minimum", "maxLength", "minItems", "definitions", "$ref"}  # fmt: skip


def problems(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value, one text each, with its path; nothing when it fits."""
    return list(_problems(value, schema, "top", schema))


def _problems(value: Any, schema: Mapping[str, Any], where: str, root: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        schema = root["definitions"][schema["$ref"]]
    if unknown := schema.keys() - KNOWN:
        raise NotImplementedError(f"{where}: {sorted(unknown)}")
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool))):
        yield f"{where}: found {value!r}, expected {kind}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where}: found {value!r}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: found {value!r}, expected one of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: found {value!r}, expected {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: found {value}, expected at least {schema['minimum']}"
    if len(value) > schema["maxLength"] if "maxLength" in schema else False:
        yield f"{where}: found {len(value)} characters, expected at most {schema['maxLength']}"
    if isinstance(value, dict) and "properties" in schema:
        yield from (f"{where}: no {name}" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            if name in schema["properties"]:
                yield from _problems(item, schema["properties"][name], f"{where}.{name}", root)
            elif schema.get("additionalProperties") is False:
                yield f"{where}: unknown {name}"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{where}: found {len(value)} items, expected at least {schema['minItems']}"
        for i, item in enumerate(value):
            yield from _problems(item, schema.get("items", {}), f"{where}[{i}]", root)
