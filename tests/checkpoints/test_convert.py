"""Conversion both ways: native byte for byte, decoded value for value, resumable, refused before any write."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fathom
from checkpoints_tools import convert as convert_module
from checkpoints_tools.convert import Request, convert
from checkpoints_tools.hub_source import HubSource
from checkpoints_tools.journal import WORK_FOLDER, DestinationError
from checkpoints_tools.safetensors_io import SafetensorsCheckpoint
from checkpoints_tools.safetensors_writer import write_folder
from checkpoints_tools.verify import verify
from fathom.cli import main
from fathom.mesh import make_mesh
from fathom.models.deepseek_v4.hf_mapping import hub_tensors
from tests.checkpoints.folders import GOLDEN, assert_same_bytes, native_folder, native_tensors
from tests.models.small import small_config

# A read that fails leaves orbax's coroutines of other arrays behind, which warn when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Rows and columns that are no multiples of 128, widths that FP4's 32 divide.
CONFIG = small_config(("sliding", "csa", "hca", "csa", "hca"), moe_intermediate_size=96, expert_dtype="fp4")
BASE = dataclasses.replace(CONFIG, expert_dtype="fp8")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "hub"
    return path, native_folder(path, CONFIG)


@pytest.fixture(scope="module")
def converted(native, tmp_path_factory):
    """The native folder as a step folder with native storage."""
    destination = tmp_path_factory.mktemp("converted") / "step"
    assert to_orbax(native[0], destination).complete
    return destination


def to_orbax(source, destination, dtype="native", **kwargs):
    return convert(Request(source, destination, "orbax", dtype, **kwargs))


def to_hf(source, destination, dtype="native", **kwargs):
    return convert(Request(source, destination, "hf", dtype, **kwargs))


def decoded(path, config) -> dict[str, np.ndarray]:
    """Native name -> float32 (or integer) array in the Hub's layout, by the reader whose codecs are tested apart."""
    source = HubSource(path)
    return {t.name: t.to_hub(source.read(t)) for t in hub_tensors(config)}


def loaded(path, config, **kwargs) -> dict[str, np.ndarray]:
    model = fathom.load(path, **kwargs)
    flat = {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model))}
    return {t.name: t.to_hub(flat[t.path][t.index]) for t in hub_tensors(config)}


