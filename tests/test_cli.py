"""The command line: what it prints, and above all its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fathom
from fathom import cli, doctor, zoo
from fathom.cli import main
from fathom.cli_logits import check_vocabulary, read_token_ids, write_npz
from fathom.train import loop
from tests.train.small_recipe import SMALL, SPEC, write_recipe

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "v4_tiny"


def test_help_lists_the_commands_and_nothing_else(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands = ["train", "plan", "launch", "logits", "convert", "inspect", "doctor"]
    listed = re.findall(r"^    ([a-z]+) ", text.partition("commands:")[2].partition("Exit codes")[0], re.MULTILINE)
    assert listed == commands
    codes = " ".join(text.partition("Exit codes: ")[2].split())
    assert [int(code) for code in re.findall(r"(?:^|, )(\d+) [a-z]", codes)] == [0, 1, 2, 3, 4, 5, 130]


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fathom 0.")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["train"], ["logits", "x"], ["train", "x", "--wrong"]]
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_the_module_runs_and_jax_stays_out_of_it():
    """--help imports no jax: what the commands need, they import themselves."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('fathom')\n"  # the package's own __init__ is not under test
        f"package.__path__ = [{str(ROOT / 'plugin' / 'fathom')!r}]\n"
        "sys.modules['fathom'] = package\n"
        "from fathom.cli import main\n"
        "assert main(['--help']) == 0\n"
        "import fathom.recipe\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_inspect_asks_first_whether_it_can_write(tmp_path, capsys):
    assert main(["inspect", "no/such/run", "--json", str(tmp_path / "none" / "report.json")]) == 2
    assert "report.json: no folder" in capsys.readouterr().err


def test_python_dash_m_gives_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "fathom", "train", "no-such-recipe"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "tiny-v4-cpu" in done.stderr and "Traceback" not in done.stderr


# --- train ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)
    return write_recipe(tmp_path, SMALL)


def stub_training(monkeypatch, outcome):
    """Replaces the loop by one that returns or raises `outcome`; gives the recipes it got."""
    seen = []

    def train(recipe):
        seen.append(recipe)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(loop, "train", train)
    return seen


def test_train_gives_the_loop_the_recipe_with_overrides(monkeypatch, recipe_file, capsys):
    result = loop.TrainResult(step=7, metrics={"loss": 1.25}, checkpoint_dir="/c")
    seen = stub_training(monkeypatch, result)
    assert main(["train", str(recipe_file), "train.steps=7", "optimizer.learning_rate=1e-2"]) == 0
    assert seen[0].train.steps == 7 and seen[0].optimizer.learning_rate == 0.01
    assert "done at step 7, loss 1.2500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (loop.TrainResult(3, {}, "/c", preempted=True), 3, "stopped early, saved at step 3"),
        (loop.NonFiniteError("step 4: loss nan"), 5, "step 4: loss nan"),
        (OSError("disk full"), 1, "disk full"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_of_train(monkeypatch, recipe_file, capsys, outcome, code, words):
    stub_training(monkeypatch, outcome)
    assert main(["train", str(recipe_file)]) == code
    output = capsys.readouterr()
    assert words in output.out + output.err
    assert "Traceback" not in output.err


def test_debug_shows_the_traceback(monkeypatch, recipe_file, capsys):
    stub_training(monkeypatch, ValueError("here"))
    assert main(["train", str(recipe_file), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_problem_of_a_recipe_at_once_before_the_loop(monkeypatch, recipe_file, capsys):
    seen = stub_training(monkeypatch, None)
    arguments = ["train.stepz=5", "mesh.fsdp=three", "data.packing=tight", "model.config.taps=1"]
    assert main(["train", str(recipe_file), *arguments]) == 2
    text = capsys.readouterr().err
    for words in ("train.stepz", "train.steps?", "mesh.fsdp", "data.packing", "model.config.taps"):
        assert words in text
    assert not seen


def test_an_impossible_recipe_exits_with_2(recipe_file, capsys):
    """The real loop refuses it, before it compiles anything."""
    assert main(["train", str(recipe_file), "mesh.data=3", "train.eval_every=2"]) == 2
    text = capsys.readouterr().err
    assert "which needs 6 devices" in text and "8, the number of devices" in text
    assert "train.eval_every" in text and "Traceback" not in text


# --- logits --------------------------------------------------------------------------------------


def save_ids(folder, array):
    path = folder / "ids.npy"
    np.save(path, array)
    return path


def test_token_ids_of_one_row_or_several(tmp_path):
    assert read_token_ids(save_ids(tmp_path, np.arange(5, dtype=np.uint8))).shape == (1, 5)
    assert read_token_ids(save_ids(tmp_path, np.zeros((2, 3), np.int64))).shape == (2, 3)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.float32), "dtype float32"),
        (np.zeros((2, 3, 4), np.int32), r"shape \(2, 3, 4\)"),
        (np.zeros((0,), np.int32), "at least one token"),
        (np.array([[1, 2], [3, -4]]), "row 1, position 1 holds token id -4"),
        (np.array([None]), "not a readable .npy"),
    ],
)
def test_token_ids_that_are_refused(tmp_path, array, words):
    with pytest.raises(cli.ArgumentProblem, match=words):
        read_token_ids(save_ids(tmp_path, array))


