"""What `fathom launch` passes on: variables, labels, node selectors, arguments; and the recipe, to be read."""

from __future__ import annotations

import shlex
import sys

import pytest

from fathom.cli import main
from fathom.recipe import load_recipe
from tests.launch import test_clusters
from tests.launch.test_clusters import TARGETS, dry_run, launch, manifests, pod_of, problems, read_xpk

no_tools = test_clusters.no_tools

VALUES = {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b='two'", "PRICE": "$HOME $(A) = 5 # ~", "EMPTY": ""}
ENV = [word for name, value in VALUES.items() for word in ("--env", f"{name}={value}")]


def in_kubernetes(value):
    """What a container gets: $$ is a dollar, $(NAME) another variable."""
    whole = value.replace("$$", "\0")
    assert "$(" not in whole
    return whole.replace("\0", "$")


def test_variables_of_a_jobset(recipe, capsys):
    secrets = ["--env-from-secret", "wandb", "--env-from-secret", "other.keys"]
    _, job_set = manifests(capsys, recipe(), *ENV, *secrets)
    assert problems(job_set) == []
    (container,) = pod_of(job_set)["containers"]
    assert {item["name"]: in_kubernetes(item["value"]) for item in container["env"]} == VALUES
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "other.keys"}}]
    _, job_set = manifests(capsys, recipe())
    assert not {"env", "envFrom"} & pod_of(job_set)["containers"][0].keys()


def test_variables_and_arguments_for_xpk(recipe, capsys):
    extra = ["--extra=--priority=high", "--extra=--storage", "--extra", "two words"]
    words = shlex.split(dry_run(capsys, "xpk", recipe(), *TARGETS["xpk"], *ENV, *extra), comments=True)
    assert words[-3:] == ["--priority=high", "--storage", "two words"]
    pairs = [value.split("=", 1) for value in read_xpk(words[:-3]).env]
    assert {name: in_kubernetes(value) for name, value in pairs} == VALUES


def test_labels_and_node_selectors(recipe, capsys):
    queue, nodes = ("kueue.x-k8s.io/queue-name", "my_queue"), ("cloud.google.com/reservation-name", "r-1")
    _, plain = manifests(capsys, recipe())
    _, job_set = manifests(capsys, recipe(), "--label", "=".join(queue), "--node-selector", "=".join(nodes))
    assert problems(job_set) == []
    assert job_set["metadata"]["labels"] == {**plain["metadata"]["labels"], queue[0]: queue[1]}
    assert pod_of(job_set)["nodeSelector"] == {**pod_of(plain)["nodeSelector"], nodes[0]: nodes[1]}


def test_arguments_for_gcloud(recipe, capsys):
    disk = "--data-disk=source=projects/p/zones/z/disks/d,mode=read-only"
    script = dry_run(capsys, "tpu-vm", recipe("v5p:4x4x4"), *TARGETS["tpu-vm"], f"--extra={disk}").splitlines()
    (create,) = [line for line in script if " create " in line]
    assert shlex.split(create)[-1] == disk and sum(disk in line for line in script) == 1


@pytest.mark.parametrize("hosts", ["1", "2"])
def test_variables_of_a_rehearsal(recipe, capsys, hosts):
    """A line of shell for each process has them."""
    arguments = [recipe(), "mesh.simulated_devices=64", "mesh.topology=null", "data.path=.", "--hosts", hosts]
    assert main(["launch", *arguments, "--on", "local", *ENV, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == int(hosts)
    for line in lines:
        words = shlex.split(line)
        settings = dict(word.split("=", 1) for word in words[: words.index(sys.executable)])
        assert VALUES.items() <= settings.items() and ("JAX_PROCESS_ID" in settings) == (hosts == "2")


@pytest.mark.parametrize("target", ["xpk", "tpu-vm"])
def test_the_recipe_can_be_read_in_what_is_printed(recipe, capsys, tmp_path, target):
    source = recipe("v5p:4x4x4")
    out = dry_run(capsys, target, source, *TARGETS[target], "train.steps=9")
    _, marker, rest = out.partition("# the recipe that is written there:\n")
    assert marker and all(line.startswith("#") for line in rest.splitlines())
    (tmp_path / "read.yaml").write_text("".join(line[2:] + "\n" for line in rest.splitlines()))
    assert load_recipe(tmp_path / "read.yaml") == load_recipe(source, ["train.steps=9"])


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("jobset", ["--env", "1A=secret"], "--env has the name '1A', expected letters, digits and '_', no digit first"),
        ("xpk", ["--env", "WANDB_API_KEY"], "--env WANDB_API_KEY has no value, expected --env WANDB_API_KEY=VALUE"),
        ("tpu-vm", ["--env", "A=secret", "--env", "A=2"], "--env A is given twice, expected once; leave one out"),
        ("tpu-vm", ["--env", "JAX_PROCESS_ID=1"], "--env JAX_PROCESS_ID: this is set by the launch, or by the cluster"),
        ("jobset", ["--env", "TPU_WORKER_ID=1"], "--env TPU_WORKER_ID: this is set by the launch, or by the cluster"),
        ("xpk", ["--env", "MEGASCALE_NUM_SLICES=1"], "--env MEGASCALE_NUM_SLICES: this is set by"),
        ("xpk", ["--env", 'A=say "secret"'], "--env A: xpk spoils values with a double quote, a backslash or a line's"),
        ("jobset", ["--env", "a-b=1", "--env", "B"], "and '_', no digit first; correct it; --env B has no value"),
        ("jobset", ["--env-from-secret", "My_keys"], "--env-from-secret is 'My_keys', expected the name of a Secret"),
        ("tpu-vm", ["--env-from-secret", "keys"], "--env-from-secret: not for --on tpu-vm"),
        ("jobset", ["--label", "queue"], "--label queue has no value, expected --label queue=VALUE"),
        ("jobset", ["--label", "a/b/c=d"], "--label has the name 'a/b/c', expected a label's, for example kueue.x-k8s"),
        ("jobset", ["--label", "a=-b"], "--label a is '-b', expected at most 63 letters, digits"),
        ("jobset", ["--label", "app.kubernetes.io/managed-by=me"], "managed-by: this is set by the launch; leave"),
        ("jobset", ["--node-selector", "cloud.google.com/gke-spot=true"], "gke-spot: this is --spot's; give that"),
        ("jobset", ["--node-selector", "cloud.google.com/gke-tpu-topology=1x1"], "is the slice's; give --topology"),
        ("xpk", ["--label", "a=b"], "--label: not for --on xpk"),
        ("jobset", ["--extra", "x"], "--extra: not for --on jobset"),
        ("xpk", ["--setup", "x"], "--setup: not for --on xpk"),
        ("xpk", ["--context", "x"], "--context: not for --on xpk"),
    ],
)
def test_what_is_not_passed_on(recipe, capsys, nothing_starts, target, arguments, words):
    for mode in ([], ["--dry-run"]):
        assert launch(target, recipe("v5p:4x4x4"), *TARGETS[target], *arguments, *mode) == 2
        out, err = capsys.readouterr()
        assert words in err and out == "" and "secret\"" not in err and "=secret" not in err


@pytest.mark.parametrize("name", ["FATHOM_LAUNCHER_PID", "PYTHONUNBUFFERED", "JAX_COORDINATOR_ADDRESS"])
def test_what_a_rehearsal_sets_itself(recipe, capsys, nothing_starts, name):
    assert main(["launch", recipe(), "--on", "local", "--env", f"{name}=1"]) == 2
    assert f"--env {name}: this is set by the launch" in capsys.readouterr().err
