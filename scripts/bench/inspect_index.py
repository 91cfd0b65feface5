#!/usr/bin/env python
"""`fathom inspect` on DeepSeek-V4-Flash's 46 shards and 69,187 tensors: seconds from start to report.

    scripts/bench/inspect_index.py FOLDER [--repeats 5]

The shards are hollow: real headers, and holes where the data would be, so FOLDER needs 20 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

from checkpoints_tools.safetensors_writer import shard_name, write_index
from fathom.models.deepseek_v4.config import DeepseekV4Config
from fathom.models.deepseek_v4.hf_mapping import hub_tensors


def write_hollow_folder(folder: Path, config: DeepseekV4Config) -> int:
    """A folder with the release's names, shapes, dtypes and shards, and no data; returns how many tensors."""
    folder.mkdir(parents=True)
    shards: dict[str, list] = {}
    for tensor in hub_tensors(config):
        parts = tensor.name.split(".")
        group = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0].startswith("embed")
        shards.setdefault(group, []).extend(tensor.stored())
    weight_map, total = {}, 0
    for number, entries in enumerate(shards.values(), 1):
        header, end = {}, 0
        for entry in entries:
            begin, end = end, end + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        name = shard_name(number, len(shards))
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, name)
        total += end
    write_index(folder, weight_map, total)
    (folder / "config.json").write_text(json.dumps({**config.to_hf_config(), "expert_dtype": "fp4"}))
    return len(weight_map)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.folder / "hollow-flash"
    shutil.rmtree(folder, ignore_errors=True)
    count = write_hollow_folder(folder, DeepseekV4Config.flash())
    seconds = []
    for _ in range(arguments.repeats):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fathom", "inspect", str(folder)], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    print(f"{count:,} tensors, {os.cpu_count()} cores: median {median:.2f} s, best {min(seconds):.2f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
