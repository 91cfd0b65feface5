"""`fathom inspect`: what a checkpoint is, and that damage of every kind is told, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zlib
from importlib.metadata import EntryPoint
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools.inspect import group_of, inspect_hub, is_hub_path
from checkpoints_tools.safetensors_io import SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import write_file, write_folder
from fathom import zoo
from fathom.cli import ArgumentProblem
from fathom.cli_inspect import inspect_path
from fathom.models.deepseek_v4.config import DeepseekV4Config

GOLDEN = Path(__file__).parents[1] / "data" / "v4_tiny"
CONFIG = json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module")
def golden():
    """Name -> array of the golden model."""
    checkpoint = SafetensorsCheckpoint(GOLDEN)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def save(folder, tensors, config=CONFIG, **keywords):
    write_folder(folder, tensors, config=config, **keywords)
    return folder


def test_the_golden_folder():
    report = inspect_hub(GOLDEN)
    assert report.kind == "hub folder" and report.problems == [] and report.notes == []
    assert report.model == "DeepseekV4, 6 layers (a size of its own)"
    assert report.config["compress_ratios"] == [0, 0, 4, 8, 4, 8]
    assert report.tensors == 357 and report.dtypes["I64"] == [3, 3 * 160 * 2 * 8]
    assert sum(report.groups.values()) == report.num_bytes
    assert report.groups["embed"] == 160 * 64 * 4
    # routed experts: 6 layers x 8 experts x 3 matrices of 32 x 64
    assert report.groups["experts"] == 6 * 8 * 3 * 32 * 64 * 4
    text = report.to_text()
    assert "experts     F32" in text and "problems    none" in text


def test_one_file_is_described_without_asking_for_the_rest(tmp_path, golden):
    write_file(tmp_path / "part.safetensors", {"embed.weight": golden["embed.weight"]})
    report = inspect_hub(tmp_path / "part.safetensors")
    assert report.kind == "safetensors file" and report.tensors == 1 and report.problems == []


def test_a_size_that_the_zoo_knows(tmp_path):
    tiny = DeepseekV4Config.tiny()
    tensors = {
        tensor.name: np.zeros(tensor.shape, np.int64 if tensor.storage == "i64" else np.float32)
        for tensor in zoo.get("deepseek-v4-tiny").hub_tensors(tiny)
    }
    report = inspect_hub(save(tmp_path / "hub", tensors, tiny.to_hf_config()))
    assert report.model == "deepseek-v4-tiny" and report.problems == []


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path, golden):
    tensors = dict(golden)
    del tensors["layers.3.attn.wq_a.weight"], tensors["mtp.0.enorm.weight"]
    tensors["layers.9.extra.weight"] = np.zeros(3, np.float32)
    tensors["norm.weight"] = np.zeros(65, np.float32)
    tensors["layers.0.attn.attn_sink"] = np.zeros(4, np.int32)
    problems = inspect_hub(save(tmp_path / "hub", tensors)).problems
    assert sorted(problems) == [
        "layers.0.attn.attn_sink: found dtype I32, expected F32 or BF16 or F16",
        "layers.3.attn.wq_a.weight: missing, expected shape [32, 64]",
        "layers.9.extra.weight: left over, the model has no such tensor (shape [3])",
        "mtp.0.enorm.weight: missing, expected shape [64]",
        "norm.weight: found shape [65], expected [64] as F32",
    ]


def test_the_spelling_of_transformers_and_its_missing_mtp(tmp_path, golden):
    def respelled(name):
        special = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}
        name = name.replace(".attn.kv_norm.", ".attn.norm.")
        return special.get(name, "model." + name)

    tensors = {respelled(n): a for n, a in golden.items() if not n.startswith("mtp.")}
    report = inspect_hub(save(tmp_path / "hub", tensors))
    assert report.problems == []
    assert len(report.notes) == 1 and "no multi-token prediction" in report.notes[0]
    del tensors["model.norm.weight"]
    problems = inspect_hub(save(tmp_path / "other", tensors)).problems
    assert "norm.weight: missing, expected shape [64]" in problems


def quantised(golden, expert_storage):
    """The golden names as the released files store them, every value zero."""
    spec = zoo.get("deepseek-v4-flash")
    config = dataclasses.replace(DeepseekV4Config.from_hf_config(CONFIG), expert_dtype="fp4")
    dtypes = {
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I8": np.int8,
    }
    tensors = {}
    for tensor in spec.hub_tensors(config):
        if tensor.storage == "fp4":
            tensor = dataclasses.replace(tensor, storage=expert_storage)
        for stored in tensor.stored():
            tensors[stored.name] = np.zeros(stored.shape, dtypes[stored.dtype])
    assert {name for name in tensors if not name.endswith(".scale")} == set(golden)
    return tensors


def test_the_released_storage_is_sound_and_the_experts_are_told_by_their_dtype(tmp_path, golden):
    config = CONFIG | {"expert_dtype": "fp4"}
    report = inspect_hub(save(tmp_path / "fp4", quantised(golden, "fp4"), config))
    assert report.problems == [] and report.details["experts"] == "FP4 (two to a byte)"
    # The -Base models hold FP8 experts and say nothing of it, or something else.
    report = inspect_hub(save(tmp_path / "fp8", quantised(golden, "fp8"), config))
    assert report.problems == [] and report.details["experts"] == "FP8"
    assert report.notes == ["config.json says expert_dtype fp4, the tensors are fp8"]


def test_scales_that_are_missing_or_of_another_shape(tmp_path, golden):
    tensors = quantised(golden, "fp4")
    del tensors["layers.0.attn.wq_a.scale"]
    tensors["layers.1.ffn.experts.2.w1.scale"] = np.zeros((32, 3), ml_dtypes.float8_e8m0fnu)
    problems = inspect_hub(save(tmp_path / "hub", tensors)).problems
    assert sorted(problems) == [
        "layers.0.attn.wq_a.scale: missing, and layers.0.attn.wq_a.weight is stored as fp8",
        "layers.1.ffn.experts.2.w1.scale: found shape [32, 3], expected [32, 2] for fp4",
    ]


def test_index_and_shards_that_disagree(tmp_path, golden):
    folder = save(tmp_path / "hub", golden, max_shard_bytes=1_000_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and inspect_hub(folder).problems == []
    lost = len(SafetensorsCheckpoint(shards[1]).tensors)
    shards[1].unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = shards[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = inspect_hub(folder)
    assert any(f"shard {shards[1].name} is missing" in problem for problem in report.problems)
    assert any("ghost.weight" in problem for problem in report.problems)
    assert report.tensors == len(golden) - lost  # the sound shards are described all the same
    assert sum(": missing, expected shape" in problem for problem in report.problems) == lost


def test_damaged_files_and_pickles(tmp_path, golden):
    folder = save(tmp_path / "hub", golden)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    problems = " ".join(inspect_hub(folder).problems)
    assert "pytorch_model.bin: pickled" in problems and "cut off" in problems
    (folder / "config.json").unlink()
    assert any("config.json is missing" in p for p in inspect_hub(folder).problems)


def test_a_broken_package_is_a_note_and_no_obstacle(monkeypatch):
    entry = EntryPoint("a-broken-one", "no_such_module:make", zoo.ENTRY_POINT_GROUP)
    sound = zoo._entry_points()
    monkeypatch.setattr(zoo, "_entry_points", lambda: {entry.name: entry, **sound})
    report = inspect_hub(GOLDEN)
    assert report.problems == [] and report.model == "DeepseekV4, 6 layers (a size of its own)"
    (note,) = report.notes
    assert note.startswith("model 'a-broken-one': entry point 'no_such_module:make'")
    assert "ModuleNotFoundError" in note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers|layer_types"),
        ({"n_routed_experts": 10**9}, "num_experts"),
        ({"n_routed_experts": 100_000}, "describes 1,800,000 expert tensors"),
        ({"colour": "blue"}, "unknown keys: colour"),
        ({"model_type": "llama"}, "llama"),
    ],
)
def test_configs_that_cannot_be(tmp_path, golden, change, words):
    problems = inspect_hub(save(tmp_path / "hub", golden, CONFIG | change)).problems
    assert len(problems) == 1
    assert re.search(words, problems[0])


def test_groups():
    names = {
        "layers.1.ffn.experts.3.w1.weight": "experts",
        "layers.1.ffn.shared_experts.w1.weight": "shared experts",
        "layers.1.ffn.gate.bias": "router",
        "layers.1.hc_attn_fn": "hc",
        "hc_head_fn": "hc",
        "layers.2.attn.indexer.compressor.ape": "indexer",
        "layers.2.attn.compressor.ape": "compressor",
        "layers.2.attn.wq_a.weight": "attention",
        "layers.2.attn_norm.weight": "norm",
        "mtp.0.attn.wq_a.weight": "mtp",
        "head.weight": "head",
        "model/params/repeated/0/ffn/experts/w1": "experts",
        "model/params/prefix/0/attn_hc/fn": "hc",
        "model/params/mtp/0/block/attn/wq_a/weight": "mtp",
        "model/params/embed/weight": "embed",
        "model/model_state/prefix/0/ffn/router/tid2eid": "router",
    }
    assert {name: group_of(name) for name in names} == names


# --- Fathom's own checkpoints --------------------------------------------------------------------


def crc32(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return zlib.crc32(text.encode())


def write_step(directory, step, *, without=None):
    """A step folder as far as `inspect` reads it: its JSON part."""
    spec = zoo.get("deepseek-v4-tiny")
    leaves = {
        f"model/params/{'/'.join(map(str, path))}": {"shape": [2, 3], "dtype": "bfloat16"}
        for path in {tensor.path for tensor in spec.hub_tensors(spec.config)}
    }
    leaves["train/step"] = {"shape": [], "dtype": "int32"}
    leaves.pop(without, None)
    payload = {
        "format": 1,
        "step": step,
        "model": {"name": spec.name, "config": dataclasses.asdict(spec.config), "num_params": {}},
        "mesh": {"data": 2, "fsdp": 4, "expert": 1},
        "processes": 1,
        "versions": {"fathom-jax": "0.1.0", "jax": "0.10.2", "numpy": "2"},
        "leaves": leaves,
    }
    payload = json.loads(json.dumps(payload))
    folder = directory / str(step)
    folder.mkdir(parents=True)
    custom = {"fathom": payload, "crc32": crc32(payload)}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": custom}))
    return folder


def test_a_run_is_described_by_its_newest_step(tmp_path):
    write_step(tmp_path / "checkpoints", 5)
    step = write_step(tmp_path / "checkpoints", 10)
    for path in (tmp_path, tmp_path / "checkpoints", step):
        report = inspect_path(path)
        assert report.kind == "fathom checkpoint" and report.model == "deepseek-v4-tiny"
        assert report.problems == []
        assert report.details["step"] == "10" and report.details["steps"] == "5, 10"
        assert "data 2 x fsdp 4" in report.details["saved on"]
        assert report.details["written by"] == "fathom-jax 0.1.0, jax 0.10.2"
    assert report.dtypes["bfloat16"][1] == 12 * report.dtypes["bfloat16"][0]
    assert report.groups["optimizer state and step"] == 4


def test_a_step_that_lacks_a_parameter(tmp_path):
    write_step(tmp_path, 3, without="model/params/embed/weight")
    assert inspect_path(tmp_path).problems == ["embed/weight: missing"]


def test_half_copied_and_damaged_steps_are_told(tmp_path):
    write_step(tmp_path, 5)
    (tmp_path / "7").mkdir()
    shutil.copytree(tmp_path / "5", tmp_path / "4.corrupt")
    damaged = write_step(tmp_path, 6) / "_CHECKPOINT_METADATA"
    damaged.write_text(damaged.read_text().replace('"processes": 1', '"processes": 2'))
    problems = " ".join(inspect_path(tmp_path).problems)
    assert "7 is incomplete" in problems and "4.corrupt was set aside" in problems
    assert "checksum does not match" in problems


def test_nothing_but_a_half_copied_step(tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    report = inspect_path(tmp_path)
    assert report.kind == "fathom checkpoint" and report.tensors == 0
    assert len(report.problems) == 1 and "incomplete" in report.problems[0]


def test_a_model_that_is_not_in_the_zoo_here(tmp_path, monkeypatch):
    write_step(tmp_path, 1)
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    custom = json.loads(path.read_text())["custom_metadata"]
    custom["fathom"]["model"]["name"] = "somebody-elses"
    custom["crc32"] = crc32(custom["fathom"])
    path.write_text(json.dumps({"custom_metadata": custom}))
    (problem,) = inspect_path(tmp_path).problems
    assert "somebody-elses" in problem and "install the package" in problem


def test_neither_kind(tmp_path):
    assert not is_hub_path(tmp_path)
    with pytest.raises(ArgumentProblem, match="expected a Hub-format folder"):
        inspect_path(tmp_path)
