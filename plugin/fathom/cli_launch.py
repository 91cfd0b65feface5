"""`fathom launch`: arguments in; processes here, or a manifest and commands for a cluster, out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from fathom.cli_problem import ArgumentProblem

TARGETS = ("local", "jobset", "xpk", "tpu-vm")
OPTIONS = {
    "local": {"env", "grace"},
    "jobset": {
        "topology", "name", "image", "namespace", "context", "max_restarts", "grace", "service_account", "spot",
        "mount", "volume", "env", "env_from_secret", "label", "node_selector",
    },
    "xpk": {"topology", "name", "image", "cluster", "project", "zone", "max_restarts", "grace", "spot", "env", "extra"},
    "tpu-vm": {
        "topology", "name", "project", "zone", "install", "setup", "runtime", "spot", "reserved", "env", "extra",
    },
}  # fmt: skip
"""Which options each target takes; others are refused."""

REQUIRED = {"jobset": ("image",), "xpk": ("image", "cluster"), "tpu-vm": ("project", "zone"), "local": ()}
LOCAL_GRACE = 30.0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fathom launch`."""
    sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example mesh.topology=v5p:4x4x8")
    sub.add_argument("--on", required=True, choices=TARGETS, metavar="|".join(TARGETS), help="where to")
    sub.add_argument(
        "--hosts", type=int, metavar="N", help="processes (local, 1 unless given); else checked against the slice"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the manifest or the commands, start nothing")
    sub.add_argument("--topology", metavar="T", help="the slice, in place of mesh.topology: v5p:8x8x8, 2*v6e:16x16")
    sub.add_argument("--name", help="of the workload, made from the recipe's name unless given")
    sub.add_argument("--image", help="container image with fathom in it (jobset, xpk)")
    sub.add_argument("--namespace", help="of Kubernetes (jobset; default)")
    sub.add_argument("--service-account", help="of Kubernetes, for access to storage (jobset)")
    sub.add_argument(
        "--mount", action="append", metavar="gs://BUCKET[/FOLDER]=/PATH", help="to read, by Cloud Storage FUSE (jobset)"
    )
    sub.add_argument(
        "--volume", action="append", metavar="CLAIM=/PATH", help="a PersistentVolumeClaim, to write too (jobset)"
    )
    _add_passed_on(sub)
    sub.add_argument("--cluster", help="GKE cluster (xpk)")
    sub.add_argument("--project", help="of Google Cloud (tpu-vm, xpk)")
    sub.add_argument("--zone", help="of Google Cloud (tpu-vm, xpk)")
    sub.add_argument(
        "--install",
        metavar="WHAT",
        help="what uv installs on the hosts: a wheel here, git+https://..., or a requirement (tpu-vm; unless given "
        "fathom-jax[tpu], which needs fathom-jax on a package index)",
    )
    sub.add_argument(
        "--setup",
        metavar="COMMAND",
        help="of a shell (sh), run on every host at each launch, before the start, to mount or copy data (tpu-vm)",
    )
    sub.add_argument("--runtime", help="image of the hosts (tpu-vm; that of the generation)")
    sub.add_argument("--spot", action="store_true", default=None, help="capacity that may be taken away")
    sub.add_argument("--reserved", action="store_true", default=None, help="capacity of a reservation (tpu-vm)")
    sub.add_argument("--max-restarts", type=int, metavar="N", help="after failures (jobset, xpk; 1000)")
    sub.add_argument(
        "--grace",
        type=int,
        metavar="SECONDS",
        help="from SIGTERM to SIGKILL (jobset, xpk; the recipe's train.grace); for the others once a process has ended "
        "(local; 30)",
    )


def _add_passed_on(sub: argparse.ArgumentParser) -> None:
    """The arguments that others than the launch know the meaning of."""
    several = {"action": "append"}
    sub.add_argument("--env", **several, metavar="NAME=VALUE", help="a variable of the run's environment; repeatable")
    sub.add_argument(
        "--env-from-secret",
        **several,
        metavar="NAME",
        help="a Secret of the namespace, whose keys are variables; repeatable (jobset)",
    )
    sub.add_argument(
        "--label",
        **several,
        metavar="NAME=VALUE",
        help="of the JobSet, for example kueue.x-k8s.io/queue-name=QUEUE; repeatable (jobset)",
    )
    sub.add_argument(
        "--node-selector",
        **several,
        metavar="NAME=VALUE",
        help="a label that nodes must have beside the slice's; repeatable (jobset)",
    )
    sub.add_argument("--context", help="of kubectl (jobset; the current one)")
    sub.add_argument(
        "--extra",
        **several,
        metavar="ARGUMENT",
        help="given to the command that creates, as it is: --extra=--reservation=NAME; repeatable (xpk, tpu-vm)",
    )


def run_launch(arguments: argparse.Namespace) -> int:
    """Launches, or prints what would be; gives the exit code.

    Standard output of --dry-run is the manifest or the commands and nothing else.

    Raises:
      ArgumentProblem, RecipeError: for what cannot be launched; all else as the targets raise it.
    """
    given = _given(arguments)
    _read_passed_on(given, arguments.on)
    if arguments.on == "local":
        return _local(arguments, given)
    from fathom.launch import jobset, tpu_vm, xpk
    from fathom.launch.plan import make_plan
    from fathom.launch.volumes import read_volumes

    target = {"jobset": jobset, "xpk": xpk, "tpu-vm": tpu_vm}[arguments.on]
    common = {name: given.pop(name) for name in ("topology", "name") if name in given}
    volumes = read_volumes(given.pop("mount", ()), given.pop("volume", ()))
    plan = make_plan(
        arguments.recipe,
        arguments.overrides,
        target=arguments.on,
        hosts=arguments.hosts,
        longest_name=target.longest_name,
        volumes=volumes,
        **common,
    )
    options = target.Options(**given)
    target.check(plan, options)
    for note in plan.notes:
        print(f"fathom launch: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(target.text(plan, options), end="")
    else:
        target.run(plan, options)
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The target's options that were given; ArgumentProblem, naming all, for others, missing and senseless ones."""
    known = set().union(*OPTIONS.values())
    given = {name: value for name in sorted(known) if (value := getattr(arguments, name)) is not None}

    def spell(names: Iterable[str]) -> str:
        return ", ".join("--" + name.replace("_", "-") for name in sorted(names))

    problems = []
    if other := given.keys() - OPTIONS[arguments.on]:
        problems.append(f"{spell(other)}: not for --on {arguments.on}, which takes {spell(OPTIONS[arguments.on])}")
    if missing := [name for name in REQUIRED[arguments.on] if not given.get(name)]:
        problems.append(f"{spell(missing)}: needed for --on {arguments.on}; nothing here can know it")
    for name, least in (("max_restarts", 0), ("grace", 1)):
        if isinstance(value := given.get(name), int) and value < least:
            problems.append(f"{spell([name])} is {value}, expected at least {least}")
    if problems:
        raise ArgumentProblem("; ".join(problems))
    return given


def _read_passed_on(given: dict[str, Any], target: str) -> None:
    """Turns the texts NAME=VALUE into mappings; ArgumentProblem for what is none."""
    from fathom.launch import jobset, passed

    if "env" in given:
        given["env"] = passed.read_environment(given["env"], target)
    for name, taken in (("label", jobset.LABELS), ("node_selector", jobset.SELECTORS)):
        if name in given:
            given[name] = passed.read_labels("--" + name.replace("_", "-"), given[name], taken)


def _local(arguments: argparse.Namespace, given: dict[str, Any]) -> int:
    from fathom.launch import local
    from fathom.recipe import load_recipe

    hosts = 1 if arguments.hosts is None else arguments.hosts
    local.check(load_recipe(arguments.recipe, arguments.overrides), hosts)
    train, env = [arguments.recipe, *arguments.overrides], given.get("env", {})
    if arguments.dry_run:
        print("\n".join(local.commands(train, hosts, env)))
        return 0
    return local.run(train, hosts, float(given.get("grace", LOCAL_GRACE)), env)
