"""Records of JSON that hold a document, and what can be wrong with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any


class DataError(ValueError):
    """Data that cannot be trained on: the text names the file and what to do."""


RecordReader = Callable[[bytes, str, str], bytes]
"""(record, field, where) -> the document of a JSON record; DataError, beginning with `where`, when it has none."""


def json_text(record: bytes, field: str, where: str) -> bytes:
    """The text under `field` of a JSON object, as UTF-8.

    Raises:
      DataError: beginning with `where`, when it is not JSON, not an object, lacks the field, or the
        field is not text.
    """
    text = json_object(record, field, where)[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is a {json_kind(text)}, expected text; set data.field")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} is not Unicode text: {error.reason}") from None


def json_object(record: bytes, field: str, where: str) -> dict[str, Any]:
    """A JSON object that has `field`.

    Raises:
      DataError: beginning with `where`, when it is not JSON, not an object, or lacks the field.
    """
    try:
        value = json.loads(record.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is a JSON {json_kind(value)}, expected an object with field {field!r}")
    if field not in value:
        keys = ", ".join(map(repr, itertools.islice(value, 8))) or "none"
        raise DataError(f"{where} has no field {field!r}; its fields are {keys}; set data.field")
    return value


def json_kind(value: Any) -> str:
    """What JSON calls a value, for error messages."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