def model_files(folder) -> dict[str, bytes]:
    paths = sorted((folder / "model").rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def assert_equal_weights(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("fp8_scale", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("config", [CONFIG, BASE], ids=["fp4 experts", "fp8 experts"])
def test_there_and_back_byte_for_byte(tmp_path, config, fp8_scale):
    tensors = native_folder(tmp_path / "hub", config, fp8_scale=fp8_scale)
    assert to_orbax(tmp_path / "hub", tmp_path / "step").complete
    assert to_hf(tmp_path / "step", tmp_path / "again").complete
    assert_same_bytes(tmp_path / "again", tensors)
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads(
            (tmp_path / "hub" / name).read_text()
        )
    assert verify(tmp_path / "step") == verify(tmp_path / "again") == []
    assert not (tmp_path / "step" / WORK_FOLDER).exists()


@pytest.mark.parametrize("source", ["hub", "step", "trained"])
def test_fp4_experts_exported_as_fp8_are_the_same_numbers(tmp_path, native, converted, source):
    path = {"hub": native[0], "step": converted}.get(source, tmp_path / "trained")
    if source == "trained":  # plain weights that FP4 holds exactly: encoding them loses nothing
        to_orbax(native[0], path, "fp32")
    to_hf(path, tmp_path / "out", expert_dtype="fp8")
    found = HubSource(tmp_path / "out")
    experts = [s for s in found.stored.values() if ".experts." in s.name]
    assert {s.dtype for s in experts} == {"F8_E4M3"} and verify(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_dtype"] == "fp8"
    assert_equal_weights(decoded(tmp_path / "out", BASE), decoded(native[0], CONFIG))


def test_fp4_that_fp8_cannot_hold_is_refused_by_name(tmp_path, capsys):
    tensors = native_tensors(CONFIG)
    name = "layers.1.ffn.experts.3.w1"
    scales = tensors[f"{name}.scale"].view(np.uint8).copy()
    scales[0, 0], scales[1:, 0] = 140, 112  # 2^28 between two scales of one block
    tensors[f"{name}.scale"] = scales.view(ml_dtypes.float8_e8m0fnu)
    write_folder(tmp_path / "hub", tensors, config={**CONFIG.to_hf_config(), "expert_dtype": "fp4"})
    arguments = ["--to", "hf", str(tmp_path / "hub"), str(tmp_path / "out"), "--expert-dtype", "fp8"]
    assert main(["convert", *arguments]) == 1
    assert f"{name}.weight" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_dsparks_stages_are_left_out_and_told(tmp_path, capsys, caplog):
    """The re-releases' extra stages are blocks that the model does not have; the rest of them converts."""
    tensors = native_tensors(CONFIG)
    for name in ("main_proj.weight", "markov_head.weight", "confidence_head.weight"):
        tensors |= {f"mtp.{stage}.{name}": np.ones((8, 4), ml_dtypes.bfloat16) for stage in range(3)}
    config = {**CONFIG.to_hf_config(), "expert_dtype": "fp4"}
    config["compress_ratios"] = [*CONFIG.compress_ratios, 0, 0, 0]
    config |= {"dspark_block_size": 5, "dspark_noise_token_id": 7, "dspark_markov_rank": 16}
    config["dspark_target_layer_ids"] = [2, 3, 4]
    write_folder(tmp_path / "hub", tensors, config=config)
    assert main(["inspect", str(tmp_path / "hub")]) == 0
    assert "DSpark: 3 stages" in capsys.readouterr().out
    to_orbax(tmp_path / "hub", tmp_path / "step")
    assert "DSpark: 3 stages" in caplog.text
    to_hf(tmp_path / "step", tmp_path / "again")
    assert_same_bytes(tmp_path / "again", {k: v for k, v in tensors.items() if not k.startswith("mtp.")})
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not [key for key in again if key.startswith("dspark")]
    assert main(["inspect", str(tmp_path / "again")]) == 0


def test_an_export_has_the_shards_of_the_release(tmp_path, converted):
    to_hf(converted, tmp_path / "hub")
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    shard_of = {}
    for name, shard in index["weight_map"].items():
        shard_of.setdefault(shard, set()).add(".".join(name.split(".")[:2]) if name[0] in "lm" else "root")
    assert len(shard_of) == 1 + CONFIG.num_layers + 1 + 1  # embedding, layers, head and norms, MTP
    assert all(len(groups) == 1 or groups == {"root"} for groups in shard_of.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_decoded_values_reach_the_model(tmp_path, native, dtype):
    path, _ = native
    to_orbax(path, tmp_path / "step", dtype)
    wanted = decoded(path, CONFIG)
    if dtype == "bf16":
        kinds = {t.name: t.storage for t in hub_tensors(CONFIG)}
        wanted = {
            name: array.astype(ml_dtypes.bfloat16).astype(np.float32) if kinds[name] not in ("f32", "i64") else array
            for name, array in wanted.items()
        }
    assert_equal_weights(loaded(tmp_path / "step", CONFIG, dtype="fp32"), wanted)
    assert verify(tmp_path / "step") == []


@pytest.mark.parametrize("shape", [None, {"fsdp": 4, "expert": 2}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_native_storage_is_decoded_where_it_is_needed(native, converted, shape):
    mesh = None if shape is None else make_mesh(shape)
    found = loaded(converted, CONFIG, mesh=mesh)
    assert_equal_weights(found, decoded(native[0], CONFIG))


def test_a_quantised_hub_folder_loads_directly(native, converted):
    assert_equal_weights(loaded(native[0], CONFIG), decoded(native[0], CONFIG))


def test_nothing_of_float32_or_integers_is_narrowed(tmp_path):
    """A folder of float32 throughout stays so in bf16, but for the weights named."""
    shutil.copytree(GOLDEN, tmp_path / "hub")
    before = SafetensorsCheckpoint(tmp_path / "hub").tensors
    name = "layers.2.attn.wq_a.weight"
    to_orbax(tmp_path / "hub", tmp_path / "step", "bf16", narrow=(f"{name}=bf16",))
    to_hf(tmp_path / "step", tmp_path / "native", "fp32")
    payload = json.loads((tmp_path / "step" / "_CHECKPOINT_METADATA").read_text())
    leaves = payload["custom_metadata"]["fathom"]["leaves"]
    assert {leaf["dtype"] for leaf in leaves.values()} == {"float32", "int64", "bfloat16"}
    assert sum(leaf["dtype"] == "bfloat16" for leaf in leaves.values()) == 1
    found = SafetensorsCheckpoint(tmp_path / "native")
    assert {n: i.dtype for n, i in found.tensors.items()} == {n: i.dtype for n, i in before.items()}
    for tensor in found.tensors:
        again, first = found.read(tensor), SafetensorsCheckpoint(tmp_path / "hub").read(tensor)
        if tensor == name:
            first = first.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(again, first, err_msg=tensor)


def test_narrowing_what_is_not_there(tmp_path, native):
    with pytest.raises(ValueError, match="no weight has this name; did you mean embed.weight"):
        to_orbax(native[0], tmp_path / "step", "bf16", narrow=("embd.weight=bf16",))
    assert not (tmp_path / "step").exists()


def test_a_trained_checkpoint_exports_to_the_releases_storage(tmp_path, native):
    """float32 weights that FP8 and FP4 hold exactly come back as exactly these values."""
    to_orbax(native[0], tmp_path / "step", "fp32")
    to_hf(tmp_path / "step", tmp_path / "hub")
    first, again = SafetensorsCheckpoint(native[0]), SafetensorsCheckpoint(tmp_path / "hub")
    assert {n: (i.dtype, i.shape) for n, i in first.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in again.tensors.items()
    }
    assert_equal_weights(decoded(tmp_path / "hub", CONFIG), decoded(native[0], CONFIG))


class Killed(BaseException):
    """As SIGKILL: nothing may catch it on the way."""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_what_was_done_is_not_done_again(tmp_path, native, monkeypatch, to):
    writer = convert_module.OrbaxWriter if to == "orbax" else convert_module.HubWriter
    original, calls = writer.run, []

    def run(self, unit, *rest):
        if len(calls) == 4:
            raise Killed
        calls.append(unit)
        return original(self, unit, *rest)

    request = Request(native[0], tmp_path / "out", to, threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "run", run)
        with pytest.raises(Killed):
            convert(request)
    assert main(["inspect", str(tmp_path / "out")]) == 1  # unfinished, and it says so
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "run", lambda self, unit, *rest: again.append(unit) or original(self, unit, *rest))
        outcome = convert(request)
    assert outcome.complete and outcome.done_before > 0
    assert not {str(u) for u in calls} & {str(u) for u in again}
    assert verify(tmp_path / "out") == []
    assert convert(request).done_now == 0


def test_another_conversion_into_the_same_folder_is_refused(tmp_path, native, converted):
    with pytest.raises(DestinationError, match="already holds another"):
        to_orbax(native[0], converted, "bf16")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DestinationError, match="thesis.txt"):
        to_orbax(native[0], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_processes_make_what_one_makes(tmp_path, native):
    mesh = {"fsdp": 4, "expert": 2}
    one = to_orbax(native[0], tmp_path / "one", "fp32", mesh=mesh)
    first = to_orbax(native[0], tmp_path / "two", "fp32", mesh=mesh, process=0, processes=2)
    assert one.complete and not first.complete
    second = to_orbax(native[0], tmp_path / "two", "fp32", mesh=mesh, process=1, processes=2)
    assert second.complete and first.done_now and second.done_now
    assert first.done_now + second.done_now == one.done_now

    assert model_files(tmp_path / "one") == model_files(tmp_path / "two")
    mesh = make_mesh(mesh)
    assert_equal_weights(loaded(tmp_path / "two", CONFIG, mesh=mesh), decoded(native[0], CONFIG))


def test_two_processes_at_the_same_time(tmp_path, native):
    """Real processes into one checkpoint, cut for a mesh: the files are those of a single one."""
    mesh = ["--mesh", "data=2,fsdp=4", "--dtype", "bf16", "--processes", "2"]
    command = [sys.executable, "-m", "fathom", "convert", "--to", "orbax", str(native[0]), str(tmp_path / "two"), *mesh]
    running = [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert any("complete" in text for text in texts), texts
    to_orbax(native[0], tmp_path / "one", "bf16", mesh={"data": 2, "fsdp": 4})
    assert model_files(tmp_path / "one") == model_files(tmp_path / "two")
    assert verify(tmp_path / "two") == []


def test_a_flipped_bit_is_found_by_verify_and_by_load(tmp_path, native, converted):
    folder = tmp_path / "step"
    shutil.copytree(converted, folder)
    chunks = [p for p in (folder / "quantised").rglob("*") if p.is_file() and "c" in p.parts]
    chunk = max(chunks, key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 1
    chunk.write_bytes(data)
    problems = verify(folder)
    assert len(problems) == 1 and ("cannot be read" in problems[0] or "CRC-32" in problems[0])
    with pytest.raises(ValueError, match="cannot be read"):
        fathom.load(folder)
    to_hf(converted, tmp_path / "hub")
    shard = sorted((tmp_path / "hub").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert [("expected" in p and shard.name in p) for p in verify(tmp_path / "hub")] == [True]


def test_a_dry_run_writes_nothing(tmp_path, native, capsys):
    assert main(["convert", "--to", "orbax", str(native[0]), str(tmp_path / "x"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "bytes written" in text and "memory" in text and "min at" in text
    assert not (tmp_path / "x").exists()


def test_the_command_and_its_verification(tmp_path, native, capsys):
    step = tmp_path / "step"
    assert main(["convert", "--to", "orbax", str(native[0]), str(step), "--dtype", "bf16"]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["inspect", str(step), "--verify", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["problems"] == [] and report["details"]["verified"] == "every block as it was written"
    assert main(["inspect", str(native[0]), "--verify"]) == 2
    assert main(["convert", "--to", "orbax", str(native[0]), str(step), "--mesh", "fsdp=two"]) == 2
    assert main(["convert", "--to", "hf", str(tmp_path / "nothing"), str(step)]) == 2


def spoiled(tensors, **changes):
    """The tensors with some replaced, or removed where the new value is None."""
    merged = {**tensors, **{k.replace("__", "."): v for k, v in changes.items()}}
    return {k: v for k, v in merged.items() if v is not None}


def test_every_fault_of_the_source_at_once_and_before_any_write(tmp_path):
    tensors = native_tensors(CONFIG)
    expert = "layers.1.ffn.experts.{}.w1.weight"
    wq_b = tensors["layers.0.attn.wq_b.weight"]
    bad = {
        "layers.0.attn.wq_a.scale": None,  # FP8 without its scale
        "layers.0.attn.wkv.scale": np.ones((7, 9), np.uint8).view(ml_dtypes.float8_e8m0fnu),
        expert.format(3): np.zeros((96, 64), ml_dtypes.bfloat16),  # BF16 among FP4
        expert.format(3).replace("weight", "scale"): None,
        "layers.0.attn.wq_b.weight": np.ascontiguousarray(wq_b.T),  # transposed
        "layers.2.ffn.experts.7.w2.weight": None,  # one expert short
        "layers.2.ffn.experts.7.w2.scale": None,
        "layers.9.what": np.zeros(3, np.float32),
    }
    spoilt = {k: v for k, v in {**tensors, **bad}.items() if v is not None}
    write_folder(tmp_path / "hub", spoilt, config={**CONFIG.to_hf_config(), "expert_dtype": "fp4"})
    with pytest.raises(ValueError) as caught:
        to_orbax(tmp_path / "hub", tmp_path / "step")
    text = str(caught.value)
    for words in (
        "layers.0.attn.wq_a.scale: missing, and layers.0.attn.wq_a.weight is stored as fp8",
        "layers.0.attn.wkv.scale: found shape [7, 9], expected [1, 1] for fp8",
        "experts.3.w1.weight: found dtype BF16, expected I8 as 7 of the 8",
        f"layers.0.attn.wq_b.weight: found shape {list(wq_b.T.shape)}, expected {list(wq_b.shape)}",
        "layers.2.ffn.experts.7.w2.weight: missing",
        "layers.9.what: left over",
    ):
        assert words in text, words
    assert not (tmp_path / "step").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers.0.attn.wq_a.scale", np.full((1, 1), 255, np.uint8), "wq_a.scale: 1 of 1 scales are wrong"),
        ("layers.0.ffn.gate.tid2eid", np.full((264, 2), 8), "found values 8 to 8, expected 0 to 7"),
    ],
)
def test_bad_values_are_refused_before_any_write(tmp_path, name, value, words):
    tensors = native_tensors(CONFIG)
    shape, dtype = tensors[name].shape, tensors[name].dtype
    tensors[name] = np.broadcast_to(value[:1, :1], shape).copy().view(dtype)
    write_folder(tmp_path / "hub", tensors, config={**CONFIG.to_hf_config(), "expert_dtype": "fp4"})
    with pytest.raises(ValueError, match=words):
        to_orbax(tmp_path / "hub", tmp_path / "step")
    assert not (tmp_path / "step").exists()


def test_memory_is_bounded_by_blocks_not_by_arrays(tmp_path, native, monkeypatch):
    """With small blocks a large weight is written in several, and reads back whole."""
    from checkpoints_tools import to_orbax as module

    monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    outcome = to_orbax(native[0], tmp_path / "step", "fp32")
    assert outcome.blocks > 4 * outcome.tensors
    assert_equal_weights(loaded(tmp_path / "step", CONFIG), decoded(native[0], CONFIG))
    assert verify(tmp_path / "step") == []

