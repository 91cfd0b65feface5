"""Checkpoints: what is saved comes back, on any mesh; what is damaged is noticed and never used."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import random
import resource
import shutil
import tempfile
import tracemalloc  # noqa: F401 (pytest imports it to tell of what was left open, also when no file can be opened)
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.options import ComputeOptions
from fathom.mesh import make_mesh
from fathom.recipe import Recipe
from fathom.step_folder import (
    CheckpointError,
    DamagedCheckpointError,
    find_step,
    read_payload,
)
from fathom.train import checkpoint as checkpoint_module
from fathom.train import checkpoint_format
from fathom.train.checkpoint import Checkpoints
from fathom.train.checkpoint_model import load_model
from fathom.train.manifest import checksums, config_differences, describe_run
from fathom.train.state import named_leaves
from fathom.train.step import init_state, make_program
from tests.train.toy_model import TOY, ToyConfig

# When a read fails, orbax leaves coroutines of other arrays behind, which warn when they are
# collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DATA = {"offset": 12, "remainder": [1, -1]}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", TOY)
    yield
    gc.collect()


def make(mesh, optimizer=None, **model):
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"name": "toy-lm", "dtype": "float32", **model},
            "data": {"path": "unused", "sequence_length": 16, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-2, **(optimizer or {})},
            "mesh": mesh,
            "train": {"steps": 10},
        }
    )
    program = make_program(recipe, make_mesh(recipe.mesh.shape))
    return recipe, program


@pytest.fixture(scope="module")
def made():
    """(recipe, program, state) on fsdp 8; the module's fixture for all that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo._registered, "toy-lm", TOY)
        recipe, program = make({"fsdp": 8})
        return recipe, program, with_noise(init_state(program, 0))


def with_noise(state):
    """Fresh optimizer moments are zeros, of which nothing is stored on disk."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        values = rng.normal(size=leaf.shape) if leaf.ndim else np.ones(())
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return dataclasses.replace(state, opt_state=jax.tree.map(noise, state.opt_state))


def at_step(state, step):
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), state.step.sharding))


def save_steps(directory, made, steps, **options):
    recipe, program, state = made
    about = describe_run(recipe.to_dict(), program.spec, program.mesh, {"files": {"a.txt": 3}})
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(at_step(state, step), [DATA], about)
    return checkpoints


def assert_same(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def data_files(folder: Path) -> list[Path]:
    """The files that hold array data, largest first."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: -p.stat().st_size)


def test_round_trip(tmp_path, made):
    recipe, program, state = made
    save_steps(tmp_path, made, [3])
    restored = Checkpoints(tmp_path).restore(program.state)
    assert_same(restored.state, at_step(state, 3))
    for name, leaf in named_leaves(restored.state).items():
        wanted = named_leaves(program.state)[name].sharding
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
    assert restored.data_states == [DATA]
    payload = restored.payload
    assert payload["recipe"] == recipe.to_dict()
    assert payload["model"]["name"] == "toy-lm" and payload["model"]["config"]["taps"] == [1, 2]
    assert payload["versions"]["jax"] == jax.__version__
    assert payload["data_fingerprint"] == {"files": {"a.txt": 3}}
    assert payload["mesh"]["fsdp"] == 8


def test_nothing_saved_gives_none(tmp_path, made):
    assert Checkpoints(tmp_path / "none").restore(made[1].state) is None


def test_restore_onto_another_mesh(tmp_path, made):
    save_steps(tmp_path, made, [3])
    _, program = make({"data": 2, "fsdp": 2, "tensor": 2})
    restored = Checkpoints(tmp_path).restore(program.state)
    assert_same(restored.state, at_step(made[2], 3))
    assert restored.state.params["up"][...].sharding.spec[2] == "tensor"


def test_muons_momentum_comes_back_by_name_on_another_mesh(tmp_path):
    block = {"name": "muon", "momentum_dtype": "bfloat16"}
    recipe, program = make({"fsdp": 8}, block)
    state = with_noise(init_state(program, 0))
    save_steps(tmp_path, (recipe, program, state), [3])
    _, moved = make({"data": 2, "fsdp": 2, "tensor": 2}, block)
    restored = Checkpoints(tmp_path).restore(moved.state)
    assert_same(restored.state, at_step(state, 3))
    prefix = "train/opt_state/1/inner_states"
    dtypes = {name: leaf["dtype"] for name, leaf in restored.payload["leaves"].items() if name.startswith(prefix)}
    adamw = {f"{prefix}/adamw/inner_state/{name}": "float32" for name in ("nu/embed", "nu/gain", "nu/temperature")}
    assert dtypes == adamw | {
        f"{prefix}/adamw/inner_state/count": "int32",
        **{name.replace("/nu/", "/mu/"): "bfloat16" for name in adamw},
        **{f"{prefix}/muon/inner_state/0/trace/{name}": "bfloat16" for name in ("up", "down")},
    }


