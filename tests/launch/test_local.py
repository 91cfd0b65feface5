"""`fathom launch --on local`: processes that train, are preempted and go on as others; and ones that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import yaml

from fathom import host_memory as memory
from fathom import zoo
from fathom.cli import main
from fathom.launch import local
from fathom.recipe import load_recipe
from fathom.step_folder import read_payload
from fathom.train.metrics import read_metrics
from tests.train import runs, toy_model
from tests.train.small_recipe import SMALL, SPEC, changed, write_recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="looks for processes that were left behind in /proc, which only Linux has"
)


def processes_of(launcher: int) -> dict[int, int]:
    """JAX_PROCESS_ID -> process, of those whose environment names the launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
        except (OSError, UnicodeDecodeError):
            continue
        if environ.get("FATHOM_LAUNCHER_PID") == str(launcher):
            found[int(environ.get("JAX_PROCESS_ID", 0))] = int(folder.name)
    return found


def wait_for(condition, seconds=120, every=0.05):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    pytest.fail(f"nothing after {seconds} s")


# --- The rehearsal -------------------------------------------------------------------------------


class Launch:
    """A launch of a recipe, as a process of its own."""

    def __init__(self, recipe, hosts, folder, *overrides):
        self._log = folder / f"launch-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "fathom", "launch", str(recipe), "--on", "local", "--hosts", str(hosts)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *overrides],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self, seconds=240) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            self.process.kill()

    @property
    def output(self) -> str:
        return self._log.read_text()


def recipe_for(folder, name, values):
    values = {**values, "metrics": {"directory": str(folder / name), "tensorboard": False}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def steps_of(folder, name):
    try:
        return read_metrics(folder / name)
    except (OSError, ValueError):
        return []


def rehearse(folder, values, steps, stop_after):
    """Two processes straight through; two of which one gets SIGTERM, then four. Gives both runs' metrics."""
    straight, broken = recipe_for(folder, "straight", values), recipe_for(folder, "broken", values)
    launch = Launch(straight, 2, folder)
    assert launch.finish(1200) == 0, launch.output

    launch = Launch(broken, 2, folder)
    wait_for(lambda: len(processes_of(launch.process.pid)) == 2 or launch.process.poll() is not None)
    started = processes_of(launch.process.pid)
    assert sorted(started) == [0, 1], launch.output
    wait_for(lambda: len(steps_of(folder, "broken")) >= stop_after or launch.process.poll() is not None, 900)
    assert launch.process.poll() is None, launch.output
    os.kill(started[1], signal.SIGTERM)
    assert launch.finish() == 3, launch.output
    assert not processes_of(launch.process.pid)
    (stopped,) = {
        int(line.split(" at step ")[1].split(",")[0]) for line in launch.output.splitlines() if "stopped early" in line
    }
    assert launch.output.count(f"stopped early, saved at step {stopped}") == 2  # and one with a prefix:
    assert f"[1] broken: stopped early, saved at step {stopped}" in launch.output
    assert stop_after <= stopped < steps
    states = read_payload(folder / "broken" / "checkpoints" / str(stopped))["data_states"]
    assert [(s["shard_index"], s["shard_count"], s["step"]) for s in states] == [(i, 2, stopped) for i in range(2)]

    launch = Launch(broken, 4, folder)
    assert launch.finish(1200) == 0, launch.output
    assert f"resuming after step {stopped}" in launch.output
    return steps_of(folder, "straight"), steps_of(folder, "broken")


def assert_same_curves(straight, broken, steps):
    assert [e["step"] for e in straight] == [e["step"] for e in broken] == list(range(1, steps + 1))
    assert [e["batch_hash"] for e in straight] == [e["batch_hash"] for e in broken]
    assert len({e["batch_hash"] for e in straight}) == steps
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in broken] == pytest.approx([e[name] for e in straight], rel=1e-5, abs=0), name


def test_a_rehearsal_is_preempted_and_goes_on_with_twice_as_many_processes(tmp_path):
    """SIGTERM to one of two: both stop at the same step, exit code 3. Four go on: same data, losses within 1e-5."""
    toy_model.install(tmp_path)
    runs.write_text(tmp_path / "text", files=12)
    values = {
        "model": {"name": "toy-lm", "dtype": "float32"},
        "data": {"path": str(tmp_path / "text"), "sequence_length": 32, "batch_size": 8, "shuffle_rows": 20},
        "optimizer": {"learning_rate": 1e-3},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2, "simulated_devices": 8},
        "train": {"steps": 100},
        "checkpoint": {"every": 50},
    }
    straight, broken = rehearse(tmp_path, values, 100, 10)
    assert_same_curves(straight, broken, 100)


