"""What is launched, wherever it is launched: the resolved recipe, the slices, the hosts, a name; checked together."""

from __future__ import annotations

import base64
import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence

from fathom.cli_problem import ArgumentProblem
from fathom.launch import checks
from fathom.launch.volumes import Volume
from fathom.recipe import Recipe, load_recipe
from fathom.topology import EXAMPLE, Topology, TopologyError, parse_topology

NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
"""A label of DNS (RFC 1123) that begins with a letter, as names of services must."""


class MissingToolError(OSError):
    """A program that launching needs is not installed; nothing was started."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to start on a cluster.

    Attributes:
      recipe: resolved, overrides applied. topology: the slices. name: of the workload.
      notes: what the user should know before it runs, one sentence each. volumes: what its hosts mount.
    """

    recipe: Recipe
    topology: Topology
    name: str
    notes: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()

    def grace(self, given: int | None) -> int:
        """Seconds from SIGTERM to SIGKILL: those given, else the recipe's."""
        return self.recipe.train.grace if given is None else given

    @property
    def recipe_yaml(self) -> str:
        """The resolved recipe: what was planned is what runs, whatever lies in the image."""
        return self.recipe.to_yaml()

    def write_recipe_command(self, path: str) -> str:
        """A shell command that writes the resolved recipe to `path`, free of characters that a shell would change."""
        encoded = base64.b64encode(self.recipe_yaml.encode()).decode()
        return f"echo {encoded} | base64 -d > {path}"

    def recipe_comment(self) -> str:
        """The same recipe as comments of a shell, for those who read the command."""
        lines = ["the recipe that is written there:", "", *self.recipe_yaml.rstrip("\n").split("\n")]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def make_plan(
    source: str,
    overrides: Sequence[str],
    *,
    target: str,
    topology: str | None = None,
    hosts: int | None = None,
    name: str | None = None,
    longest_name: Callable[[Topology], int] = lambda topology: 63,
    volumes: Sequence[Volume] = (),
) -> Plan:
    """The plan of a recipe for a cluster.

    Args:
      source, overrides: see `load_recipe`. target: where to, for the texts of errors.
      topology: in place of the recipe's `mesh.topology`. hosts: how many the caller counts on, to be checked.
      name: of the workload, made from the recipe's name unless given. longest_name: of those that the target takes, in
        characters. volumes: what its hosts mount.

    Raises:
      ArgumentProblem: for a topology, a number of hosts or a name that does not fit.
      RecipeError: when the recipe cannot run on the slices; every problem at once.
    """
    if topology is not None:
        try:
            parse_topology(topology)
        except TopologyError as error:
            raise ArgumentProblem(f"--topology: {error}") from None
        overrides = [*overrides, f"mesh.topology={topology}"]
    recipe = load_recipe(source, overrides, elsewhere=True)
    if recipe.mesh.topology is None:
        raise ArgumentProblem(
            f"--on {target} needs to know the slice, and recipe {recipe.name} has no mesh.topology; give --topology, "
            f"or mesh.topology in the recipe, {EXAMPLE}"
        )
    slices = parse_topology(recipe.mesh.topology)
    checks.check_recipe(recipe, slices, target, volumes)
    if hosts is not None and hosts != slices.hosts:
        raise ArgumentProblem(
            f"--hosts is {hosts}, and {slices} has {slices.hosts}: {slices.slices} x {slices.hosts_per_slice} of "
            f"{slices.chips_per_host} chips each; leave --hosts out, or name the slice that has {hosts}"
        )
    chosen = check_name(name, recipe.name, longest_name(slices))
    return Plan(recipe, slices, chosen, tuple(checks.notes(recipe, slices, target, volumes)), tuple(volumes))


def check_name(name: str | None, recipe_name: str, longest: int) -> str:
    """The workload's name; ArgumentProblem when it is no DNS label of at most `longest` characters."""
    chosen = name if name is not None else re.sub(r"[^a-z0-9]+", "-", recipe_name.lower()).strip("-")
    if re.fullmatch(NAME, chosen) and len(chosen) <= longest:
        return chosen
    origin = "--name" if name is not None else f"the name made of recipe {recipe_name}"
    raise ArgumentProblem(
        f"{origin} is {chosen!r} ({len(chosen)} characters), expected at most {longest} lower-case letters, digits and "
        "'-', a letter first and no '-' last; give --name"
    )


def find_tool(name: str, how: str) -> str:
    """The path of a program.

    Args:
      how: to get it, for the text of the error.

    Raises:
      MissingToolError: when it is not on PATH.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(
            f"{name} is not installed (not on PATH), nothing was launched; {how}, or add --dry-run to print what it "
            "would be given"
        )
    return path


def run_tool(command: Sequence[str], stdin: str | None = None) -> None:
    """Runs a command to its end, its output going where ours goes.

    Raises:
      LaunchError: naming the command, when it fails.
    """
    done = subprocess.run(command, input=stdin, text=True, check=False)
    if done.returncode:
        raise LaunchError(_failed(command, done.returncode))


def ask_tool(command: Sequence[str]) -> str:
    """What a command prints.

    Raises:
      LaunchError: naming the command, when it fails.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LaunchError(_failed(command, done.returncode))
    return done.stdout.strip()


def _failed(command: Sequence[str], code: int) -> str:
    return f"{shlex.join(command)[:300]} failed with exit code {code}; its own message is above"


class LaunchError(RuntimeError):
    """A program that was started to launch the recipe has failed, or what it was to make is there already."""