def test_old_steps_go_and_chosen_ones_stay(tmp_path, made):
    checkpoints = save_steps(tmp_path, made, range(1, 9), keep=2, keep_every=3)
    assert checkpoints.steps() == [3, 6, 7, 8]
    assert checkpoints.saved_step == 8


def test_checksums_do_not_depend_on_the_mesh(made):
    _, program = make({"data": 2, "fsdp": 2, "tensor": 2})
    other = init_state(program, 0)
    assert checksums(made[2].params) == checksums(other.params)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "float8_e4m3fn", "int8", "uint16"]
)
def test_any_one_changed_element_changes_the_checksum(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.integers(0, 2, (7, 5)), dtype))
    before = checksums({"x": jnp.asarray(x)})["x"]
    for index in np.ndindex(*x.shape):
        y = x.copy()
        y.view(np.uint8).reshape(*x.shape, -1)[index][-1] ^= 1
        assert checksums({"x": jnp.asarray(y)})["x"] != before, index
    moved = checksums({"x": jnp.asarray(x[::-1].copy())})["x"]
    assert moved != before


def test_a_flipped_bit_anywhere_in_the_data_is_found(tmp_path, made, caplog):
    """Orbax by itself restores most of these without an error and with wrong values."""
    _, program, state = made
    save_steps(tmp_path / "good", made, [1, 2])
    rng = random.Random(0)
    steps = []
    for file in data_files(tmp_path / "good" / "2"):
        for _ in range(6 if file.stat().st_size > 20000 else 2):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            flip_a_bit(tmp_path / "bad" / file.relative_to(tmp_path / "good"), rng)
            restored = Checkpoints(tmp_path / "bad").restore(program.state)
            steps.append(int(restored.state.step))
            assert_same(restored.state, at_step(state, steps[-1]))  # never a wrong value
            assert (tmp_path / "bad" / "2.corrupt").is_dir() == (steps[-1] == 1)
    # The rest hit bytes that nothing reads: orbax writes some records twice.
    assert steps.count(1) >= len(steps) // 2
    assert caplog.text.count("other contents than were saved") >= 4


def flip_a_bit(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(folder):
    file = data_files(folder)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete_data(folder):
    data_files(folder)[0].unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def half_copied(folder):
    shutil.rmtree(folder / "train")


def garbled_payload(folder):
    (folder / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"fath')


def edited_payload(folder):
    file = folder / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"steps": 10', '"steps": 11'))


def renamed(folder):
    file = folder / "_CHECKPOINT_METADATA"
    values = json.loads(file.read_text())
    values["custom_metadata"]["fathom"]["step"] = 7
    text = json.dumps(values["custom_metadata"]["fathom"], sort_keys=True, separators=(",", ":"))
    values["custom_metadata"]["crc32"] = zlib.crc32(text.encode())
    file.write_text(json.dumps(values))


def no_item_metadata(folder):
    (folder / "model" / "_METADATA").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, delete_data, empty, half_copied, garbled_payload, edited_payload, renamed,
     no_item_metadata],
)  # fmt: skip
def test_a_damaged_step_is_set_aside_and_the_one_before_used(tmp_path, made, caplog, damage):
    _, program, state = made
    save_steps(tmp_path, made, [1, 2])
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(tmp_path).restore(program.state)
    assert_same(restored.state, at_step(state, 1))
    assert "2 is not used" in caplog.text
    assert (tmp_path / "2.corrupt").is_dir() and not (tmp_path / "2").exists()
    # The run goes on, and saves that step again.
    assert save_steps(tmp_path, made, [2]).steps() == [1, 2]


def wrapped(error):
    """As orbax raises it: inside an error about handlers."""

    def load(folder, items):
        try:
            raise error
        except type(error) as cause:
            raise KeyError("Failed to load checkpointable: model due to incompatible handler") from cause

    return load


