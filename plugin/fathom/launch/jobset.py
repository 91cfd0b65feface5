"""A JobSet manifest for GKE: one Job for each slice, one pod for each host, and the recipe beside them.

What the exit codes of `fathom train` do: 2 (the recipe is wrong) and 5 (the same would happen again) fail the JobSet at
once; 3 (saved and stopped) and a pod that Kubernetes marks as disrupted (DisruptionTarget: its node was drained,
preempted or found dead) start everything anew, as often as that happens; any other does up to `max_restarts` times: 1,
4 (the watchdog), and 134, with which the others abort when a host is lost abruptly and they notice before Kubernetes.
A Job fails with its first pod, and its message names the rule of `podFailurePolicy` that the pod met; the JobSet's
rules look for that number (`onJobFailureMessagePatterns`: JobSet 0.10.1 or newer).

A JobSet that has ended stays, and cannot be changed: `kubectl apply` of the same does nothing, of another is refused
after the recipe was stored. So a launch under the name of one that is there stops before anything is applied. The
recipe's ConfigMap outlives the JobSet; both have a label of the name, by which they are found.

Pods find each other by what GKE puts into their environment (TPU_WORKER_HOSTNAMES, and MEGASCALE_* for several slices)
through the headless service that JobSet makes. There is no liveness probe: a pod whose training hangs looks alive to
every test that does not read the training's own progress.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fathom.cli_problem import ArgumentProblem
from fathom.launch.passed import for_kubernetes
from fathom.launch.plan import NAME, LaunchError, Plan, ask_tool, find_tool, run_tool
from fathom.launch.volumes import OBJECT, POD_ANNOTATIONS, RECIPE_FOLDER, Volume
from fathom.topology import Topology

JOB = "slice"
RECIPE_FILE = "recipe.yaml"
MANAGED_BY, INSTANCE = "app.kubernetes.io/managed-by", "app.kubernetes.io/instance"
ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
SPOT = "cloud.google.com/gke-spot"
LABELS = dict.fromkeys((MANAGED_BY, INSTANCE), "is set by the launch; leave it out")
SELECTORS = dict.fromkeys((ACCELERATOR, TOPOLOGY), "is the slice's; give --topology") | {SPOT: "is --spot's; give that"}
"""Labels, of the JobSet and of nodes, that the options for them may not have -> what to do about it."""

MAX_RESTARTS = 1000
"""A run of months on hundreds of hosts meets hundreds of failures; what would come again at once is not restarted."""

PORTS = {"jax": 8476, "tpu": 8471, "megascale": 8080}
"""The coordinator of jax, the TPU runtime, the coordinator of several slices: their defaults, declared for readers."""

POD_RULES: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("hopeless", {"onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 5]}}, "FailJobSet"),
    (
        "savedAndStopped",
        {"onExitCodes": {"containerName": "train", "operator": "In", "values": [3]}},
        "RestartJobSetAndIgnoreMaxRestarts",
    ),
    (
        "nodeLost",
        {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        "RestartJobSetAndIgnoreMaxRestarts",
    ),
)
"""Name, what happened to a pod, what the JobSet does. What none of them says is RestartJobSet, which counts."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a manifest says beside the plan.

    Attributes:
      image: of the container, with fathom in it. namespace: of everything in the manifest.
      max_restarts: after failures that may not come again, those of hosts that were lost abruptly included.
      grace: seconds between SIGTERM and SIGKILL, into which the rest of a step, one more, and a save must fit; the
        recipe's `train.grace` unless given. A spot node that is taken away leaves its pods some 15 of them.
      service_account: of Kubernetes, for access to storage. None is the namespace's default.
      spot: ask for nodes that may be taken away. node_selector: labels that nodes must have beside the slice's.
      env: variables of the container. env_from_secret: names of Secrets of which each key is one.
      label: of the JobSet, for queues and the like. context: kubectl's, the current one unless given.
    """

    image: str
    namespace: str = "default"
    max_restarts: int = MAX_RESTARTS
    grace: int | None = None
    service_account: str | None = None
    spot: bool = False
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env_from_secret: Sequence[str] = ()
    label: Mapping[str, str] = dataclasses.field(default_factory=dict)
    context: str | None = None


def longest_name(topology: Topology) -> int:
    """How long a JobSet's name may be: names of pods, <name>-slice-<job>-<pod>-<5 letters>, are labels of 63."""
    suffix = f"-{JOB}-{topology.slices - 1}-{topology.hosts_per_slice - 1}-xxxxx"
    return 63 - len(suffix)


def text(plan: Plan, options: Options) -> str:
    """The manifest: a ConfigMap with the resolved recipe and the JobSet, as YAML of two documents."""
    # The name says which recipe: another launch under this name must not change what a running JobSet restarts with.
    name = f"{plan.name}-recipe-{plan.recipe.digest()[:8]}"
    namespace, labels = options.namespace, {MANAGED_BY: "fathom", INSTANCE: plan.name}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "immutable": True,
        "data": {RECIPE_FILE: plan.recipe_yaml},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": plan.name,
            "namespace": namespace,
            "labels": {**labels, **options.label},
            # One slice is one node pool: without this, pods of a slice could be spread over two.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {"maxRestarts": options.max_restarts, "rules": _jobset_rules()},
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": plan.topology.slices,
                    "template": {"spec": _job(plan, options, name)},
                }
            ],
        },
    }
    # Aliases (&id001) for what both documents hold would be right, and hard to read.
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    dumper.add_representer(str, _text)
    return yaml.dump_all([config, jobset], Dumper=dumper, sort_keys=False, width=120, allow_unicode=True)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """The recipe as a block of lines."""
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _jobset_rules() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {number}$"],
        }
        for number, (name, _, action) in enumerate(POD_RULES)
    ]


