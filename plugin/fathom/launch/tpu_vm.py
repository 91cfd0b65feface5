"""TPU VMs of Compute Engine through gcloud: a queued resource, then the same commands over ssh on all hosts.

The hosts' own Python is too old: each gets an environment of its own, made by uv, which brings a Python. The run is
started apart from the ssh session and goes on when that ends. A lock is held for as long as it lives, so that gcloud,
which repeats a command when the connection breaks, or another launch starts no second one beside it. A launch that
succeeds has started the run on all hosts, no more: how it ended is in the log on the hosts, exit code included.

Nothing here restarts a run: a host that is lost ends it, and the same launch again resumes it on what there is. The
hosts stay, and cost, until they are deleted: gcloud compute tpus queued-resources delete NAME.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fathom.cli_problem import ArgumentProblem
from fathom.launch.plan import LaunchError, Plan, find_tool, run_tool
from fathom.topology import Topology

# On a host. None of these may be quoted: its shell knows where ~ is.
FOLDER = "~/fathom-run"
LOCK, LOG, PID = f"{FOLDER}/lock", f"{FOLDER}/log", f"{FOLDER}/pid"
ENVIRONMENT = "~/fathom-env"
PYTHON = f"{ENVIRONMENT}/bin/python"
UV = "~/.local/bin/uv"

PACKAGE = "fathom-jax"
WITH_TPU = f"{PACKAGE}[tpu]"
REQUIREMENT = r"(?:{name} *@ *)?[\w+]+://\S+|{name}(?: *[<>=!~][^;@]+)?".format(name=r"\w[\w.-]*(?:\[[\w,.-]+\])?")
"""A URL, with or without a name before it, or a name with or without versions; no command of a shell."""

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
      project, zone: where. install: what to install on the hosts: a wheel here, a URL, or a requirement.
      runtime: image of the hosts, that of the generation unless given. spot: hosts that may be taken away.
      reserved: take them from a reservation. extra: arguments of `create`, as they are.
      setup: a command of a shell, run on every host before each start. env: variables of the run.
    """

    project: str
    zone: str
    install: str = WITH_TPU
    runtime: str | None = None
    spot: bool = False
    reserved: bool = False
    extra: Sequence[str] = ()
    setup: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def wheel(self) -> Path | None:
        """The file here that is to be copied to the hosts."""
        return Path(self.install) if self.install.endswith(".whl") and "://" not in self.install else None


@dataclasses.dataclass(frozen=True)
class Commands:
    """The launch as gcloud commands, each a list of words, in order.

    Attributes:
      describe: prints the state of the queued resource. create: makes it, where it is not there.
      on_hosts: once it is ACTIVE; the last starts the run.
      follow, stop, delete: for afterwards, run by nobody: the log of the first host; a checkpoint and the end, on all
        hosts; the end of the hosts.
    """

    describe: list[str]
    create: list[str]
    on_hosts: list[list[str]]
    follow: list[str]
    stop: list[str]
    delete: list[str]


def longest_name(topology: Topology) -> int:
    """How long a name may be: a node's is the name and its number."""
    return 63 - len(f"-{topology.slices - 1}")


def check(plan: Plan, options: Options) -> None:
    """ArgumentProblem for what queued resources do not have, and for what cannot be installed."""
    generation = plan.topology.generation
    if generation.name not in RUNTIMES:
        raise ArgumentProblem(f"{plan.topology}: {generation.label} is there in GKE only; use --on jobset or --on xpk")
    if options.spot and options.reserved:
        raise ArgumentProblem("--spot and --reserved: hosts are one or the other; leave one out")
    if options.wheel is not None and not options.wheel.is_file():
        raise ArgumentProblem(f"--install: there is no wheel {options.install}; build it (pip wheel --no-deps .)")
    if options.wheel is None and not re.fullmatch(REQUIREMENT, options.install):
        raise ArgumentProblem(
            f"--install is {options.install!r}, expected a wheel here (dist/....whl), a URL (git+https://..., or of a "
            f"wheel) or a requirement ({WITH_TPU}==0.1.0); uv installs it into {ENVIRONMENT} on every host"
        )


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
        *options.extra,
    ]

    ssh, everywhere = [*queued, "ssh", plan.name, *where], ["--node=all", "--worker=all"]

    def on_all(text: str) -> list[str]:
        return [*ssh, *everywhere, f"--command={text}"]

    recipe = f"{FOLDER}/recipe-{plan.recipe.digest()[:8]}.yaml"
    copy = []
    if options.wheel is not None:
        to = f"{plan.name}:{FOLDER.removeprefix('~/')}/"
        copy = [[*queued, "scp", str(options.wheel), to, *where, *everywhere]]
    setup = [on_all(_set_up(options.setup))] if options.setup else []
    start = _start(recipe, options.env)
    return Commands(
        describe=[*queued, "describe", plan.name, *where, "--format=value(state.state)"],
        create=create,
        on_hosts=[on_all(_prepare(plan, recipe)), *copy, on_all(_install(options)), *setup, on_all(start)],
        follow=[*ssh, "--node=0", "--worker=0", f"--command=tail -n 100 -F {LOG}"],
        stop=on_all(_stop()),
        delete=[*queued, "delete", plan.name, *where, "--force"],
    )


