"""One `xpk workload create`, which makes and applies a JobSet of its own.

xpk runs the command in a shell that it signals; `exec` puts Python in the shell's place, so that SIGTERM reaches it.
xpk does not tell exit codes apart: with `--restart-on-user-code-failure`, code 3 (saved and stopped) restarts, up to
`--max-restarts` times, and so does any other, 2 (the recipe is wrong) included. Of several shapes with as many chips
xpk takes its own.
"""

from __future__ import annotations

import dataclasses
import shlex

from fathom.launch import jobset
from fathom.launch.plan import Plan, find_tool, run_tool
from fathom.topology import Topology

RECIPE = "/tmp/fathom-recipe.yaml"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command says beside the plan.

    Attributes:
      image: of the container, with fathom in it. cluster, project, zone: where; the last two as xpk has them, unless
        given.
      max_restarts: after any failure. grace: seconds between SIGTERM and SIGKILL. spot: take preemptible capacity.
    """

    image: str
    cluster: str
    project: str | None = None
    zone: str | None = None
    max_restarts: int = 10
    grace: int = 600
    spot: bool = False


def longest_name(topology: Topology) -> int:
    """How long a workload's name may be."""
    return 40


def check(plan: Plan, options: Options) -> None:
    """ArgumentProblem for slices that GKE does not join."""
    jobset.check_slices(plan.topology)


def command(plan: Plan, options: Options) -> list[str]:
    """The command, its program first."""
    train = f"{plan.write_recipe_command(RECIPE)} && exec python -m fathom train {RECIPE}"
    words = [
        "xpk",
        "workload",
        "create",
        f"--workload={plan.name}",
        f"--cluster={options.cluster}",
        f"--tpu-type={plan.topology.accelerator_type}",
        f"--num-slices={plan.topology.slices}",
        f"--docker-image={options.image}",
        f"--max-restarts={options.max_restarts}",
        "--restart-on-user-code-failure",
        f"--termination-grace-period-seconds={options.grace}",
        f"--command={train}",
    ]
    words += [f"--{name}={value}" for name in ("project", "zone") if (value := getattr(options, name))]
    return [*words, "--spot"] if options.spot else words


def text(plan: Plan, options: Options) -> str:
    """The command as a line of shell."""
    return shlex.join(command(plan, options)) + "\n"


def run(plan: Plan, options: Options) -> None:
    """Runs it; MissingToolError or LaunchError when xpk is not there, or fails."""
    xpk = find_tool("xpk", "install it: pip install xpk")
    run_tool([xpk, *command(plan, options)[1:]])
