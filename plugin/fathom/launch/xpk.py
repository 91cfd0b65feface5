"""One `xpk workload create`, which makes and applies a JobSet of its own; for xpk 1.0 or newer.

xpk runs the command in a shell that it signals; `exec` puts Python in the shell's place, so that SIGTERM reaches it.
Its JobSet fails at once for all exit codes but those of `RESTARTING`, 42 and 127 to 255 (ended by a signal), with which
it starts anew up to `--max-restarts` times: code 3 (saved and stopped) is counted as well. 2 (the recipe is wrong) and
5 (the same would happen again) are not among them. Data and run folders come from storages that the cluster mounts into
every workload (`xpk storage attach`).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from fathom.cli_problem import ArgumentProblem
from fathom.launch import jobset
from fathom.launch.passed import for_kubernetes
from fathom.launch.plan import Plan, find_tool, run_tool
from fathom.topology import Topology

RECIPE = "/tmp/fathom-recipe.yaml"
RESTARTING = (1, 3, 4)
"""Exit codes of `fathom train` after which a restart may help: failed, saved and stopped, ended by the watchdog."""

UNKNOWN = {"v5e": ("1x1", "2x2")}
LONGEST_SIDE = 256
"""Of the slices that there are, those that xpk has no name for."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command says beside the plan.

    Attributes:
      image: of the container, with fathom in it. cluster, project, zone: where; the last two as xpk has them, unless
        given.
      max_restarts: after all that restarts. grace: seconds between SIGTERM and SIGKILL, into which the rest of a step,
        one more, and a save must fit; the recipe's `train.grace` unless given. spot: take preemptible capacity.
      env: variables of the container. extra: arguments that xpk gets as they are.
    """

    image: str
    cluster: str
    project: str | None = None
    zone: str | None = None
    max_restarts: int = jobset.MAX_RESTARTS
    grace: int | None = None
    spot: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Sequence[str] = ()


def longest_name(topology: Topology) -> int:
    """How long a workload's name may be."""
    return 40


def check(plan: Plan, options: Options) -> None:
    """ArgumentProblem for slices that GKE does not join, or that xpk has no name for; for variables that it spoils."""
    jobset.check_slices(plan.topology)
    tpu_type(plan.topology)
    # It puts values between double quotes of YAML, and changes nothing in them.
    if wrong := [name for name, value in options.env.items() if re.search(r'["\\\n\r]', value)]:
        raise ArgumentProblem(
            f"--env {', '.join(wrong)}: xpk spoils values with a double quote, a backslash or a line's end; write it "
            "without, or use --on jobset"
        )


def tpu_type(topology: Topology) -> str:
    """xpk's name of a slice of this very shape, "v5p-4x4x32": a number of chips would be xpk's choice of shapes.

    Raises:
      ArgumentProblem: for a shape that xpk does not know.
    """
    shape, generation = "x".join(map(str, topology.shape)), topology.generation
    if shape in UNKNOWN.get(generation.name, ()) or max(topology.shape) > LONGEST_SIDE:
        raise ArgumentProblem(
            f"{topology}: xpk knows no slice {shape} of {generation.label}; use --on jobset, or another --topology"
        )
    return f"{generation.cloud_prefix}-{shape}"


def command(plan: Plan, options: Options) -> list[str]:
    """The command, its program first."""
    train = f"{plan.write_recipe_command(RECIPE)} && exec python -m fathom train {RECIPE}"
    words = [
        "xpk",
        "workload",
        "create",
        f"--workload={plan.name}",
        f"--cluster={options.cluster}",
        f"--tpu-type={tpu_type(plan.topology)}",
        f"--num-slices={plan.topology.slices}",
        f"--docker-image={options.image}",
        f"--max-restarts={options.max_restarts}",
        f"--restart-on-exit-codes={','.join(map(str, RESTARTING))}",
        f"--termination-grace-period-seconds={plan.grace(options.grace)}",
        f"--command={train}",
    ]
    words += [f"--{name}={value}" for name in ("project", "zone") if (value := getattr(options, name))]
    words += [f"--env={name}={for_kubernetes(value)}" for name, value in options.env.items()]
    return [*words, *(["--spot"] if options.spot else []), *options.extra]


def text(plan: Plan, options: Options) -> str:
    """The command as a line of shell, and the recipe in it as comments."""
    return f"{shlex.join(command(plan, options))}\n{plan.recipe_comment()}"


def run(plan: Plan, options: Options) -> None:
    """Runs it; MissingToolError or LaunchError when xpk is not there, or fails."""
    xpk = find_tool("xpk", "install it: pip install xpk")
    run_tool([xpk, *command(plan, options)[1:]])