@pytest.mark.slow
def test_the_tiny_v4_goes_on_with_twice_as_many_processes(tmp_path):
    """tiny-v4-cpu on its eight devices, with each kind of layer once, and MTP. About ten minutes on two cores."""
    layers = {
        "attention_kinds": ["sliding", "csa", "hca"],
        "compress_ratios": [0, 4, 16],
        "router_kinds": ["hash", "learned", "learned"],
    }
    values = {
        "extends": "tiny-v4-cpu",
        "model": {"config": layers},
        "optimizer": {"warmup_steps": 2, "decay_steps": 0},
        "data": {"shuffle_rows": 64, "max_bytes": 2_000_000, "sequence_length": 128},
        "train": {"steps": 8, "eval_every": 0, "log_every": 1},
    }
    straight, broken = rehearse(tmp_path, values, 8, 2)
    assert_same_curves(straight, broken, 8)


# --- Processes that misbehave --------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Makes the processes ones that run a few lines of Python, in which `i` is their number."""

    def set_code(code):
        script = tmp_path / "process.py"
        begin = f"""
            import os, signal, subprocess, sys, time
            i = int(os.environ.get('JAX_PROCESS_ID', 0))
            def ready():
                open({str(tmp_path)!r} + f"/ready-{{i}}", "w").close()
        """
        script.write_text(textwrap.dedent(begin) + textwrap.dedent(code))
        monkeypatch.setattr(local.Processes, "_command", lambda self: [sys.executable, str(script), *self._arguments])

    return set_code


def run(hosts=3, grace=20.0):
    begin = time.monotonic()
    code = local.run(["recipe"], hosts, grace)
    assert not processes_of(os.getpid())
    return code, time.monotonic() - begin


def test_output_names_its_process(pretend, capfd):
    pretend("print('out', sys.argv[1:], flush=True); print('err', file=sys.stderr)")
    assert run()[0] == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[1] out ['recipe']", "[2] out ['recipe']", "out ['recipe']"]
    assert sorted(err.splitlines()) == ["[1] err", "[2] err", "err"]


def test_variables_reach_every_process(pretend, recipe_file, capfd):
    pretend("print(os.environ['PRICE'], flush=True)")
    assert main(["launch", str(recipe_file), "--on", "local", "--hosts", "2", "--env", "PRICE=$5 a=b"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["$5 a=b", "[1] $5 a=b"]


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit(0 if i else 3)", 3, ""),
        ("sys.exit(2)", 2, "failed with exit code 2; its last lines"),
        ("sys.exit(4)", 4, "failed with exit code 4; its last lines"),
        ("sys.exit(5)", 5, "failed with exit code 5; its last lines"),
        ("if i == 1: print('the reason'); sys.exit(1)\ntime.sleep(100)", 1, "process 1 of 3 failed with exit code 1"),
        ("if i == 2: os.kill(os.getpid(), 9)\ntime.sleep(100)", 1, "process 2 of 3 was ended by SIGKILL; its last"),
    ],
)
def test_exit_codes(pretend, capfd, code, expected, words):
    pretend(code)
    found, seconds = run()
    assert found == expected and seconds < 60
    err = capfd.readouterr().err
    assert words in err
    assert ("  the reason" in err) == ("the reason" in code)


