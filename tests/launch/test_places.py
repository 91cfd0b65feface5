"""Where a launched recipe finds and puts things, and whether the slice can hold its state: mounts, refusals, notes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fathom import zoo
from fathom.cli import main
from fathom.launch import checks
from fathom.recipe import load_recipe
from fathom.recipe_files import recipe_names
from fathom.topology import parse_topology
from tests.launch.test_clusters import TARGETS, launch, manifests, problems
from tests.train.small_recipe import SPEC

ROOT = Path(__file__).parents[2]


def test_volumes_of_a_jobset(recipe, capsys):
    options = ["--mount", "gs://some-bucket/a/text/=/mnt/text/", "--mount", "gs://b.c_d=/tok", "--volume", "fs-1=/runs"]
    places = ["metrics.directory=/runs/one", "checkpoint.directory=/runs/c", "data.tokenizer=/tok/t.json"]
    assert launch("jobset", recipe(), *TARGETS["jobset"], *options, *places, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert err == ""  # nothing to note: all that the recipe names is on one of them
    _, job_set = yaml.safe_load_all(out)
    assert problems(job_set) == []
    template = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (container,) = template["spec"]["containers"]
    mounts = {m["name"]: (m["mountPath"], m.get("readOnly", False)) for m in container["volumeMounts"]}
    (_, config), *volumes = [(v.pop("name"), v) for v in template["spec"]["volumes"]]
    assert [mounts[name] for name, _ in volumes] == [("/mnt/text", True), ("/tok", True), ("/runs", False)]
    driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True}
    assert [volume for _, volume in volumes] == [
        {"csi": driver | {"volumeAttributes": {"bucketName": bucket, "mountOptions": options}}}
        for bucket, options in (("some-bucket", "implicit-dirs,only-dir=a/text"), ("b.c_d", "implicit-dirs"))
    ] + [{"persistentVolumeClaim": {"claimName": "fs-1"}}]
    _, job_set = manifests(capsys, recipe(), "--volume", "fs-1=/runs")
    assert "metadata" not in job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["launch", "--on", "jobset", *TARGETS["jobset"]], "1 problem\n"),
        (["plan"], "1 problem\n"),
        (["train"], "2 problems\n"),  # here the data must be here
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_data_of_other_machines_is_no_problem_beside_others(recipe, capsys, nothing_starts, command, told):
    assert main([*command, recipe(), "metrics.directory=gs://y/run"]) == 2
    out, err = capsys.readouterr()
    assert told in err and "metrics.directory: found 'gs://y/run'" in err and out == ""


JOBSET_VOLUMES = ["--volume", "fs=/runs", "--mount", "gs://some-bucket=/data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.path=gs://b/text"], "fix: add --mount gs://b/text=/data data.path=/data"),
        (["data.path=gs://b/c/t.jsonl"], "fix: add --mount gs://b/c=/data data.path=/data/t.jsonl"),
        (["data.path=gs://BUCKET/text"], "data.path=/data, with a bucket of yours for BUCKET"),
        (["checkpoint.directory=/mnt/c"], "no --volume holds it; expected gs://..., or a path on a --volume"),
        (["checkpoint.directory=/data/c"], "'/data/c', on --mount gs://some-bucket=/data, which is read only"),
        (["metrics.directory=/data/m"], "metrics.directory: found '/data/m', on --mount gs://some-bucket=/data"),
        (["--mount", "some-bucket=/a"], "--mount is 'some-bucket=/a', expected gs://BUCKET=/PATH or gs://"),
        (["--mount", "gs://BUCKET=/a"], "--mount is 'gs://BUCKET=/a', expected"),
        (["--mount", "gs://some-bucket/a,b=/a"], "--mount is 'gs://some-bucket/a,b=/a', expected"),
        (["--mount", "gs://some-bucket/a"], "--mount is 'gs://some-bucket/a', expected"),
        (["--volume", "Fs=/a"], "--volume is 'Fs=/a', expected CLAIM=/PATH"),
        (["--volume", "fs=a"], "--volume is 'fs=a', expected CLAIM=/PATH"),
        (["--volume", "fs=/a/../b"], "--volume is 'fs=/a/../b', expected"),
        (["--volume", "fs=/"], "--volume is 'fs=/', expected"),
        (["--volume", "other=/data/x"], "--volume other=/data/x: /data is where gs://some-bucket lies; choose a path"),
        (["--volume", "other=/etc"], "/etc/fathom is where the recipe lies; choose a path beside it"),
    ],
)
def test_what_a_pod_cannot_mount_or_reach(recipe, capsys, nothing_starts, arguments, words):
    assert launch("jobset", recipe(), *TARGETS["jobset"], *JOBSET_VOLUMES, *arguments, "--dry-run") == 2
    out, err = capsys.readouterr()
    assert words in err and out == ""


@pytest.mark.parametrize(
    ("target", "arguments", "words", "silent"),
    [
        ("jobset", [], ["data.path /mnt/text must exist in the image", "metrics.directory runs/my.Run_1 is"], []),
        ("jobset", ["metrics.directory=/m"], ["metrics.directory /m is on the container's own disk, gone at a"], []),
        ("jobset", ["metrics.directory=/runs/m", "data.path=/data/t"], [], ["metrics.directory", "data.path"]),
        ("jobset", ["train.compilation_cache=/c"], ["train.compilation_cache /c is on the container's own"], []),
        ("jobset", ["train.compilation_cache=gs://b/c", "data.path=stdlib:"], [], ["compilation", "data.path"]),
        ("jobset", ["model.init=/i", "data.tokenizer=gs://b/t"], ["model.init /i must exist in the"], ["tokenizer"]),
        ("xpk", [], ["data.path /mnt/text must exist on every host", "unless it lies on a storage that the"], []),
        ("xpk", ["metrics.directory=/m"], [], ["metrics.directory"]),
        ("tpu-vm", [], ["metrics.directory runs/my.Run_1 is on each host's own disk"], []),
    ],
)
def test_what_is_told_of_places(recipe, capsys, target, arguments, words, silent):
    volumes = JOBSET_VOLUMES if target == "jobset" else []
    assert launch(target, recipe(), *TARGETS[target], *volumes, *arguments, "--dry-run") == 0
    err = capsys.readouterr().err
    assert all(word in err for word in words) and not any(word in err for word in silent)


@pytest.mark.parametrize(
    ("overrides", "state"),
    [
        ([], 12),
        (["optimizer.momentum_dtype=bfloat16"], 10),
        (["optimizer.name=muon"], 8),
    ],
)
def test_state_that_cannot_fit(recipe, overrides, state):
    """The bound, to the byte: parameters, and moments of those that train, over all devices."""
    loaded = load_recipe(recipe("v6e:4x4"), overrides)
    topology = parse_topology("v6e:4x4")

    def found(hbm_bytes):
        generation = dataclasses.replace(topology.generation, hbm_bytes=hbm_bytes)
        return list(checks._state_problems(loaded, dataclasses.replace(topology, generation=generation)))

    spec = loaded.model_spec()
    needed = spec.num_params(spec.config).total * state
    assert found(-(-needed // 16)) == []
    (problem,) = found((needed - 1) // 16)
    assert problem.key == "mesh.topology" and f"and {state - 4} bytes of moments" in problem.expected


def test_state_of_what_does_not_train(recipe, monkeypatch):
    frozen = dataclasses.replace(SPEC, frozen=lambda path, stage: stage == "dense")
    source = recipe("v6e:4x4", stages=[{"until": 5, "train": {"stage": "dense"}}, {"until": 10}])
    monkeypatch.setitem(zoo._registered, SPEC.name, frozen)
    loaded, topology = load_recipe(source, ["train.indexer_weight=0.1"]), parse_topology("v6e:4x4")
    total = frozen.num_params(loaded.model_spec().config).total
    generation = dataclasses.replace(topology.generation, hbm_bytes=total * 12 // 16 - 1)
    (problem,) = checks._state_problems(loaded, dataclasses.replace(topology, generation=generation))
    assert problem.key == "stages.2: mesh.topology"  # the first needs 4 bytes each


def test_a_model_that_is_too_large_is_refused_at_once(capsys, nothing_starts):
    mesh = ["mesh.fsdp=16", "mesh.expert=16", "train.accumulation=88"]
    places = ["data.path=/mnt/text", "data.tokenizer=bytes", "checkpoint.directory=gs://b/c"]
    places += ["train.compilation_cache=gs://b/d"]
    options = [*TARGETS["jobset"], "--topology", "v5e:16x16", "--dry-run"]
    assert launch("jobset", "v4-pro-4k-v5p", *options, *mesh, *places) == 2
    out, err = capsys.readouterr()
    assert "1 problem\n  mesh.topology: found v5e:16x16, 256 devices with 15.8 GiB each, 4.3 TB in all; " in err
    assert "at least 46.5 GiB each, 12.8 TB in all" in err and "`fathom plan`" in err and out == ""


def test_the_readmes_launches_are_taken_as_they_are_written(capsys, tmp_path, monkeypatch, nothing_starts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fathom_jax-0.1.0-py3-none-any.whl").touch()
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("fathom launch ")]
    assert {words[words.index("--on") + 1] for words in commands} == {"local", "jobset", "xpk", "tpu-vm"}
    for words in commands:
        assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err


def test_placeholders_of_the_recipes_are_refused_in_every_key(capsys, nothing_starts):
    assert launch("jobset", "v4-flash-4k-v5p", *TARGETS["jobset"], "data.path=/data", "--dry-run") == 2
    told = re.findall(r"  ([\w.]+): found 'gs://BUCKET/[^']*', a placeholder", capsys.readouterr().err)
    assert set(told) == {"data.tokenizer", "checkpoint.directory", "train.compilation_cache"}


def test_recipes_have_grace_for_two_steps_and_a_save_and_save_within_two_hours():
    """By the bound that their first lines tell: the rest of a step, one more, and five minutes."""
    told = 0
    for name in recipe_names():
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        if bound := re.search(r"a step takes at least ([\d.]+) s", text):
            told += 1
            recipe, seconds = load_recipe(name), float(bound[1])
            assert recipe.train.grace >= 2 * seconds + 300, name
            assert recipe.checkpoint.every * seconds <= 7200, name
    assert told >= 8
