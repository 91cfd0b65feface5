"""What the user has a launch pass on, as NAME=VALUE: variables of the run's environment, labels, node selectors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fathom.cli_problem import ArgumentProblem
from fathom.distributed import ADDRESS, COUNT, INDEX
from fathom.launch.rank import LAUNCHER, UNBUFFERED

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL = rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_WORD}"
LABEL_VALUE = rf"({_WORD})?"

PROCESSES = (ADDRESS, COUNT, INDEX)
"""By which processes are told of each other."""
WORKERS = (
    "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID",
)  # fmt: skip
"""By which hosts of TPUs are."""


def read_environment(texts: Sequence[str], target: str) -> dict[str, str]:
    """The variables of --env NAME=VALUE.

    Raises:
      ArgumentProblem: naming everything wrong, and no value: it may be a key that is nobody else's business.
    """
    own = (*PROCESSES, LAUNCHER, UNBUFFERED) if target == "local" else (*PROCESSES, *WORKERS)
    why = "is set by the launch, or by the cluster, for each process; leave it out"
    expected = "letters, digits and '_', no digit first"
    return _read("--env", texts, VARIABLE, expected, dict.fromkeys(own, why))


def read_labels(option: str, texts: Sequence[str], taken: Mapping[str, str]) -> dict[str, str]:
    """Labels of Kubernetes, or what selects nodes by theirs.

    Args:
      taken: names that the launch sets -> what to do about it.

    Raises:
      ArgumentProblem: naming everything wrong.
    """
    found = _read(option, texts, LABEL, "a label's, for example kueue.x-k8s.io/queue-name", taken)
    if wrong := [name for name, value in found.items() if not re.fullmatch(LABEL_VALUE, value)]:
        raise ArgumentProblem(
            "; ".join(
                f"{option} {name} is {found[name]!r}, expected at most 63 letters, digits, '-', '_' and '.', the first "
                "and the last of them letters or digits; correct it"
                for name in wrong
            )
        )
    return found


def _read(option: str, texts: Sequence[str], form: str, expected: str, taken: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(form, name):
            problems.append(f"{option} has the name {name!r}, expected {expected}; correct it")
        elif not equals:
            problems.append(f"{option} {name} has no value, expected {option} {name}=VALUE")
        elif name in taken:
            problems.append(f"{option} {name}: this {taken[name]}")
        elif name in found:
            problems.append(f"{option} {name} is given twice, expected once; leave one out")
        found[name] = value
    if problems:
        raise ArgumentProblem("; ".join(problems))
    return found


def for_kubernetes(value: str) -> str:
    """A variable's value as manifests have it: $(NAME) in it would be another variable's."""
    return value.replace("$", "$$")
