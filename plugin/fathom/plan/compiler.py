"""Compiles a recipe's train step for a slice that is not there, in a process of its own.

Where memory is concerned the compiler is done once it has scheduled the program and assigned its buffers; writing
machine code takes it many times as long again on few cores, and changes no figure here. So the process is ended at
that point, unless asked to go on. What it has found is read from the HloProtos it leaves, never from a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fathom.plan.hlo_proto import parse_hlo, parse_module
from fathom.recipe import Recipe

STEP = "jit_train_step"
"""The compiler's name of the step's program."""
REPORT = "after_optimizations-memory-usage-report.pb"
"""What the TPU's compiler writes just after the buffers, whether they fit or not."""
POLL = 0.2


class PlanError(RuntimeError):
    """The step could not be compiled, for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a step has told.

    Attributes:
      facts: see `fathom.plan.child.step_facts`. hlo: HloProto with buffers, None for a CPU. module: the program.
      refused: the compiler's words when the step needs more memory than there is, else None.
      sizes: the executable's own memory statistics, where it was made.
      seconds: to trace and compile.
    """

    facts: dict[str, Any]
    hlo: Any
    module: Any
    refused: str | None
    sizes: dict[str, int] | None
    seconds: float


def compile_step(
    recipe: Recipe, topology: str, *, codegen: bool = False, progress: Callable[[str], None] = lambda text: None
) -> Compiled:
    """Compiles the very step that `fathom train` would run.

    Args:
      topology: a slice ("v5p:8x8x8"), or "cpu".
      codegen: let the compiler write machine code too, minutes more; a CPU's always does.
      progress: told what is going on.

    Raises:
      PlanError: when it fails for another reason than memory; the text ends with the compiler's own words.
    """
    begin = time.monotonic()
    if topology != "cpu" and importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            "the TPU's compiler, libtpu, is not installed; pip install 'fathom-jax[tpu]' (no TPU is needed), or plan "
            "for this machine with --topology cpu"
        )
    with tempfile.TemporaryDirectory(prefix="fathom-plan-") as name:
        folder = Path(name)
        (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
        (folder / "topology.txt").write_text(topology)
        with _child(folder) as process:
            progress(f"tracing the step for {topology}")
            while process.poll() is None:
                if not codegen and topology != "cpu" and _assigned(folder) and (folder / "facts.json").exists():
                    break
                time.sleep(POLL)
        return _read(folder, process, time.monotonic() - begin)


@contextlib.contextmanager
def _child(folder: Path) -> Iterator[subprocess.Popen]:
    dump = folder / "hlo"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_proto --xla_dump_hlo_module_re={STEP}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which TPU this machine is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment.pop("JAX_COORDINATOR_ADDRESS", None)
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fathom.plan.child", str(folder)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _assigned(folder: Path) -> Path | None:
    """The HloProto with buffers, once the compiler has moved on from writing it."""
    for report in (folder / "hlo").glob(f"*{STEP}*{REPORT}"):
        hlo = report.with_name(report.name.replace(REPORT, "after_optimizations.hlo.pb"))
        if hlo.exists() and any((folder / "hlo").glob(f"*{STEP}*after_buffer_assignment*")):
            return hlo
        if hlo.exists() and (folder / "error.json").exists():
            return hlo
    return None


def _read(folder: Path, process: subprocess.Popen, seconds: float) -> Compiled:
    error = _json(folder / "error.json")
    path = _assigned(folder)
    # JAX names no class for it; the status code is part of XLA's interface.
    refused = error["text"] if error and error["text"].startswith("RESOURCE_EXHAUSTED") and path else None
    facts = _json(folder / "facts.json")
    if facts is None or "problem" in facts or (error and not refused):
        said = error["text"] if error else (facts or {}).get("problem")
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
        raise PlanError(f"the step was not compiled: {said or f'exit code {process.returncode}: ' + ' / '.join(tail)}")
    hlo = parse_hlo(path.read_bytes()) if path else None
    whole = folder / "module.pb"
    if hlo is None and not whole.exists():
        raise PlanError("the compiler has left no report of its buffers; try the libtpu that jax[tpu] pins")
    module = hlo.module if hlo is not None else parse_module(whole.read_bytes())
    return Compiled(facts, hlo, module, refused, _json(folder / "done.json"), seconds)


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
