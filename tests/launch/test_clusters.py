"""`fathom launch` onto clusters: manifests and commands that are exact, and refusals before anything is started."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fathom.cli import main
from fathom.cli_problem import ArgumentProblem
from fathom.launch import jobset, xpk
from fathom.recipe import load_recipe
from fathom.topology import parse_topology

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())


def problems(manifest) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]


# topology: slices, hosts a slice, chips a host, node labels, xpk's type, devices
SLICES = {
    "v4:2x2x1": (1, 1, 4, "tpu-v4-podslice", "2x2x1", "v4-2x2x1", 4),
    "v4:2x2x4": (1, 4, 4, "tpu-v4-podslice", "2x2x4", "v4-2x2x4", 16),
    "v5e:4x4": (1, 4, 4, "tpu-v5-lite-podslice", "4x4", "v5litepod-4x4", 16),
    "v5e:16x16": (1, 64, 4, "tpu-v5-lite-podslice", "16x16", "v5litepod-16x16", 256),
    "v5p:4x4x4": (1, 16, 4, "tpu-v5p-slice", "4x4x4", "v5p-4x4x4", 64),
    "v5p:8x8x8": (1, 128, 4, "tpu-v5p-slice", "8x8x8", "v5p-8x8x8", 512),
    "v6e:1x1": (1, 1, 1, "tpu-v6e-slice", "1x1", "v6e-1x1", 1),
    "v6e:16x16": (1, 64, 4, "tpu-v6e-slice", "16x16", "v6e-16x16", 256),
    "tpu7x:2x2x1": (1, 1, 4, "tpu7x", "2x2x1", "tpu7x-2x2x1", 8),
    "tpu7x:4x4x4": (1, 16, 4, "tpu7x", "4x4x4", "tpu7x-4x4x4", 128),
    "2*v6e:4x8": (2, 8, 4, "tpu-v6e-slice", "4x8", "v6e-4x8", 64),
    "4*v5p:4x4x4": (4, 16, 4, "tpu-v5p-slice", "4x4x4", "v5p-4x4x4", 256),
}
VM_OPTIONS = ["--project", "p", "--zone", "z"]
TARGETS = {
    "jobset": ["--image", "registry/fathom:1"],
    "xpk": ["--image", "registry/fathom:1", "--cluster", "c"],
    "tpu-vm": VM_OPTIONS,
}


@pytest.fixture(autouse=True)
def no_tools(monkeypatch, tmp_path):
    """None of the clusters' tools is on PATH, whatever this machine has."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def launch(target, *arguments):
    return main(["launch", *arguments, "--on", target])


def dry_run(capsys, target, *arguments):
    code = launch(target, *arguments, "--dry-run")
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def install_tool(folder: Path, name: str, code: str) -> Path:
    """A program that appends what it gets to <name>.log, as a line of JSON, and then runs `code`."""
    log, program = folder / f"{name}.log", folder / "bin" / name
    program.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"stdin = sys.stdin.read() if {name == 'kubectl'} else ''\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "with log.open('a') as file: file.write(json.dumps([sys.argv[1:], stdin]) + '\\n')\n"
        "calls = [json.loads(line)[0] for line in log.read_text().splitlines()]\n" + code
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return log


def calls(log: Path) -> list:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


# --- JobSet --------------------------------------------------------------------------------------


def pod_of(job_set):
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def manifests(capsys, *arguments):
    out = dry_run(capsys, "jobset", *TARGETS["jobset"], *arguments)
    config, job_set = yaml.safe_load_all(out)
    return config, job_set