NOT_DAMAGE = [
    ValueError("PERMISSION_DENIED: Error opening driver: Failed to open: Permission denied [os_error_code='13']"),
    ValueError("RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']"),
    ValueError("UNKNOWN: Error reading file: Input/output error [os_error_code='5']"),
    ValueError("Failed to open: File name too long [os_error_code='36']"),
    ValueError("UNAVAILABLE: CURL error: could not connect"),
    ValueError("DEADLINE_EXCEEDED: no answer in 60 s"),
    ValueError("INTERNAL: HTTP response code 500"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes"),
    RuntimeError("random_device::random_device(const std::string&): device not available"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    PermissionError(13, "Permission denied"),
    OSError(24, "Too many open files"),
    TimeoutError("Timeout waiting at barrier"),
]


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: str(error)[:20])
def test_a_step_that_cannot_be_read_now_is_no_damaged_step(tmp_path, made, monkeypatch, error):
    save_steps(tmp_path, made, [1, 2])
    monkeypatch.setattr(checkpoint_format.ocp, "load_checkpointables", wrapped(error))
    with pytest.raises(CheckpointError, match="2 cannot be read here and now .* then start again") as caught:
        Checkpoints(tmp_path).restore(made[1].state)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert f"({type(error).__name__}: {error})" in str(caught.value)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    monkeypatch.undo()
    monkeypatch.setitem(zoo._registered, "toy-lm", TOY)
    assert int(Checkpoints(tmp_path).restore(made[1].state).state.step) == 2


DAMAGE = [
    ValueError("DATA_LOSS: CRC-32C checksum verification failed"),
    ValueError("OUT_OF_RANGE: Requested byte range [26353, 28382) is not valid for value of size 24448"),
    ValueError("FAILED_PRECONDITION: Error reading shard entry {0, 0}/{1, 1}"),
    ValueError("NOT_FOUND: Failed to open [os_error_code='2']"),
    ValueError("Error opening driver: Error parsing object member"),  # INVALID_ARGUMENT has no code
    json.JSONDecodeError("Expecting value", "", 0),
    FileNotFoundError("Metadata file (named _METADATA) does not exist"),
    KeyError("value_type"),
]


@pytest.mark.parametrize("error", DAMAGE, ids=lambda error: str(error)[:20])
def test_a_step_that_is_damaged_is_set_aside(tmp_path, made, monkeypatch, error):
    save_steps(tmp_path, made, [1])
    monkeypatch.setattr(checkpoint_format.ocp, "load_checkpointables", wrapped(error))
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        Checkpoints(tmp_path).restore(made[1].state)
    assert [path.name for path in tmp_path.iterdir()] == ["1.corrupt"]


@contextlib.contextmanager
def open_files_left(count):
    """Room for so many more open files than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < highest:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in taken:
            os.close(file)


def test_too_many_open_files_condemn_no_step(tmp_path, made):
    save_steps(tmp_path, made, [1, 2])
    Checkpoints(tmp_path).restore(made[1].state)  # what is imported late is imported now
    causes = []
    for count in range(1, 12):
        with open_files_left(count):
            try:
                Checkpoints(tmp_path).restore(made[1].state)
            except CheckpointError as error:
                causes.append(str(error))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], causes
    # The C++ libraries' random numbers come from a file too.
    said = ("Too many open files", "random_device")
    assert len(causes) >= 3 and all(any(words in cause for words in said) for cause in causes)


@contextlib.contextmanager
def without_privileges():
    """As a user whom file permissions bind; root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["2", "2/_CHECKPOINT_METADATA", "2/model", "2/model/_METADATA", "2/train/d"])