def _prepare(plan: Plan, recipe: str) -> str:
    """Refuses a host where a run goes on, before anything there is changed, and writes the recipe.

    The recipe's name tells launches apart: there is one, of the newest.
    """
    return (
        f"mkdir -p {FOLDER} && if ! flock -n {LOCK} true; then "
        'echo "$(hostname): a run is going on here; nothing was changed" >&2; exit 1; fi; '
        f"rm -f {FOLDER}/recipe-*.yaml {PID}; {plan.write_recipe_command(recipe)}"
    )


def _install(options: Options) -> str:
    """Makes the environment where there is none; fathom anew each time, what it needs only where that is not there."""
    what = shlex.quote(options.install) if options.wheel is None else f"{FOLDER}/{shlex.quote(options.wheel.name)}"
    also = "" if options.install == WITH_TPU else f" '{WITH_TPU}'"
    return (
        f"set -e; [ -x {UV} ] || python3 -m pip install --user uv; "
        f"[ -x {PYTHON} ] || {UV} venv --allow-existing --python 3.12 {ENVIRONMENT}; "
        f"{UV} pip install --python {PYTHON} --reinstall-package {PACKAGE} {what}{also}"
    )


def _set_up(command: str) -> str:
    """Runs the user's command in a shell of its own, whatever it does to that."""
    failed = 'echo "$(hostname): --setup failed with exit code $code; nothing was started here" >&2; exit $code'
    return f"sh -c {shlex.quote(command)} || {{ code=$?; {failed}; }}"


def _start(recipe: str, env: Mapping[str, str]) -> str:
    """Starts the run in a session of its own. It inherits the lock, which the system frees when the run is gone.

    Where the lock is taken although `_prepare` found it free, this very command has run before: gcloud repeats it.
    """
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in env.items())
    run = (
        f'echo "$(date -u): {recipe}"; {variables}{PYTHON} -m fathom train {recipe} & echo $! > {PID}; '
        'wait $!; code=$?; echo "$(date -u): ended with exit code $code"'
    )
    return (
        f'[ -e {recipe} ] || {{ echo "$(hostname): another launch came between; nothing was started" >&2; exit 1; }}; '
        f'exec 9>> {LOCK}; flock -n 9 || {{ echo "$(hostname): it runs"; exit 0; }}; '
        f"setsid sh -c {shlex.quote(run)} >> {LOG} 2>&1 < /dev/null &"
    )


def _stop() -> str:
    return (
        f'if flock -n {LOCK} true; then echo "$(hostname): nothing runs here"; '
        f'else kill -TERM "$(cat {PID})"; fi'
    )


def _afterwards(made: Commands) -> list[str]:
    """What the user may do once the run has been started, a line each."""
    return [
        f"follow it: {shlex.join(made.follow)}",
        f"stop it, after a checkpoint: {shlex.join(made.stop)}",
        f"delete the hosts: {shlex.join(made.delete)}",
    ]


def text(plan: Plan, options: Options) -> str:
    """The launch as a shell script, and the recipe in it as comments."""
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
        *(f"# {line}" for line in _afterwards(made)),
    ]
    return "\n".join(lines) + "\n" + plan.recipe_comment()


def run(plan: Plan, options: Options) -> None:
    """Runs the commands; returns once the run has been started on all hosts.

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
        try:
            run_tool(real(words))
        except LaunchError as error:
            raise LaunchError(f"{error}; what runs on hosts is stopped by {shlex.join(made.stop)}") from None
    print(f"{plan.name} has been started on {plan.topology.hosts} hosts and goes on there by itself")
    print("\n".join(_afterwards(made)))


def _state(describe: Sequence[str]) -> str | None:
    """The queued resource's state; None where there is none of that name."""
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
        return None
    raise LaunchError(f"{shlex.join(describe)} failed with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