@pytest.mark.parametrize("topology", SLICES)
def test_manifests_ask_for_what_the_slices_have(recipe, capsys, nothing_starts, topology):
    slices, hosts, chips, accelerator, shape, _, devices = SLICES[topology]
    config, job_set = manifests(capsys, recipe(topology), "--hosts", str(slices * hosts))
    assert problems(job_set) == []
    (group,) = job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    assert container["resources"] == {"limits": {"google.com/tpu": chips}, "requests": {"google.com/tpu": chips}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert slices * hosts * chips * (2 if topology.startswith("tpu7x") else 1) == devices


def test_the_recipe_that_was_planned_is_what_runs(recipe, capsys, nothing_starts, tmp_path):
    source = recipe()
    config, job_set = manifests(capsys, source, "train.steps=77")
    assert (config["apiVersion"], config["kind"]) == ("v1", "ConfigMap")
    assert config["metadata"]["namespace"] == job_set["metadata"]["namespace"] == "default"
    pod = pod_of(job_set)
    (container,), (volume,) = pod["containers"], pod["volumes"]
    digest = load_recipe(source, ["train.steps=77"]).digest()
    assert volume["configMap"]["name"] == config["metadata"]["name"] == f"my-run-1-recipe-{digest[:8]}"
    assert config["immutable"] is True
    (mount,) = container["volumeMounts"]
    (file, text), *others = config["data"].items()
    assert not others and mount["name"] == volume["name"]
    # No shell between the kubelet and Python.
    assert container["command"] == ["python", "-m", "fathom", "train", f"{mount['mountPath']}/{file}"]
    (tmp_path / "mounted.yaml").write_text(text)
    assert load_recipe(tmp_path / "mounted.yaml") == load_recipe(source, ["train.steps=77"])


def outcome(job_set, exit_code=None, condition=None):
    """What the JobSet does when a pod ends: the Job's rules and message as Kubernetes applies and writes them."""
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (codes and exit_code in codes["values"]) or condition in [c["type"] for c in conditions]:
            reason, message = "PodFailurePolicy", f"... matching {rule['action']} rule at index {number}"
            break
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_each_exit_code_does(recipe, capsys):
    _, job_set = manifests(capsys, recipe(), "--max-restarts", "4", "--grace", "300")
    assert outcome(job_set, 2) == outcome(job_set, 5) == "FailJobSet"
    assert outcome(job_set, 3) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 3, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 137, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    # 134: aborted, since another was lost, and before Kubernetes noticed that.
    assert {outcome(job_set, code) for code in (1, 4, 134, 137)} == {"RestartJobSet"}
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 4
    assert pod_of(job_set)["terminationGracePeriodSeconds"] == 300


def test_restarts_last_for_months(recipe, capsys):
    _, job_set = manifests(capsys, recipe())
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 1000
    words = shlex.split(dry_run(capsys, "xpk", recipe(), *TARGETS["xpk"]), comments=True)
    assert read_xpk(words).max_restarts == "1000"


@pytest.mark.parametrize(("overrides", "seconds"), [([], 600), (["train.grace=77"], 77)])
def test_the_grace_is_the_recipes_unless_given(recipe, capsys, overrides, seconds):
    _, job_set = manifests(capsys, recipe(), *overrides)
    assert pod_of(job_set)["terminationGracePeriodSeconds"] == seconds
    words = shlex.split(dry_run(capsys, "xpk", recipe(), *TARGETS["xpk"], *overrides), comments=True)
    assert f"--termination-grace-period-seconds={seconds}" in words


def test_options_of_a_jobset(recipe, capsys):
    options = ["--name", "other", "--namespace", "team", "--service-account", "storage", "--spot"]
    config, job_set = manifests(capsys, recipe(), *options)
    assert problems(job_set) == []
    assert {m["metadata"]["namespace"] for m in (config, job_set)} == {"team"}
    assert job_set["metadata"]["name"] == "other" and config["metadata"]["name"].startswith("other-recipe-")
    pod = pod_of(job_set)
    assert pod["serviceAccountName"] == "storage" and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (toleration,) = pod["tolerations"]
    assert (toleration["key"], toleration["effect"]) == ("cloud.google.com/gke-spot", "NoSchedule")


EVERYTHING = ["--spot", "--service-account", "a", "--mount", "gs://some-bucket/a=/a", "--volume", "b=/b",
              "--env", "A=b", "--env-from-secret", "keys"]  # fmt: skip


def test_kubernetes_own_schemas_know_every_field(recipe, capsys):
    """Published ones, that refuse fields they do not know: of the ConfigMap, and of the Jobs that a JobSet makes."""
    config, job_set = manifests(capsys, recipe(), *EVERYTHING)
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(config, version, strict=True)
    (group,) = job_set["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", **group["template"]}
    kubernetes_validate.validate(job, version, strict=True)
    for manifest, place in ((config, ["metadata"]), (job, ["spec", "template", "spec", "containers", 0, "env", 0])):
        spoilt = copy.deepcopy(manifest)
        functools.reduce(lambda value, key: value[key], place, spoilt)["names"] = "a"
        with pytest.raises(kubernetes_validate.ValidationError, match="'names' was unexpected"):
            kubernetes_validate.validate(spoilt, version, strict=True)


def places(value, path=()):
    """The path of every key and item."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_the_schema_finds_every_misspelt_key(recipe, capsys):
    """Or it would prove nothing."""
    _, job_set = manifests(capsys, recipe(), *EVERYTHING)
    paths = [path for path in places(job_set) if isinstance(path[-1], str)]
    assert len(paths) > 75
    for path in paths:
        spoilt = copy.deepcopy(job_set)
        parent = spoilt
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1] + "s"] = parent.pop(path[-1])
        assert problems(spoilt), path


ASKED = ["get", "jobset", "my-run-1", "-n", "default", "--ignore-not-found", "-o", "name"]


def test_kubectl_gets_the_manifest(recipe, capsys, tmp_path):
    log = install_tool(tmp_path, "kubectl", "sys.exit(0)")
    source = recipe()
    expected = dry_run(capsys, "jobset", source, *TARGETS["jobset"])
    assert calls(log) == []
    assert launch("jobset", source, *TARGETS["jobset"]) == 0
    assert calls(log) == [[ASKED, ""], [["apply", "-f", "-"], expected]]
    assert launch("jobset", source, *TARGETS["jobset"], "--context", "my one") == 0
    assert [arguments for arguments, _ in calls(log)[2:]] == [
        ["--context=my one", *ASKED],
        ["--context=my one", "apply", "-f", "-"],
    ]


def test_what_is_printed_deletes_all_of_a_launch(recipe, capsys, tmp_path):
    install_tool(tmp_path, "kubectl", "sys.exit(0)")
    source = recipe()
    options = [*TARGETS["jobset"], "--namespace", "team", "--context", "a"]
    documents = yaml.safe_load_all(dry_run(capsys, "jobset", source, *options))
    assert launch("jobset", source, *options) == 0
    (line,) = capsys.readouterr().out.splitlines()
    *command, selector = shlex.split(line.partition(": ")[2])
    assert command == ["kubectl", "--context=a", "delete", "jobset,configmap", "-n", "team", "-l"]
    wanted = dict(pair.split("=") for pair in selector.split(","))
    for document in documents:
        assert wanted.items() <= document["metadata"]["labels"].items() and len(wanted) == 2


def test_a_name_that_is_taken(recipe, capsys, tmp_path):
    """Nothing is applied, neither the recipe nor the JobSet."""
    log = install_tool(tmp_path, "kubectl", "print('jobset.jobset.x-k8s.io/my-run-1')")
    assert launch("jobset", recipe(), *TARGETS["jobset"], "--namespace", "team") == 1
    err = capsys.readouterr().err
    assert "JobSet my-run-1 is there already" in err and "kubectl delete jobset my-run-1 -n team. The chec" in err
    assert "gs://bucket/run stay, and the next launch resumes" in err
    assert "once it is deleted, kubectl delete configmap -n team -l app.kubernetes.io/managed-by=fathom," in err
    assert [arguments[0] for arguments, _ in calls(log)] == ["get"]


@pytest.mark.parametrize("verb", ["get", "apply"])
def test_a_kubectl_that_fails(recipe, capsys, tmp_path, verb):
    log = install_tool(tmp_path, "kubectl", f"sys.exit(7 if calls[-1][0] == {verb!r} else 0)")
    assert launch("jobset", recipe(), *TARGETS["jobset"]) == 1
    err = capsys.readouterr().err
    assert f"kubectl {verb} " in err and "failed with exit code 7" in err
    assert calls(log)[-1][0][0] == verb


# --- xpk -----------------------------------------------------------------------------------------


XPK_OPTIONS = {"workload", "cluster", "tpu-type", "num-slices", "docker-image", "max-restarts", "restart-on-exit-codes",
               "termination-grace-period-seconds", "command", "project", "zone"}  # fmt: skip
"""Those of `xpk workload create` in xpk 1.0 and 1.16 that take a value and are of use here; `--spot` takes none, and
`--env` may come again."""

XPK_RESTARTS = {42, *range(127, 256)}
"""Exit codes with which its JobSet starts anew, beside those of --restart-on-exit-codes; others fail it at once."""


def read_xpk(words):
    """The options, as xpk's own parser takes them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in XPK_OPTIONS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--env", action="append")
    assert words[:3] == ["xpk", "workload", "create"]
    found, unknown = parser.parse_known_args(words[3:])
    assert unknown == []
    return found


@pytest.mark.parametrize("topology", SLICES)
def test_xpk_is_asked_for_the_slices(recipe, capsys, nothing_starts, topology):
    slices, *_, tpu_type, _ = SLICES[topology]
    line, *comments = dry_run(capsys, "xpk", recipe(topology), *TARGETS["xpk"]).splitlines()
    assert all(comment.startswith("#") for comment in comments)
    found = read_xpk(shlex.split(line))
    assert (found.tpu_type, found.num_slices) == (tpu_type, str(slices))
    assert (found.workload, found.cluster, found.docker_image) == ("my-run-1", "c", "registry/fathom:1")
    restarts = XPK_RESTARTS | {int(code) for code in found.restart_on_exit_codes.split(",")}
    assert restarts & set(range(1, 10)) == {1, 3, 4}  # not 2 and 5, which would come again


@pytest.mark.parametrize(
    ("topology", "known"),
    [
        ("v5p:4x4x32", "v5p-4x4x32"),
        ("v5p:4x4x384", "knows no slice 4x4x384 of TPU v5p; use --on jobset"),
        ("v5e:2x2", "knows no slice 2x2 of TPU v5e; use --on jobset"),
        ("v6e:2x2", "v6e-2x2"),
        ("tpu7x:1x1x1", "tpu7x-1x1x1"),
    ],
)
def test_names_that_xpk_has_for_slices(topology, known):
    if "-" in known.split(";")[0].split()[0]:
        assert xpk.tpu_type(parse_topology(topology)) == known
    else:
        with pytest.raises(ArgumentProblem, match=re.escape(known)):
            xpk.tpu_type(parse_topology(topology))


def in_shell(command, folder):
    return subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, env={"PATH": os.defpath}, capture_output=True, text=True, check=True
    )