def test_token_ids_outside_the_vocabulary_name_the_first_one():
    ids = np.array([[0, 9], [10, 11]])
    assert check_vocabulary(ids, 12, "x").dtype == np.int32
    with pytest.raises(cli.ArgumentProblem, match=r"row 1, position 0 .* 10 \(2 such ids\)"):
        check_vocabulary(ids, 10, "x")


def test_an_npz_is_complete_or_not_there(tmp_path):
    path = tmp_path / "out.npz"
    write_npz(path, {"a": np.ones(3, np.float32)})

    class Broken:
        def __array__(self, *args, **kwargs):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_npz(path, {"a": np.zeros(3), "b": Broken()})
    assert np.load(path)["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_logits_of_the_golden_case(tmp_path, capsys):
    expected = np.load(GOLDEN / "expected_plain.npz")
    ids = save_ids(tmp_path, expected["input_ids"][:1, :24])
    out = tmp_path / "out.npz"
    arguments = ["logits", str(GOLDEN), "--tokens", str(ids), "--out", str(out), "--streams"]
    assert main(arguments) == 0, capsys.readouterr().err
    found = np.load(out)
    assert set(found) == {"logits", "mtp_logits"} | {f"hidden_streams_{i}" for i in range(6)}
    assert all(found[name].dtype == np.float32 for name in found)
    # The model is causal, so a shorter row gives the same beginning.
    np.testing.assert_allclose(found["logits"], expected["logits"][:1, :24], atol=2e-5, rtol=0)
    last = "hidden_streams_5"
    np.testing.assert_allclose(found[last], expected[last][:1, :24], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ({"path": "/no/such/checkpoint"}, "no such file or folder"),
        ({"out": "/no/such/folder/out.npz"}, "folder that exists"),
        ({"tokens": "/no/such/ids.npy"}, "not a readable .npy"),
    ],
)
def test_bad_paths_of_logits_exit_with_2(tmp_path, capsys, replace, words):
    paths = {
        "path": str(GOLDEN),
        "tokens": str(save_ids(tmp_path, np.zeros(4, np.int32))),
        "out": str(tmp_path / "o.npz"),
    }
    paths |= replace
    arguments = ["logits", paths["path"], "--tokens", paths["tokens"], "--out", paths["out"]]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists()


def test_ids_outside_the_vocabulary_exit_with_2(tmp_path, capsys, monkeypatch):
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=160))
    monkeypatch.setattr(fathom, "load", lambda *args, **keywords: model)
    ids = save_ids(tmp_path, np.full((1, 4), 160))
    arguments = ["logits", str(GOLDEN), "--tokens", str(ids), "--out", str(tmp_path / "o.npz")]
    assert main(arguments) == 2
    assert "token id 160" in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists()


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_prints_and_writes_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["inspect", str(GOLDEN), "--json", str(path)]) == 0
    assert "problems    none" in capsys.readouterr().out
    assert json.loads(path.read_text())["tensors"] == 357


