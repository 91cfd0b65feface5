"""`fathom launch --on tpu-vm`: what the hosts are told runs in a shell; gcloud, uv and the run are stand-ins."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fathom.launch import tpu_vm
from fathom.recipe import load_recipe
from tests.launch import test_clusters
from tests.launch.test_clusters import VM_OPTIONS, calls, dry_run, install_tool, launch

no_tools = test_clusters.no_tools

HOSTS = 2
# There is nothing at first; then a queue, then hosts. `calls` are those so far. BREAKS: the connection does so once, as
# soon as the run has been started, and gcloud tries again.
GCLOUD = """
import os, shutil, subprocess
verb, words = calls[-1][3], calls[-1]
described = sum(call[3] == "describe" for call in calls)
if verb == "describe":
    if not any(call[3] == "create" for call in calls):
        sys.exit("ERROR: NOT_FOUND: no such resource")
    print("ACTIVE" if described > 3 else "WAITING_FOR_RESOURCES")
homes = [log.parent / f"host{i}" for i in range(HOSTS)] if "--worker=all" in words else [log.parent / "host0"]
if verb == "scp":
    for home in homes:
        shutil.copy(words[4], home / words[5].partition(":")[2])
if verb == "ssh":
    command = words[-1].removeprefix("--command=")
    for _ in range(2 if "setsid" in command and BREAKS else 1):
        for home in homes:
            home.mkdir(exist_ok=True)
            environment = {"HOME": str(home), "PATH": f"{log.parent}/there:/usr/bin:/bin"}
            if code := subprocess.run(["/bin/sh", "-c", command], cwd=home, env=environment).returncode:
                sys.exit(code)
"""
# What a host has: Python, which knows how to get uv; uv, which makes an environment; its Python, which trains until
# SIGTERM.
THERE = {
    "python3": """#!/bin/sh
[ "$*" = "-m pip install --user uv" ] || exit 9
cd "$(dirname "$0")" && mkdir -p ~/.local/bin && cp uv trains ~/.local/bin
""",
    "uv": """#!/bin/sh
echo "$@" >> ~/uv.log
[ "$1" != venv ] || { mkdir -p ~/fathom-env/bin && cp ~/.local/bin/trains ~/fathom-env/bin/python; }
case "$*" in *broken*) exit 7 ;; esac
""",
    "trains": """#!/bin/sh
