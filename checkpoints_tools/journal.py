"""What a conversion has done so far, and, when it is complete, the manifest that says what every block must hold.

A destination under way holds `.conversion/`: `plan.json` says of what it is the conversion, and each process appends
a line to a journal of its own for every block that is written. A second run reads all journals and does the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WORK_FOLDER = ".conversion"
MANIFEST = "fathom_manifest.json"
MANIFEST_FORMAT = 1


class DestinationError(ValueError):
    """A destination that cannot be written or resumed; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One written block.

    Attributes:
      tensor: native name of the weight. array: of a step folder, its path joined with "/"; of a Hub folder, the
        file. name: of a Hub folder, the tensor in the file. start, stop: the region of the array, None for a
        tensor of a Hub folder.
      num_bytes, crc32: of its bytes in C order.
    """

    tensor: str
    array: str
    num_bytes: int
    crc32: int
    start: tuple[int, ...] | None = None
    stop: tuple[int, ...] | None = None
    name: str | None = None

    @property
    def key(self) -> tuple:
        """What identifies it within a conversion."""
        return self.array, self.name, self.start

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what is not set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def block_from_json(entry: Mapping[str, Any]) -> Block:
    """The inverse of `Block.to_json`."""
    fields = dict(entry)
    for name in ("start", "stop"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return Block(**fields)


def crc32_of(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def fingerprint(plan: Any) -> str:
    """SHA-256 of a JSON-able plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


class Journal:
    """The record of a conversion under way; blocks may be added from any thread.

    Args:
      destination: its folder, made if missing. plan: JSON-able; what decides the result.

    Attributes:
      done: key -> Block of everything recorded by earlier runs and other processes when it was opened.

    Raises:
      DestinationError: when the folder holds something else.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any]):
        self.destination = Path(destination)
        self.folder = self.destination / WORK_FOLDER
        self.fingerprint = fingerprint(plan)
        self._claim(plan)
        self._path = self.folder / f"journal-{uuid.uuid4().hex}.jsonl"
        self._file: Any = None
        self._lock = threading.Lock()
        self.done = self.read()

    def _claim(self, plan: Mapping[str, Any]) -> None:
        own = self.folder / "plan.json"
        if self.destination.exists() and not self.destination.is_dir():
            raise DestinationError(f"{self.destination}: found a file, expected a folder or nothing")
        if not own.exists():
            try:
                foreign = [p.name for p in self.destination.iterdir() if p.name != WORK_FOLDER]
            except FileNotFoundError:
                foreign = []
            if foreign and not own.exists():
                raise DestinationError(
                    f"{self.destination}: holds {', '.join(sorted(foreign)[:5])}, which no conversion left "
                    "there; give a folder that does not exist, or an empty one"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"plan-{uuid.uuid4().hex}"
            partial.write_text(json.dumps({"fingerprint": self.fingerprint, "plan": plan}, indent=1), "utf-8")
            try:
                os.link(partial, own)  # atomic, and fails when another process was first
            except FileExistsError:
                pass
            partial.unlink()
        found = json.loads(own.read_text("utf-8"))
        if found["fingerprint"] != self.fingerprint:
            raise DestinationError(
                f"{self.destination}: holds an unfinished conversion of something else:\n"
                + "\n".join(_differences(found["plan"], json.loads(json.dumps(plan))))
                + "\nfinish that one with its own arguments, or remove the folder"
            )

    def read(self) -> dict[tuple, Block]:
        """Everything that all processes have recorded."""
        done = {}
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    block = block_from_json(json.loads(line))
                except (ValueError, TypeError):
                    continue  # the end of a line that a killed process was writing
                done[block.key] = block
        return done

    def add(self, *blocks: Block) -> None:
        """Records blocks that are written."""
        text = "".join(json.dumps(block.to_json()) + "\n" for block in blocks)
        with self._lock:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def clean(self) -> None:
        """Removes the record of a conversion that is complete."""
        self.close()
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # another process is about to do the same


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted(found.keys() | wanted.keys()):
            lines += _differences(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
        return lines[:10]
    return [] if found == wanted else [f"  {where}: found {str(found)[:80]}, expected {str(wanted)[:80]}"]


def write_manifest(folder: Path, about: Mapping[str, Any], blocks: Iterable[Block]) -> None:
    """Writes the manifest of a complete conversion: what it was made of, and a checksum for every block."""
    content = {
        "format": MANIFEST_FORMAT,
        **about,
        "blocks": [block.to_json() for block in blocks],
    }
    partial = Path(folder) / f".{MANIFEST}.{uuid.uuid4().hex}"
    partial.write_text(json.dumps(content), "utf-8")
    partial.replace(Path(folder) / MANIFEST)


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[Block]]:
    """(what it says of the conversion, blocks).

    Raises:
      FileNotFoundError: without a manifest. ValueError: when it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; only conversions leave one, so there is nothing to verify by")
    try:
        content = json.loads(path.read_text("utf-8"))
        blocks = [block_from_json(entry) for entry in content.pop("blocks")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if content.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{path}: format {content.get('format')!r}, this version reads {MANIFEST_FORMAT}")
    return content, blocks