def test_files_of_another_user_condemn_no_step(made, closed):
    """Orbax finds that such a file "does not exist"."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o777)
        save_steps(folder, made, [1, 2])
        Checkpoints(folder).restore(made[1].state)
        (folder / closed).chmod(0)
        with (
            without_privileges(),
            pytest.raises(CheckpointError, match="2 cannot be read here and now .*Permission denied"),
        ):
            Checkpoints(folder).restore(made[1].state)
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    finally:
        (folder / closed).chmod(0o700)
        shutil.rmtree(folder)


def test_no_sound_step_is_an_error_not_a_fresh_start(tmp_path, made):
    save_steps(tmp_path, made, [1])
    truncate(tmp_path / "1")
    for _ in range(2):  # also when the damaged step was set aside earlier
        with pytest.raises(CheckpointError, match=r"no sound checkpoint.*1\.corrupt"):
            Checkpoints(tmp_path).restore(made[1].state)


def test_a_folder_that_cannot_be_written_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be written.*checkpoint\.dir"):
        Checkpoints(tmp_path / "file" / "checkpoints").probe()
    Checkpoints(tmp_path / "new" / "folder").probe()
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_failed_save_is_an_error_and_keeps_older_steps(tmp_path, made, monkeypatch):
    recipe, program, state = made
    about = describe_run(recipe.to_dict(), program.spec, program.mesh, {})
    checkpoints = save_steps(tmp_path, made, [1, 2], keep=1)
    assert checkpoints.steps() == [2]
    from orbax.checkpoint._src.serialization import jax_array_handlers

    async def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_shardings", no_space)
    with (
        pytest.raises(CheckpointError, match="saving step 3 .*No space left.*complete step is 2"),
        Checkpoints(tmp_path, keep=1) as failing,
    ):
        failing.save(at_step(state, 3), [DATA], about)
    monkeypatch.undo()
    monkeypatch.setitem(zoo._registered, "toy-lm", TOY)
    restored = Checkpoints(tmp_path).restore(program.state)
    assert int(restored.state.step) == 2


def test_other_arrays_are_refused_all_differences_at_once(tmp_path, made):
    save_steps(tmp_path, made, [1])
    _, program = make({"fsdp": 8}, config={"mlp_size": 64})
    with pytest.raises(CheckpointError, match="does not fit, 6 differences") as caught:
        Checkpoints(tmp_path).restore(program.state)
    assert "params/up: shape [2, 16, 32] in the checkpoint, [2, 16, 64] wanted" in str(caught.value)
    assert (tmp_path / "1").is_dir()  # sound, so not set aside


def test_another_dtype_is_refused(tmp_path, made):
    save_steps(tmp_path, made, [1])
    _, program = make({"fsdp": 8}, param_dtype="bfloat16")
    with pytest.raises(CheckpointError, match="params/up: dtype float32 in the .*, bfloat16 wanted"):
        Checkpoints(tmp_path).restore(program.state)


def test_the_check_refuses_before_arrays_are_read(tmp_path, made, monkeypatch):
    save_steps(tmp_path, made, [1])
    monkeypatch.setattr(checkpoint_module, "load_items", lambda *a: pytest.fail("arrays were read"))

    def check(payload):
        raise CheckpointError(f"not this one: {payload['model']['name']}")

    with pytest.raises(CheckpointError, match="not this one: toy-lm"):
        Checkpoints(tmp_path).restore(made[1].state, check)


def test_config_differences_are_listed(tmp_path, made):
    save_steps(tmp_path, made, [1])
    payload = read_payload(tmp_path / "1")
    assert config_differences(payload, TOY) == []
    other = TOY.with_config(ToyConfig(taps=(1, 3), vocab_size=300))
    assert config_differences(payload, other) == [
        "model.config.taps: [1, 2] in the checkpoint, [1, 3] in the recipe",
        "model.config.vocab_size: 264 in the checkpoint, 300 in the recipe",
    ]


@pytest.mark.parametrize("place", ["run", "checkpoints", "step"])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=["one", "mesh"])
def test_load_model(tmp_path, made, place, mesh):
    directory = tmp_path / "checkpoints"
    save_steps(directory, made, [1, 2])
    path = {"run": tmp_path, "checkpoints": directory, "step": directory / "1"}[place]
    assert find_step(path).name == ("1" if place == "step" else "2")
    model = load_model(path, mesh if mesh is None else make_mesh(mesh))
    assert_same(nnx.state(model, nnx.Param), made[2].params)
    assert model.config == ToyConfig()
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(1, 16)
    assert jnp.isfinite(model(tokens)).all()


def test_load_model_casts_only_when_asked(tmp_path, made, caplog):
    save_steps(tmp_path, made, [1])
    options = ComputeOptions(dtype="bfloat16", param_dtype="bfloat16")
    with pytest.raises(CheckpointError, match="dtype float32 in the checkpoint, bfloat16 wanted"):
        load_model(tmp_path, options=options)
    with caplog.at_level(logging.INFO):
        model = load_model(tmp_path, options=options, allow_cast=True)
    assert model.up[...].dtype == jnp.bfloat16 and model.temperature[...].dtype == jnp.float32
    assert "up: cast from float32 to bfloat16" in caplog.text


def test_load_model_refuses_damage_and_other_folders(tmp_path, made):
    with pytest.raises(CheckpointError, match="holds no Fathom checkpoint"):
        load_model(tmp_path)
    save_steps(tmp_path, made, [1, 2])
    truncate(tmp_path / "2" / "model")
    with pytest.raises(DamagedCheckpointError, match="2 "):
        load_model(tmp_path)
    empty(tmp_path / "2")
    assert find_step(tmp_path).name == "1"
