"""TPU VMs of Compute Engine through gcloud: a queued resource, then the same commands over ssh on all hosts.

Nothing here restarts a run or knows an exit code: a host that is lost ends the run, and the same launch again resumes
it on what there is. The hosts stay, and cost, until they are deleted: gcloud compute tpus queued-resources delete NAME.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import time
from collections.abc import Sequence

from fathom.cli_problem import ArgumentProblem
from fathom.launch.plan import LaunchError, Plan, find_tool, run_tool
from fathom.topology import Topology

RECIPE = "fathom-recipe.yaml"
ENDED = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")
POLL_SECONDS = 30
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Images of the hosts that Cloud TPU names for jax on each generation."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the commands say beside the plan.

    Attributes:
      project, zone: where. install: a shell command that installs fathom on a host.
      runtime: image of the hosts, that of the generation unless given. spot: hosts that may be taken away.
      reserved: take them from a reservation.
    """

    project: str
    zone: str
    install: str = "pip install --upgrade 'fathom-jax[tpu]'"
    runtime: str | None = None
    spot: bool = False
    reserved: bool = False


@dataclasses.dataclass(frozen=True)
class Commands:
    """The launch as gcloud commands, each a list of words, in order.

    Attributes:
      describe: prints the state of the queued resource. create: makes it, where it is not there.
      on_hosts: once it is ACTIVE. delete: for afterwards, run by nobody.
    """

    describe: list[str]
    create: list[str]
    on_hosts: list[list[str]]
    delete: list[str]


def longest_name(topology: Topology) -> int:
    """How long a name may be: a node's is the name and its number."""
    return 63 - len(f"-{topology.slices - 1}")


def check(plan: Plan, options: Options) -> None:
    """ArgumentProblem for what queued resources do not have."""
    generation = plan.topology.generation
    if generation.name not in RUNTIMES:
        raise ArgumentProblem(f"{plan.topology}: {generation.label} is there in GKE only; use --on jobset or --on xpk")
    if options.spot and options.reserved:
        raise ArgumentProblem("--spot and --reserved: hosts are one or the other; leave one out")


def commands(plan: Plan, options: Options) -> Commands:
    """What is run."""
    topology = plan.topology
    where = [f"--project={options.project}", f"--zone={options.zone}"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = [f"--node-id={plan.name}"]
    if topology.slices > 1:
        nodes = [f"--node-count={topology.slices}", f"--node-prefix={plan.name}"]
    create = [
        *queued,
        "create",
        plan.name,
        *where,
        # Chips and their arrangement: an accelerator type does not say which of several shapes.
        f"--type={topology.generation.cloud_prefix}",
        f"--topology={'x'.join(map(str, topology.shape))}",
        f"--runtime-version={options.runtime or RUNTIMES[topology.generation.name]}",
        *nodes,
        *(["--spot"] if options.spot else []),
        *(["--reserved"] if options.reserved else []),
    ]

    everywhere = [*queued, "ssh", plan.name, *where, "--node=all", "--worker=all", "--batch-size=all"]

    def on_all(text: str) -> list[str]:
        return [*everywhere, f"--command={text}"]

    return Commands(
        describe=[*queued, "describe", plan.name, *where, "--format=value(state.state)"],
        create=create,
        on_hosts=[
            on_all(plan.write_recipe_command(RECIPE)),
            on_all(options.install),
            on_all(f"exec python3 -m fathom train {RECIPE}"),
        ],
        delete=[*queued, "delete", plan.name, *where, "--force"],
    )


def text(plan: Plan, options: Options) -> str:
    """The launch as a shell script."""
    made = commands(plan, options)
    describe = shlex.join(made.describe)
    lines = [
        "set -e",
        f"{describe} > /dev/null 2>&1 || {shlex.join(made.create)}",
        f"while state=$({describe}) && [ \"$state\" != ACTIVE ]; do",
        f"  case $state in {'|'.join(ENDED)}) echo \"{plan.name} is $state\" >&2; exit 1;; esac",
        f"  sleep {POLL_SECONDS}",
        "done",
        "[ \"$state\" = ACTIVE ]",
        *map(shlex.join, made.on_hosts),
    ]
    return "\n".join(lines) + "\n"


def run(plan: Plan, options: Options) -> None:
    """Runs the commands.

    Raises:
      MissingToolError: without gcloud; nothing was started.
      LaunchError: naming the command that failed, or the state in which the hosts will never be ready.
    """
    gcloud = find_tool("gcloud", "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)")
    made = commands(plan, options)

    def real(words: Sequence[str]) -> list[str]:
        return [gcloud, *words[1:]]

    if _state(real(made.describe)) is None:
        run_tool(real(made.create))
    while (state := _state(real(made.describe))) != "ACTIVE":
        if state is None or state in ENDED:
            raise LaunchError(
                f"queued resource {plan.name} is {state or 'gone'} and will not become ACTIVE; look at it with "
                f"{shlex.join(made.describe)}, delete it with {shlex.join(made.delete)}, launch again"
            )
        time.sleep(POLL_SECONDS)
    for words in made.on_hosts:
        run_tool(real(words))


def _state(describe: Sequence[str]) -> str | None:
    """The queued resource's state; None where there is none of that name."""
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
        return None
    raise LaunchError(f"{shlex.join(describe)} failed with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
