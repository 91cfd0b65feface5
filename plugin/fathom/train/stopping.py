"""When to stop before the last step: SIGTERM, or the time a recipe allows."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopSignal:
    """A context in which SIGTERM only sets a flag; all processes come to the same decision at the
    same step.

    Args:
      mesh: all devices of the run. max_runtime: seconds after which to stop, None for no limit.
    """

    def __init__(self, mesh: Mesh, max_runtime: float | None = None):
        self._deadline = None if max_runtime is None else time.monotonic() + max_runtime
        self._terminated = False
        self._previous_handler: Any = None
        self._in_flight: jax.Array | None = None
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._terminated = True

    def requested(self) -> bool:
        """To be called once a step by every process. With several, the answer is one step late."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        local = self._terminated or late
        if jax.process_count() == 1:
            return local
        # Dispatched now and read after the next step, so that it never waits for the devices.
        flags = np.full([len(jax.local_devices())], local)
        flags = jax.make_array_from_process_local_data(self._sharding, flags)
        previous, self._in_flight = self._in_flight, self._any(flags)
        return previous is not None and bool(previous)
