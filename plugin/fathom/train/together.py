"""What processes on CPUs must do before they first talk in a step: all have compiled it.

gloo gives up on a process that comes 30 seconds after the others. Each compiles for itself, and on a busy machine that
takes one of them longer by more than that.
"""

from __future__ import annotations

import jax
from orbax.checkpoint import multihost

from fathom.train.step import Program

COMPILE_SECONDS = 3600
"""How long the first to have compiled waits for the last."""


def compile_together(program: Program, batch_size: int, sequence_length: int) -> None:
    """Compiles the step, which is then not compiled again when it is called, and waits until all processes have.

    It does nothing for a single process, and nothing on accelerators, whose networks wait as long as it takes. The
    processes wait at jax's coordinator, which needs no collective.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    program.lower(batch_size, sequence_length).compile()
    multihost.get_barrier_sync_fn()(key="fathom_compiled", timeout_ms=COMPILE_SECONDS * 1000)