def test_inspect_of_a_recipe_prints_all_its_keys(tmp_path, capsys):
    assert main(["inspect", "v4-flash-64k-v5p", "--json", str(tmp_path / "recipe.json")]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    recipe = fathom.load_recipe("v4-flash-64k-v5p")
    assert fathom.load_recipe(tmp_path / "again.yaml") == recipe
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe.to_dict()


def test_inspect_of_nothing(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected a Hub-format folder" in capsys.readouterr().err


# --- doctor --------------------------------------------------------------------------------------

SOUND = {
    "fathom-jax": "0.1.0",
    "jax": "0.12.0.1",
    "jaxlib": "0.12.0.1",
    "flax": "0.12.12",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "grain": "0.2.18",
    "numpy": "2.4.0",
    "ml_dtypes": "0.6.0",
    "pydantic": "2.14.3",
}
OLDER = SOUND | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


@pytest.mark.parametrize("versions", [SOUND, OLDER])
def test_the_lanes_we_support_are_sound(versions):
    assert doctor.check_versions(versions, ["cpu"]) == []


@pytest.mark.parametrize(
    ("change", "platform", "level", "words"),
    [
        ({"jax": "0.11.0", "jaxlib": "0.11.0", "flax": "0.12.8"}, "cpu", "bad", "jax 0.11.0"),
        ({"jax": "0.10.1", "jaxlib": "0.10.1", "flax": "0.12.8"}, "cpu", "bad", "older than"),
        ({"jaxlib": "0.11.1"}, "cpu", "bad", "in pairs"),
        ({"flax": "0.12.8"}, "cpu", "bad", "flax 0.12.8 cannot work with jax 0.12.0.1"),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "cpu", "bad", "needs jax >= 0.11.1"),
        (OLDER, "gpu", "warn", "scatter-add"),
        ({"jax-cuda13-plugin": "0.10.2"}, "gpu", "bad", "jax-cuda13-plugin 0.10.2"),
    ],
)
def test_known_bad_combinations(change, platform, level, words):
    findings = doctor.check_versions(SOUND | change, [platform])
    matching = [f for f in findings if words in f.text]
    assert len(matching) == 1 and matching[0].level == level and matching[0].fix


def test_a_libtpu_of_another_jax(monkeypatch):
    monkeypatch.setattr(doctor, "libtpu_of_jax", lambda: "0.0.50.")
    assert not doctor.check_versions(SOUND | {"libtpu": "0.0.50.1"}, ["tpu"])
    (finding,) = doctor.check_versions(SOUND | {"libtpu": "0.0.42"}, ["tpu"])
    assert finding.level == "bad" and "libtpu==0.0.50.*" in finding.fix
    assert doctor.check_versions(SOUND | {"libtpu": "0.0.42"}, ["cpu"])[0].level == "warn"


def test_a_missing_package():
    versions = {name: v for name, v in SOUND.items() if name != "optax"}
    (finding,) = doctor.check_versions(versions, ["cpu"])
    assert finding == ("bad", "optax is not installed", "pip install optax")


def test_versions_compare_as_numbers():
    assert doctor.version_of("0.12.0.1") == (0, 12, 0, 1)
    assert doctor.version_of("2.14rc1.3") == (2, 14)
    assert doctor.version_of("0.10.2") > doctor.version_of("0.9.11")


def test_doctor_here(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "8 x cpu" in text and "ok    jax " in text and "host memory" in text
    broken = doctor.Finding("bad", "everything", "start over")
    monkeypatch.setattr(doctor, "KNOWN_BAD", (lambda versions, platforms: broken,))
    assert main(["doctor"]) == 1
    assert "bad   everything\n      -> start over" in capsys.readouterr().out