trap 'echo saved; exit 3' TERM
printf '%s\n' "$LIBTPU_INIT_ARGS" > ~/variable
echo "$@" >> ~/started
for i in $(seq 600); do sleep 0.05; done
""",
}


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Makes the stand-ins, and ends what they have started. The log of gcloud's calls; breaks: see GCLOUD."""
    monkeypatch.setattr(tpu_vm, "POLL_SECONDS", 0)
    (tmp_path / "there").mkdir()
    for name, text in THERE.items():
        (tmp_path / "there" / name).write_text(text)
        (tmp_path / "there" / name).chmod(0o755)
    yield lambda breaks=False: install_tool(tmp_path, "gcloud", f"HOSTS, BREAKS = {HOSTS}, {breaks}\n{GCLOUD}")
    for pid in tmp_path.glob("host*/fathom-run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def verbs(log):
    return [arguments[3] for arguments, _ in calls(log)]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def homes(folder: Path) -> list[Path]:
    return [folder / f"host{i}" for i in range(HOSTS)]


def in_shell(script, folder):
    path = f"{folder / 'bin'}:{os.defpath}"
    # Were the run to hold the pipes, as ssh's would be, this would wait for its end.
    return subprocess.run(["/bin/sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("how", ["run", "script"])
def test_a_run_from_its_start_to_its_resumption(recipe, capfd, tmp_path, gcloud, how):
    """The commands that are run, and the script that --dry-run prints, do the same."""
    log, source = gcloud(breaks=True), recipe("v5p:4x4x4")
    script = dry_run(capfd, "tpu-vm", source, *VM_OPTIONS)
    assert calls(log) == []

    def once_more():
        if how == "run":
            return launch("tpu-vm", source, *VM_OPTIONS), "".join(capfd.readouterr())
        done = in_shell(script, tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, said = once_more()
    assert code == 0, said
    assert [v for v in verbs(log) if v != "describe"] == ["create", "ssh", "ssh", "ssh"]
    assert verbs(log)[:2] == ["describe", "create"] and verbs(log)[2:].count("describe") >= 3
    assert all({"--project=p", "--zone=z"} <= set(a) and a[4] == "my-run-1" for a, _ in calls(log))
    (create,) = [arguments for arguments, _ in calls(log) if arguments[3] == "create"]
    wanted = {"--type=v5p", "--topology=4x4x4", "--node-id=my-run-1", "--runtime-version=v2-alpha-tpuv5"}
    assert wanted <= set(create)
    assert all({"--node=all", "--worker=all"} <= set(a) for a, _ in calls(log) if a[3] == "ssh")

    # Once on each host, though gcloud has tried twice: with the recipe, by the environment's Python.
    wait_for(lambda: all((home / "started").exists() for home in homes(tmp_path)))
    for home in homes(tmp_path):
        (started,) = (home / "started").read_text().splitlines()
        assert started.startswith(f"-m fathom train {home}/fathom-run/recipe-")
        assert load_recipe(started.split()[-1]) == load_recipe(source)
        made, installed = (home / "uv.log").read_text().splitlines()
        assert made == f"venv --allow-existing --python 3.12 {home}/fathom-env"
        where = f"--python {home}/fathom-env/bin/python"
        assert installed == f"pip install {where} --reinstall-package fathom-jax fathom-jax[tpu]"

    # Another launch is refused, and changes nothing; also one of another recipe.
    code, said = once_more()
    assert code == 1 and "a run is going on here; nothing was changed" in said
    assert launch("tpu-vm", source, *VM_OPTIONS, "train.steps=7") == 1
    assert "what runs on hosts is stopped by gcloud compute tpus queued-resources ssh" in capfd.readouterr().err
    for home in homes(tmp_path):
        assert len(list((home / "fathom-run").glob("recipe-*"))) == 1
        assert len((home / "uv.log").read_text().splitlines()) == 2

    # What is printed stops it; it saves, and the log has the exit code. Then the same launch resumes.
    (stop,) = [line.partition(": ")[2] for line in script.splitlines() if line.startswith("# stop it")]
    assert in_shell(stop, tmp_path).returncode == 0
    logs = [home / "fathom-run" / "log" for home in homes(tmp_path)]
    wait_for(lambda: all("ended with exit code 3" in path.read_text() for path in logs))
    assert all("saved" in path.read_text() for path in logs)
    assert "nothing runs here" in in_shell(stop, tmp_path).stdout
    code, said = once_more()
    assert code == 0, said
    wait_for(lambda: all(len((home / "started").read_text().splitlines()) == 2 for home in homes(tmp_path)))
    assert all((home / "uv.log").read_text().count("venv") == 1 for home in homes(tmp_path))


def test_the_run_outlives_what_started_it(recipe, capfd, tmp_path, gcloud):
    """A session of its own, so that no terminal's or connection's end reaches it."""
    gcloud()
    assert launch("tpu-vm", recipe("v5p:4x4x4"), *VM_OPTIONS) == 0
    out = capfd.readouterr().out
    assert "my-run-1 has been started on 16 hosts and goes on there by itself" in out
    for what in ("follow it: ", "stop it, after a checkpoint: ", "delete the hosts: "):
        (line,) = [line for line in out.splitlines() if line.startswith(what)]
        assert {"my-run-1", "--project=p", "--zone=z"} <= set(shlex.split(line))
    (follow,) = [shlex.split(line) for line in out.splitlines() if line.startswith("follow it")]
    assert follow[-3:] == ["--node=0", "--worker=0", "--command=tail -n 100 -F ~/fathom-run/log"]
    pids = [home / "fathom-run" / "pid" for home in homes(tmp_path)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
    assert all(os.getsid(int(path.read_text())) != os.getsid(0) for path in pids)


def test_a_launch_that_came_between_starts_nothing(recipe, capfd, tmp_path, gcloud):
    gcloud()
    first, second = (dry_run(capfd, "tpu-vm", recipe("v5p:4x4x4"), *VM_OPTIONS, f"train.steps={n}") for n in (5, 6))
    lines = [line for line in first.splitlines() if not line.startswith("#")]
    assert in_shell("\n".join(lines[:-1]), tmp_path).returncode == 0
    prepare = second.splitlines()[len(lines) - 3]
    assert "base64" in prepare and in_shell(prepare, tmp_path).returncode == 0
    done = in_shell(lines[-1], tmp_path)
    assert done.returncode == 1 and "another launch came between; nothing was started" in done.stderr
    assert not (tmp_path / "host0" / "started").exists()


@pytest.mark.parametrize(
    ("install", "installed"),
    [
        ("dist/fathom_jax-0.1.0-py3-none-any.whl", "{home}/fathom-run/fathom_jax-0.1.0-py3-none-any.whl"),
        ("git+https://host/owner/fathom@main", "git+https://host/owner/fathom@main"),
        ("fathom-jax[tpu,wandb] @ https://host/f.whl", "fathom-jax[tpu,wandb] @ https://host/f.whl"),
        ("fathom-jax[tpu]==0.1.0", "fathom-jax[tpu]==0.1.0"),
    ],
)
def test_what_is_installed(recipe, tmp_path, monkeypatch, gcloud, install, installed):
    log = gcloud()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fathom_jax-0.1.0-py3-none-any.whl").write_text("a wheel")
    assert launch("tpu-vm", recipe("v5p:4x4x4"), *VM_OPTIONS, "--install", install) == 0
    assert verbs(log).count("scp") == install.startswith("dist/")
    for home in homes(tmp_path):
        # The TPU's library comes with it, whatever is named.
        assert (home / "uv.log").read_text().endswith(f" fathom-jax {installed.format(home=home)} fathom-jax[tpu]\n")
        assert (home / "fathom-run" / Path(install).name).exists() == install.startswith("dist/")


def test_an_installation_that_fails_starts_nothing(recipe, capfd, tmp_path, gcloud):
    gcloud()
    assert launch("tpu-vm", recipe("v5p:4x4x4"), *VM_OPTIONS, "--install", "broken") == 1
    assert "failed with exit code 7" in capfd.readouterr().err
    assert not (tmp_path / "host0" / "started").exists()


# Quotes, and what would end or change the shell around it.
SETUP = """test -e uv.log && ! test -e started && mkdir -p "my data" && echo 'a $HOME' > "my data/text"; exit # so"""


@pytest.mark.parametrize("how", ["run", "script"])
def test_hosts_are_set_up_before_the_start(recipe, capfd, tmp_path, gcloud, how):
    """Once they have been installed; and the run gets its variables."""
    log = gcloud()
    arguments = [recipe("v5p:4x4x4"), *VM_OPTIONS, "--setup", SETUP, "--env", "LIBTPU_INIT_ARGS=--a='b c' --d=$e"]
    if how == "run":
        assert launch("tpu-vm", *arguments) == 0
    else:
        done = in_shell(dry_run(capfd, "tpu-vm", *arguments), tmp_path)
        assert done.returncode == 0, done.stderr
    assert verbs(log).count("ssh") == 4
    for home in homes(tmp_path):
        wait_for((home / "started").exists)
        assert (home / "my data" / "text").read_text() == "a $HOME\n"
        assert (home / "variable").read_text() == "--a='b c' --d=$e\n"


def test_a_setup_that_fails_starts_nothing(recipe, capfd, tmp_path, gcloud):
    gcloud()
    assert launch("tpu-vm", recipe("v5p:4x4x4"), *VM_OPTIONS, "--setup", "echo the reason >&2; exit 7") == 1
    err = capfd.readouterr().err
    assert "the reason\n" in err and "--setup failed with exit code 7; nothing was started here" in err
    assert "failed with exit code 7; its own message is above" in err
    assert not (tmp_path / "host0" / "started").exists()


@pytest.mark.parametrize(
    ("install", "words"),
    [
        ("pip install fathom", "--install is 'pip install fathom', expected a wheel here (dist/....whl), a URL (git+"),
        ("--pre", "--install is '--pre', expected"),
        ("", "--install is '', expected"),
        ("dist/none.whl", "--install: there is no wheel dist/none.whl; build it"),
    ],
)
def test_what_cannot_be_installed(recipe, capsys, tmp_path, nothing_starts, install, words):
    install_tool(tmp_path, "gcloud", "")
    for mode in ([], ["--dry-run"]):
        assert launch("tpu-vm", recipe("v6e:4x4"), *VM_OPTIONS, f"--install={install}", *mode) == 2
        out, err = capsys.readouterr()
        assert words in err and out == ""


def test_several_slices_of_hosts(recipe, capsys):
    lines = dry_run(capsys, "tpu-vm", recipe("2*v5e:4x4"), *VM_OPTIONS, "--spot", "--runtime", "r").splitlines()
    nodes = "--node-count=2 --node-prefix=my-run-1 --spot"
    assert f"--type=v5litepod --topology=4x4 --runtime-version=r {nodes}" in lines[1]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('FAILED')", "queued resource my-run-1 is FAILED and will not become ACTIVE; look at it with gcloud"),
        ("sys.exit('ERROR: PERMISSION_DENIED')", "failed with exit code 1: ERROR: PERMISSION_DENIED"),
        ("print('ACTIVE') if calls[-1][3] == 'describe' else sys.exit(255)", "failed with exit code 255"),
    ],
)
def test_hosts_that_do_not_come(recipe, capsys, tmp_path, code, words):
    log = install_tool(tmp_path, "gcloud", code)
    assert launch("tpu-vm", recipe("v6e:4x4"), *VM_OPTIONS) == 1
    assert words in capsys.readouterr().err
    assert verbs(log).count("ssh") <= 1 and "create" not in verbs(log)