def test_what_xpk_runs(recipe, capsys, tmp_path, monkeypatch):
    source = recipe()
    options = ["--project", "p", "--zone", "z", "--spot", "--max-restarts", "2", "--grace", "90"]
    words = shlex.split(dry_run(capsys, "xpk", source, *TARGETS["xpk"], *options, "train.steps=9"), comments=True)
    found = read_xpk(words)
    assert (found.project, found.zone, found.spot, found.max_restarts) == ("p", "z", True, "2")
    assert found.termination_grace_period_seconds == "90"
    write, _, run = found.command.partition(" && ")
    assert run == "exec python -m fathom train /tmp/fathom-recipe.yaml"
    in_shell(write.replace("/tmp/", ""), tmp_path)
    assert load_recipe(tmp_path / "fathom-recipe.yaml") == load_recipe(source, ["train.steps=9"])


def test_xpk_gets_the_command(recipe, capsys, tmp_path):
    log = install_tool(tmp_path, "xpk", "sys.exit(0)")
    source = recipe()
    expected = shlex.split(dry_run(capsys, "xpk", source, *TARGETS["xpk"]), comments=True)
    assert launch("xpk", source, *TARGETS["xpk"]) == 0
    assert calls(log) == [[expected[1:], ""]]


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "tool"), [("jobset", "kubectl"), ("xpk", "xpk"), ("tpu-vm", "gcloud")])
def test_a_missing_tool_is_one_clear_error(recipe, capsys, nothing_starts, target, tool):
    source = recipe()
    assert launch(target, source, *TARGETS[target]) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "is not installed" in line]
    assert line.startswith(f"fathom launch: {tool} is not installed (not on PATH), nothing was launched; install")
    assert "--dry-run" in line and out == "" and "Traceback" not in err
    assert dry_run(capsys, target, source, *TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9:2x2"], "--topology: topology 'v9:2x2': found generation 'v9', expected one of v4, v5e"),
        (["--topology", "8x8"], "--topology: topology: found '8x8', expected a generation and its chips"),
        (["--topology", "v5p:3x4x4"], "3x4x4, which is no slice of TPU v5p; expected 2x2x1, "),
        (["mesh.topology=v5p:4x4"], "found 2 dimensions, TPU v5p has 3"),
        (["--topology", "v6e:4x4"], "mesh.topology: found v6e:4x4, of 16 devices; expected a slice of 64 devices"),
        (["mesh.topology=null"], "needs to know the slice, and recipe my.Run_1 has no mesh.topology; give --topology"),
        (["--hosts", "8"], "--hosts is 8, and 2*v6e:4x8 has 16: 2 x 8 of 4 chips each; leave --hosts out"),
        (["--name", "Bad_Name"], "--name is 'Bad_Name' (8 characters), expected at most"),
        (["--name", "x-"], "--name is 'x-'"),
        (["--name", "a" * 64], "(64 characters), expected at most"),
        (["mesh.simulated_devices=64"], "mesh.simulated_devices: found 64, for --on"),
        (["checkpoint.directory=null"], "checkpoint.directory: found 'runs/my.Run_1/checkpoints', a folder of each"),
        (["mesh.data=16", "train.stepz=3"], "train.stepz"),
        (["data.batch_size=63"], "data.batch_size: found 63; expected a multiple of 64"),
        (["train.grace=0"], "train.grace: found 0; expected greater than or equal to 1"),
        (["data.path=text"], "data.path: found 'text', a relative path; expected the absolute path of a file or"),
        (["data.path=s3://b/text"], "data.path: found 's3://b/text', which is remote; expected the absolute path"),
        (["model.init=runs/a"], "model.init: found 'runs/a', a relative path, which is another on each host"),
        (["data.tokenizer=a/t.json"], "data.tokenizer: found 'a/t.json', a relative path, which is another on each"),
        (["model.init=gs://BUCKET/a"], "model.init: found 'gs://BUCKET/a', a placeholder; expected a bucket of yours"),
        (["checkpoint.directory=gs://BUCKET/a"], "replace it in the recipe, or give checkpoint.directory=..."),
        (
            ["stages=[{until: 5}, {until: 10, data: {path: gs://b/t}}]"],
            "stages.2: data.path: found 'gs://b/t', which is remote",
        ),
    ],
)
def test_what_does_not_fit_together(recipe, capsys, nothing_starts, target, arguments, words):
    for mode in ([], ["--dry-run"]):
        assert launch(target, recipe(), *TARGETS[target], *arguments, *mode) == 2
        out, err = capsys.readouterr()
        assert words in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    ("target", "topology", "arguments", "words"),
    [
        ("jobset", "v6e:4x4", [], "--image: needed for --on jobset"),
        ("xpk", "v6e:4x4", [], "--cluster, --image: needed for --on xpk"),
        ("tpu-vm", "v6e:4x4", ["--zone", "z"], "--project: needed for --on tpu-vm; nothing here can know it"),
        ("tpu-vm", "v6e:4x4", [*VM_OPTIONS, "--image", "x"], "--image: not for --on tpu-vm, which takes --env, "),
        ("tpu-vm", "v6e:4x4", [*VM_OPTIONS, "--spot", "--reserved"], "--spot and --reserved"),
        ("tpu-vm", "tpu7x:4x4x4", VM_OPTIONS, "TPU7x is there in GKE only; use --on jobset"),
        ("jobset", "2*v4:2x2x1", TARGETS["jobset"], "GKE joins slices of several hosts each, and v4:2x2x1 has one"),
        ("xpk", "2*v4:2x2x1", TARGETS["xpk"], "GKE joins slices of several hosts each"),
        ("jobset", "v6e:4x4", [*TARGETS["jobset"], "--namespace", "A b"], "--namespace is 'A b', expected"),
        ("jobset", "v6e:4x4", [*TARGETS["jobset"], "--max-restarts", "-1"], "--max-restarts is -1, expected at"),
        ("xpk", "v6e:4x4", [*TARGETS["xpk"], "--name", "a" * 41], "expected at most 40"),
    ],
)
def test_what_a_target_cannot_do(recipe, capsys, nothing_starts, target, topology, arguments, words):
    assert launch(target, recipe(topology), *arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and out == ""


def test_names_leave_room_for_those_of_pods():
    """<name>-slice-<job>-<pod>-<5 letters> is a label of DNS: 63 characters."""
    topology = parse_topology("12*v5p:8x8x8")
    longest = jobset.longest_name(topology)
    assert len("a" * longest + "-slice-11-127-abcde") == 63


@pytest.mark.parametrize("target", ["nowhere", None])
def test_targets_that_are_none(recipe, capsys, target):
    assert main(["launch", recipe(), *(["--on", target] if target else [])]) == 2
    assert "--on" in capsys.readouterr().err


def test_overrides_may_stand_anywhere_and_typos_are_found(recipe, capsys):
    assert main(["launch", recipe(), "train.steps=3", "--on", "local", "train.seed=4", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("train.steps=3 train.seed=4\n")
    assert main(["launch", recipe(), "--on", "local", "--hots", "3"]) == 2
    assert "unrecognized arguments: --hots" in capsys.readouterr().err