def test_a_process_that_does_not_end_is_killed_with_what_it_has_started(pretend, capfd, tmp_path):
    pretend(
        f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if i == 0:
            while not all(os.path.exists({str(tmp_path)!r} + f"/ready-{{k}}") for k in (1, 2)):
                time.sleep(0.05)
            sys.exit(1)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        with open({str(tmp_path)!r} + f"/child-{{i}}", "w") as file:
            file.write(str(child.pid))
        ready()
        time.sleep(100)
        """
    )
    found, seconds = run(grace=3.0)
    assert found == 1 and seconds < 60
    assert "process 0 of 3 failed with exit code 1" in capfd.readouterr().err
    for i in (1, 2):
        child = Path("/proc") / (tmp_path / f"child-{i}").read_text() / "stat"
        wait_for(lambda child=child: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z", 10)


def test_processes_that_outlive_a_sound_end_are_told(pretend, capfd):
    pretend("if i < 2: time.sleep(100)")
    assert run(grace=1.0)[0] == 1
    assert "processes 0, 1 of 3 had to be killed, 1 s after the first had ended" in capfd.readouterr().err


def send_later(folder, number, times=1):
    """Sends this process, the launcher, a signal once all three processes are ready for one."""

    def send():
        wait_for(lambda: len(list(folder.glob("ready-*"))) == 3, 60)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("number", "code", "expected", "words"),
    [
        (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *a: sys.exit(3))", 3, ""),
        (signal.SIGTERM, "", 1, "was ended by SIGTERM before it could save"),
        (signal.SIGINT, "", 130, "interrupted"),
    ],
    ids=["saved", "not saved", "interrupted"],
)
def test_signals_are_passed_on(pretend, capfd, tmp_path, number, code, expected, words):
    pretend(code + "\nready()\ntime.sleep(100)")
    before = signal.getsignal(number)
    thread = send_later(tmp_path, number)
    found, seconds = run()
    thread.join()
    assert found == expected and seconds < 60
    assert words in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_signal_kills(pretend, tmp_path):
    pretend("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(100)")
    thread = send_later(tmp_path, signal.SIGTERM, times=2)
    found, seconds = run()
    thread.join()
    assert found == 1 and seconds < 60


def test_a_launcher_that_is_killed_leaves_none_behind(tmp_path):
    """Real launcher and `fathom.launch.rank`; in place of training a module that sleeps and does not mind SIGTERM."""
    driver = textwrap.dedent(
        """
        import sys
        from fathom.launch import local
        stub = (
            "import signal, sys, time, types\\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
            "cli = types.ModuleType('fathom.cli')\\n"
            "cli.main = lambda argv: time.sleep(200)\\n"
            "sys.modules['fathom.cli'] = cli\\n"
            "from fathom.launch import rank\\n"
            "rank.SAVE_SECONDS = 1.0\\n"
            "print('watching', flush=True)\\n"
            "rank.main()\\n"
        )
        local.Processes._command = lambda self: [sys.executable, "-c", stub]
        local.run([], 2, 10.0)
        """
    )
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen([sys.executable, "-c", driver], stdout=file)
    try:
        wait_for(lambda: log.read_text().count("watching") == 2)
        assert len(processes_of(launcher.pid)) == 2
        time.sleep(1)
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not processes_of(launcher.pid), 30)


# --- What is refused -----------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)
    return write_recipe(tmp_path, changed(SMALL, {"mesh.simulated_devices": 8}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "3"], "mesh.simulated_devices: found 8; expected a multiple of 3, which the processes share; fix"),
        (["--hosts", "0"], "--hosts is 0, expected at least 1"),
        (["--hosts", "2", "mesh.simulated_devices=null"], "mesh.simulated_devices: found nothing; expected a"),
        (["--hosts", "2", "mesh.simulated_devices=4"], "expected 8, the product of the mesh axes"),
        (["--hosts", "2", "train.stepz=3"], "did you mean train.steps?"),
        (["--hosts", "2", "--image", "x"], "--image: not for --on local, which takes --env, --grace"),
        (["--dry-run", "checkpoint.directory=gs://BUCKET/a"], "'gs://BUCKET/a', a placeholder; expected a bucket of"),
        (["mesh.simulated_devices=null", "data.path=gs://BUCKET/a"], "data.path: found 'gs://BUCKET/a', a placeholder"),
        (["--grace", "0"], "--grace is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_rehearsed(recipe_file, nothing_starts, capsys, arguments, words):
    assert main(["launch", str(recipe_file), "--on", "local", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == ""


@pytest.mark.parametrize("mode", [["--hosts", "2"], ["--hosts", "1", "--dry-run"]])
def test_a_model_that_this_machine_cannot_hold(recipe_file, nothing_starts, monkeypatch, capsys, mode):
    recipe = load_recipe(recipe_file)
    needed = recipe.model_spec().num_params(recipe.model_spec().config).total * 12  # AdamW, all in float32
    monkeypatch.setattr(local, "host_memory", lambda: needed - 1)
    assert main(["launch", str(recipe_file), "--on", "local", *mode]) == 2
    out, err = capsys.readouterr()
    assert "mesh.simulated_devices: found 8, which share this machine's" in err and out == ""
    assert "8 bytes of moments" in err and "take a smaller model" in err
    for enough in (needed, None):
        monkeypatch.setattr(local, "host_memory", lambda enough=enough: enough)
        assert main(["launch", str(recipe_file), "--on", "local", "--dry-run"]) == 0


def test_the_memory_of_this_machine(monkeypatch, tmp_path):
    """Of its container, where that has less."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", limit)
    whole = memory.host_memory()
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 2**28
    for text, expected in (("max\n", whole), ("4096\n", 4096), (f"{2 * whole}\n", whole)):
        limit.write_text(text)
        assert memory.host_memory() == expected


def test_a_dry_run_prints_a_line_for_each_process(recipe_file, nothing_starts, capsys):
    assert main(["launch", str(recipe_file), "--on", "local", "--hosts", "2", "--dry-run", "train.steps=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    address = lines[0].split()[0]
    assert address.startswith("JAX_COORDINATOR_ADDRESS=localhost:")
    end = f"{sys.executable} -m fathom train {recipe_file} train.steps=5"
    assert lines == [f"{address} JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} {end}" for i in range(2)]
    assert main(["launch", str(recipe_file), "--on", "local", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{sys.executable} -m fathom train {recipe_file}\n"
