"""Damaged, contradictory and hostile Hub folders, through the command: refused whole, nothing written anywhere."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools.safetensors_io import INDEX_NAME
from checkpoints_tools.safetensors_writer import write_file
from fathom.cli import main
from tests.checkpoints.folders import native_folder
from tests.checkpoints.test_safetensors_io import DAMAGED, raw_file
from tests.models.small import small_config

CONFIG = small_config(("sliding", "csa", "hca"), moe_intermediate_size=96, expert_dtype="fp4")
MAX_SECONDS, MAX_BYTES = 1.0, 100 << 20


@pytest.fixture
def hub(tmp_path):
    path = tmp_path / "hub"
    native_folder(path, CONFIG, max_shard_bytes=100_000)
    return path


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(tmp_path, hub, capsys, to) -> str:
    """What a conversion says; it must fail soon, in little memory, and leave the disk as it was."""
    before = everything(tmp_path)
    arguments = ["convert", "--to", to, str(hub), str(tmp_path / "out")]
    begin = time.process_time()
    assert main(arguments) in (1, 2)
    seconds = time.process_time() - begin
    assert seconds < MAX_SECONDS, seconds
    text = capsys.readouterr().err
    tracemalloc.start()  # a second time, for tracing makes Python several times slower
    try:
        assert main(arguments) in (1, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES, peak
    assert everything(tmp_path) == before
    return text


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_shard(tmp_path, hub, capsys, damage):
    header, length, data = DAMAGED[damage]
    shard = sorted(hub.glob("*.safetensors"))[1]
    raw_file(shard, header, data, length)
    assert shard.name in refused(tmp_path, hub, capsys, "orbax")


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 100, -1])
def test_a_shard_cut_off(tmp_path, hub, capsys, kept):
    shard = sorted(hub.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    assert shard.name in refused(tmp_path, hub, capsys, "hf")


def test_every_disagreement_of_index_and_shards_at_once(tmp_path, hub, capsys):
    index = json.loads((hub / INDEX_NAME).read_text())
    where = index["weight_map"]
    shards = sorted(set(where.values()))
    assert len(shards) > 3
    where["layers.0.attn.ghost.weight"] = shards[0]  # in no shard
    moved = next(name for name, shard in where.items() if shard == shards[1])
    where[moved] = shards[2]  # in another shard than the index says
    where["far"] = "../outside.safetensors"
    (hub / shards[3]).unlink()
    write_file(hub / "extra.safetensors", {"norm.weight": np.zeros(64, ml_dtypes.bfloat16)})
    where["unknown.tensor"] = "extra.safetensors"
    (hub / INDEX_NAME).write_text(json.dumps(index))
    text = refused(tmp_path, hub, capsys, "orbax")
    for words in ("layers.0.attn.ghost.weight", moved, "../outside.safetensors", shards[3], "unknown.tensor"):
        assert words in text, (words, text)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_pickle_is_never_opened(tmp_path, hub, capsys, name, to):
    for path in [*hub.glob("*.safetensors"), hub / INDEX_NAME]:
        path.unlink()
    (hub / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert name.split(".")[-1] in refused(tmp_path, hub, capsys, to)
    assert main(["inspect", str(hub)]) in (0, 1)
    assert not (tmp_path / "canary").exists()
    pickle.loads((hub / name).read_bytes())  # it would have: the canary is live
    assert (tmp_path / "canary").exists()


def test_a_shard_that_is_a_link_elsewhere(tmp_path, hub, capsys):
    shard = sorted(hub.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("/etc/passwd")
    text = refused(tmp_path, hub, capsys, "orbax")
    assert shard.name in text and "root:" not in text


def test_links_as_the_hubs_cache_has_them_are_followed(tmp_path, hub):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for shard in hub.glob("*.safetensors"):
        shard.rename(blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    assert main(["convert", "--to", "hf", str(hub), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("n_routed_experts", 10**9),
        ("num_nextn_predict_layers", 10**9),
        ("hidden_size", 10**18),
        ("rms_norm_eps", float("nan")),
        ("routed_scaling_factor", float("inf")),
        ("compress_rope_theta", float("nan")),
        ("vocab_size", -1),
        ("hidden_size", "64"),
        ("model_type", ["deepseek_v4"]),
    ],
)
def test_a_hostile_config(tmp_path, hub, capsys, key, value):
    config = json.loads((hub / "config.json").read_text())
    config[key] = value
    if key == "num_hidden_layers":
        config.pop("compress_ratios", None)
        config.pop("layer_types", None)
    (hub / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(tmp_path, hub, capsys, "orbax")


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "{" * 100_000, '{"model_type": "deepseek_v4"}'])
def test_a_config_that_is_none(tmp_path, hub, capsys, text):
    (hub / "config.json").write_text(text)
    assert "config.json" in refused(tmp_path, hub, capsys, "orbax")
