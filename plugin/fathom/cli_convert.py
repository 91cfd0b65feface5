"""`fathom convert`: arguments in, a table of what will happen or has happened out."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fathom.cli_problem import ArgumentProblem

if TYPE_CHECKING:  # declaring the arguments needs neither jax nor numpy
    from tqdm import tqdm

    from checkpoints_tools.convert import Outcome, Request

GIB = 1 << 30
SAMPLE_BYTES = 64 << 20


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fathom convert`."""
    sub.add_argument("--to", required=True, choices=("orbax", "hf"), help="what to write")
    sub.add_argument("source", metavar="SRC", help="a Hub folder, or (to hf) a Fathom checkpoint")
    sub.add_argument("destination", metavar="DST", help="a folder that does not exist, or one to finish")
    sub.add_argument(
        "--dtype",
        choices=("native", "bf16", "fp32"),
        default="native",
        help="native keeps quantised weights as they are; bf16 and fp32 decode them",
    )
    sub.add_argument(
        "--expert-dtype",
        choices=("fp8",),
        help="store FP4 experts as FP8 of exactly the same numbers (to hf, native)",
    )
    sub.add_argument(
        "--narrow",
        action="append",
        default=[],
        metavar="NAME=DTYPE",
        help="store the weights of this name or pattern as bf16 or i32 although they have more bits",
    )
    sub.add_argument(
        "--mesh", metavar="fsdp=4,expert=2", help="cut the arrays as the shards of this mesh (to orbax)"
    )
    sub.add_argument("--preset", default="default", help="sharding preset used with --mesh")
    sub.add_argument("--process", type=int, default=0, metavar="I", help="number of this process")
    sub.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the work")
    sub.add_argument("--threads", type=int, metavar="N", help="threads of this process, one per core unless given")
    sub.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")


def run_convert(arguments: argparse.Namespace) -> str:
    """Converts, and returns the text to print.

    Raises:
      ArgumentProblem: for arguments that cannot be used. Otherwise as `checkpoints_tools.convert.convert`.
    """
    from checkpoints_tools.convert import convert

    request = _request(arguments)
    if arguments.dry_run:
        return _table(request, convert(request, dry_run=True), planned=True)
    with _bar(sys.stderr) as bar:
        outcome = convert(request, bar.update)
    return _table(request, outcome, planned=False)


def _request(arguments: argparse.Namespace) -> Request:
    from checkpoints_tools.convert import Request

    source = Path(arguments.source)
    if not source.exists():
        raise ArgumentProblem(f"{source}: no such checkpoint")
    if arguments.threads is not None and arguments.threads < 1:
        raise ArgumentProblem(f"--threads: found {arguments.threads}, expected at least 1")
    try:
        return Request(
            source=source,
            destination=Path(arguments.destination),
            to=arguments.to,
            dtype=arguments.dtype,
            expert_dtype=arguments.expert_dtype,
            narrow=tuple(arguments.narrow),
            mesh=_mesh(arguments.mesh),
            preset=arguments.preset,
            process=arguments.process,
            processes=arguments.processes,
            threads=arguments.threads,
        )
    except ValueError as error:
        raise ArgumentProblem(str(error)) from None


def _mesh(text: str | None) -> dict[str, int] | None:
    from fathom.mesh import AXES

    if text is None:
        return None
    shape = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ArgumentProblem(
                f"--mesh: found {part!r}, expected AXIS=SIZE with an axis of {', '.join(AXES)} and a size from 1"
            )
        shape[axis] = int(size)
    return shape


def _bar(stream: TextIO) -> tqdm:
    from tqdm import tqdm

    return tqdm(
        file=stream,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="written",
        disable=not stream.isatty(),
    )


def _table(request: Request, outcome: Outcome, planned: bool) -> str:
    rows = [
        ("from", str(request.source)),
        ("to", f"{request.destination} ({request.to}, {request.dtype})"),
        ("weights", f"{outcome.tensors:,}"),
        ("bytes read", f"{outcome.source_bytes:,} ({outcome.source_bytes / GIB:.2f} GiB)"),
        ("bytes written", f"{outcome.target_bytes:,} ({outcome.target_bytes / GIB:.2f} GiB)"),
    ]
    if planned:
        rows.append(("memory", f"at most about {outcome.memory / GIB:.1f} GiB"))
        rows.append(("time", _estimate(request, outcome)))
        rows.append(("problems", "none; nothing was written"))
    else:
        done = f"{outcome.done_now:,} of {outcome.blocks:,} blocks written"
        if outcome.done_before:
            done += f", {outcome.done_before:,} were there"
        rows.append(("work", done))
        rows.append(("time", f"{outcome.seconds:.1f} s"))
        left = outcome.blocks - outcome.done_before - outcome.done_now
        complete = "complete" if outcome.complete else f"{left:,} blocks are left to the other processes"
        rows.append(("state", complete))
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def _estimate(request: Request, outcome: Outcome) -> str:
    """From how fast the source's first bytes are read; writing is taken to be as fast."""
    files = sorted(request.source.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    if not files or not files[-1].is_file():
        return "unknown"
    begin = time.perf_counter()
    with files[-1].open("rb", buffering=0) as file:
        count = len(file.read(SAMPLE_BYTES))
    rate = max(count, 1) / max(time.perf_counter() - begin, 1e-6)
    seconds = (outcome.source_bytes + outcome.target_bytes) / rate
    return f"{seconds / 60:.1f} min at the {rate / GIB:.2f} GiB/s a first read had, if writing is as fast"