def _job(plan: Plan, options: Options, config_map: str) -> dict[str, Any]:
    hosts = plan.topology.hosts_per_slice
    template: dict[str, Any] = {"spec": _pod(plan, options, config_map)}
    if any(volume.is_bucket for volume in plan.volumes):
        template = {"metadata": {"annotations": dict(POD_ANNOTATIONS)}, **template}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", **rule} for _, rule, _ in POD_RULES]},
        "template": template,
    }


def _pod(plan: Plan, options: Options, config_map: str) -> dict[str, Any]:
    topology = plan.topology
    selector = {
        ACCELERATOR: topology.generation.gke_accelerator,
        TOPOLOGY: "x".join(map(str, topology.shape)),
        **options.node_selector,
    }
    pod: dict[str, Any] = {"nodeSelector": selector}
    if options.spot:
        selector[SPOT] = "true"
        # Set by GKE on such nodes; pods that do not tolerate it are not placed there.
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if options.service_account is not None:
        pod["serviceAccountName"] = options.service_account
    named = {f"volume-{number}": volume for number, volume in enumerate(plan.volumes)}
    return pod | {
        "restartPolicy": "Never",  # what podFailurePolicy asks for; a host alone could not join the others again
        "terminationGracePeriodSeconds": plan.grace(options.grace),
        # Else Python is process 1, to which SIGTERM does nothing until the training listens for it.
        "shareProcessNamespace": True,
        "containers": [_container(options, topology.chips_per_host, named)],
        "volumes": [
            {"name": "recipe", "configMap": {"name": config_map}},
            *(volume.manifest(name) for name, volume in named.items()),
        ],
    }


def _container(options: Options, num_chips: int, volumes: Mapping[str, Volume]) -> dict[str, Any]:
    chips = {"google.com/tpu": num_chips}
    container: dict[str, Any] = {
        "name": "train",
        "image": options.image,
        # The program itself, no shell before it: SIGTERM reaches Python, and its exit code is the pod's.
        "command": ["python", "-m", "fathom", "train", f"{RECIPE_FOLDER}/{RECIPE_FILE}"],
        "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
        "resources": {"requests": dict(chips), "limits": dict(chips)},
        "volumeMounts": [
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
            *(volume.mount(name) for name, volume in volumes.items()),
        ],
    }
    if options.env:
        container["env"] = [{"name": name, "value": for_kubernetes(value)} for name, value in options.env.items()]
    if options.env_from_secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.env_from_secret]
    return container


def check_slices(topology: Topology) -> None:
    """ArgumentProblem for slices that GKE does not join."""
    if topology.slices > 1 and topology.hosts_per_slice == 1:
        raise ArgumentProblem(
            f"{topology}: GKE joins slices of several hosts each, and {topology.slice_name} has one; use larger "
            "slices, or one slice"
        )


def check(plan: Plan, options: Options) -> None:
    """ArgumentProblem for slices that GKE does not join, and names that Kubernetes does not take."""
    check_slices(plan.topology)
    for option, value in (("--namespace", options.namespace), ("--service-account", options.service_account)):
        if value is not None and not (re.fullmatch(NAME, value) and len(value) <= 63):
            raise ArgumentProblem(
                f"{option} is {value!r}, expected at most 63 lower-case letters, digits and '-', a letter first and no "
                "'-' last; correct it"
            )
    for name in options.env_from_secret:
        if not re.fullmatch(OBJECT, name):
            raise ArgumentProblem(
                f"--env-from-secret is {name!r}, expected the name of a Secret of the namespace: lower-case letters, "
                "digits, '-' and '.'; correct it"
            )


def _kubectl(options: Options) -> list[str]:
    return ["kubectl", *([f"--context={options.context}"] if options.context else [])]


def _delete(plan: Plan, options: Options, kinds: str) -> str:
    """A command for the user, which deletes what was launched under the plan's name; recipes are ConfigMaps."""
    found = ["-n", options.namespace, "-l", f"{MANAGED_BY}=fathom,{INSTANCE}={plan.name}"]
    return shlex.join([*_kubectl(options), "delete", kinds, *found])


def run(plan: Plan, options: Options) -> None:
    """Gives the manifest to kubectl, unless a JobSet of that name is there; prints how to delete all of it.

    Raises:
      MissingToolError, LaunchError: when kubectl is not there, or fails; when the name is taken.
    """
    program = find_tool("kubectl", "install it: gcloud components install kubectl")
    kubectl = [program, *_kubectl(options)[1:]]
    where = ["jobset", plan.name, "-n", options.namespace]
    if ask_tool([*kubectl, "get", *where, "--ignore-not-found", "-o", "name"]):
        raise LaunchError(
            f"JobSet {plan.name} is there already, running or ended, and nothing was launched; to launch again: "
            f"{shlex.join([*_kubectl(options), 'delete', *where])}. The checkpoints in {plan.recipe.checkpoint_dir} "
            "stay, and the next launch resumes from the newest. The recipes of its launches stay too, as ConfigMaps; "
            f"once it is deleted, {_delete(plan, options, 'configmap')} deletes them"
        )
    run_tool([*kubectl, "apply", "-f", "-"], stdin=text(plan, options))
    print(f"delete it, and the recipes of all launches of its name: {_delete(plan, options, 'jobset,configmap')}")
