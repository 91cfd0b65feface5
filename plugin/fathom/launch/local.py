"""Several processes on this machine, as a slice would have them: a rehearsal of a launch, with simulated devices.

Each process gets an equal share of `mesh.simulated_devices`; they talk to each other through gloo. Process 0's output
is shown as it is, that of process i after "[i] ".
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

from fathom.cli_problem import ArgumentProblem
from fathom.distributed import ADDRESS, COUNT, INDEX
from fathom.host_memory import host_memory
from fathom.launch import checks
from fathom.launch.rank import LAUNCHER, UNBUFFERED
from fathom.recipe import Recipe
from fathom.recipe_checks import Problem, RecipeError

DONE, FAILED, PREEMPTED, INTERRUPTED = 0, 1, 3, 130
TAIL_LINES = 15


def check(recipe: Recipe, hosts: int) -> None:
    """Refuses what this machine cannot simulate.

    Raises:
      ArgumentProblem: for a number of hosts below 1.
      RecipeError: when several hosts have no simulated devices to share, or cannot share them evenly; for whatever
        `checks.check_rehearsal` finds.
    """
    if hosts < 1:
        raise ArgumentProblem(f"--hosts is {hosts}, expected at least 1")
    simulated = recipe.mesh.simulated_devices
    key, expected = "mesh.simulated_devices", f"a multiple of {hosts}, which the processes share"
    if hosts > 1 and simulated is None:
        raise RecipeError([Problem(key, "nothing", expected, "set it to the product of the mesh axes")], recipe.name)
    if simulated is not None and simulated % hosts:
        raise RecipeError([Problem(key, f"{simulated}", expected, "change it, or --hosts")], recipe.name)
    checks.check_rehearsal(recipe, host_memory())


def environments(hosts: int, env: Mapping[str, str]) -> list[dict[str, str]]:
    """What each process finds in its environment beside ours; `env`: what all of them do."""
    if hosts == 1:
        return [dict(env)]
    address = f"localhost:{_free_port()}"
    return [{ADDRESS: address, COUNT: str(hosts), INDEX: str(i), **env} for i in range(hosts)]


def commands(arguments: Sequence[str], hosts: int, env: Mapping[str, str]) -> list[str]:
    """A line of shell for each process, to be started side by side."""
    train = [sys.executable, "-m", "fathom", "train", *arguments]
    lines = []
    for settings in environments(hosts, env):
        values = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
        lines.append(" ".join([*values, shlex.join(train)]))
    return lines


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """The processes of a run, each the leader of a process group of its own; a context that leaves none behind.

    Args:
      arguments: of `fathom train`. hosts: how many processes.
      grace: seconds that the others have to end once one has ended. env: variables of all of them, beside ours.
    """

    def __init__(self, arguments: Sequence[str], hosts: int, grace: float, env: Mapping[str, str]):
        self._arguments, self._hosts, self._grace, self._env = list(arguments), hosts, grace, env
        self._started: list[subprocess.Popen] = []
        self._readers: list[list[threading.Thread]] = []
        self._tails = [collections.deque(maxlen=TAIL_LINES) for _ in range(hosts)]
        self._ends: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._signals: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._forward)
        try:
            for index, settings in enumerate(environments(self._hosts, self._env)):
                self._start(index, settings)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._started:
            self._kill(process)
        for process in self._started:
            process.wait()
        for index in range(len(self._readers)):
            self._read_out(index)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "fathom.launch.rank", "train", *self._arguments]

    def _start(self, index: int, settings: dict[str, str]) -> None:
        if self._signals:
            return  # told to stop before all were started: those that are will not find the others, and end
        process = subprocess.Popen(
            self._command(),
            env=os.environ | settings | {LAUNCHER: str(os.getpid()), UNBUFFERED: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # its own group: ended as a whole, and a Ctrl-C reaches it through us alone
        )
        self._started.append(process)
        if self._signals:  # came while it was being started
            process.send_signal(self._signals[-1])
        readers = [
            threading.Thread(target=self._show, args=(index, process.stdout, sys.stdout), daemon=True),
            threading.Thread(target=self._show, args=(index, process.stderr, sys.stderr), daemon=True),
        ]
        for reader in readers:
            reader.start()
        self._readers.append(readers)
        threading.Thread(target=lambda: self._ends.put((index, process.wait())), daemon=True).start()

    def _show(self, index: int, source: IO[str], sink: IO[str]) -> None:
        prefix = f"[{index}] " if index else ""
        with source:
            for line in source:
                self._tails[index].append(line.rstrip("\n"))
                with contextlib.suppress(OSError):  # nobody reads us any more; the process must not wait for that
                    sink.write(prefix + line)
                    sink.flush()

    def _read_out(self, index: int) -> None:
        """Waits until all that an ended process has said is shown."""
        for reader in self._readers[index]:
            reader.join(timeout=5)  # what it has started may hold the pipe open

    def _forward(self, number: int, frame: Any) -> None:
        """Passes a signal on; the second one kills."""
        again = bool(self._signals)
        self._signals.append(number)
        for process in self._started:
            if again:
                self._kill(process)
            elif process.poll() is None:
                process.send_signal(number)

    def _kill(self, process: subprocess.Popen) -> None:
        """Ends a process and whatever it has started, that which outlived it included."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # the group is empty; macOS refuses for one that holds only the dead

    def wait(self) -> int:
        """Waits until all have ended, which is soon after the first one has; gives the exit code of the launch."""
        ends: list[tuple[int, int]] = []
        overdue: list[int] = []
        deadline = None
        while len(ends) < len(self._started):
            left = None if deadline is None else max(deadline - time.monotonic(), 0.01)
            try:
                # Without a limit the main thread would sit in a lock, where Python delivers no signals.
                ends.append(self._ends.get(timeout=min(left or 0.5, 0.5)))
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline and not overdue:
                    overdue = [i for i in range(len(self._started)) if i not in dict(ends)]
                    for index in overdue:
                        self._kill(self._started[index])
                continue
            if len(ends) == 1:
                deadline = time.monotonic() + self._grace
            if ends[-1][1] not in (DONE, PREEMPTED) and not self._signals:
                for process in self._started:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
        return self._verdict(ends, overdue)

    def _verdict(self, ends: Sequence[tuple[int, int]], overdue: Sequence[int]) -> int:
        failed = [(i, code) for i, code in ends if code not in (DONE, PREEMPTED) and i not in overdue]
        if not ends:  # told to stop before anything was started
            return INTERRUPTED if signal.SIGINT in self._signals else FAILED
        if failed and self._signals and signal.SIGINT in self._signals:
            print("fathom launch: interrupted", file=sys.stderr)
            return INTERRUPTED
        if failed:
            index, code = failed[0]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            if code == -signal.SIGTERM and signal.SIGTERM in self._signals:
                how += " before it could save"
            self._read_out(index)
            print(f"fathom launch: process {index} of {self._hosts} {how}; its last lines:", file=sys.stderr)
            for line in self._tails[index]:
                print(f"  {line}", file=sys.stderr)
            return code if code > 0 else FAILED
        if overdue:
            named = ", ".join(map(str, overdue))
            print(
                f"fathom launch: processes {named} of {self._hosts} had to be killed, {self._grace:g} s after the "
                "first had ended",
                file=sys.stderr,
            )
            return FAILED
        return PREEMPTED if PREEMPTED in dict(ends).values() else DONE


def run(arguments: Sequence[str], hosts: int, grace: float, env: Mapping[str, str] = MappingProxyType({})) -> int:
    """Trains as `hosts` processes here.

    SIGTERM and SIGINT are passed on to all of them. A process that fails, or ends without the others, ends the run.

    Args:
      arguments: of `fathom train`: the recipe and its overrides.
      grace: seconds that the others have to end once one has ended.
      env: variables of all of them, beside ours.

    Returns:
      0 when all are done, 3 when all have saved and stopped for preemption, 130 when interrupted, 1 when one was ended
      by a signal or had to be killed; else the exit code of the first to fail: 2 (the recipe is wrong), 4 (ended by the
      watchdog) and 5 (diverged) among them.
    """
    with Processes(arguments, hosts, grace, env) as processes:
        return processes.wait()
