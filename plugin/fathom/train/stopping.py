"""When to stop before the last step: SIGTERM, or the time a recipe allows."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LONG_STEP = 10.0
"""Seconds from which on a step is dispatched only once it is agreed that the run goes on: the devices then wait for
that, and a grace period need not hold another step."""


class Termination:
    """A context in which SIGTERM only sets a flag, for as long as the whole run lasts.

    Args:
      max_runtime: seconds after which to stop, None for no limit.
    """

    def __init__(self, max_runtime: float | None = None):
        self._deadline = None if max_runtime is None else time.monotonic() + max_runtime
        self._terminated = False
        self._previous_handler: Any = None

    def __enter__(self) -> Termination:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._terminated = True

    @property
    def due(self) -> bool:
        """Whether this process has a reason to stop."""
        return self._terminated or (self._deadline is not None and time.monotonic() > self._deadline)


class StopSignal:
    """How all processes come to the same decision at the same step.

    Args:
      mesh: all devices of the run. termination: this process's reasons.
    """

    def __init__(self, mesh: Mesh, termination: Termination):
        self._termination = termination
        self._in_flight: jax.Array | None = None
        self._last_call: float | None = None
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._all = jax.jit(lambda told: jnp.max(told, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def requested(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """To be called by every process after each step was dispatched.

        With several processes the answer is that of one call before, which never waits for the devices, until a step
        takes `LONG_STEP`, to any of them: from then on it is this call's, and waits for the step. `meanwhile` is what
        to do before it waits.
        """
        if jax.process_count() == 1:
            return self._termination.due
        now = time.monotonic()
        seconds, self._last_call = now - (self._last_call or now), now
        previous, self._in_flight = self._in_flight, self._tell(seconds)
        if previous is None:
            return False
        stop, longest = np.asarray(previous)
        if not stop and longest >= LONG_STEP:
            meanwhile()
            stop, _ = np.asarray(self._in_flight)
        return bool(stop)

    def agreed(self) -> bool:
        """Waits for all processes to have called this, and tells whether any of them has a reason to stop."""
        if jax.process_count() == 1:
            return self._termination.due
        self._in_flight = self._last_call = None
        return bool(np.asarray(self._tell(0.0))[0])

    def _tell(self, seconds: float) -> jax.Array:
        """(whether any process has a reason, the longest of their seconds), not waited for."""
        told = np.full([len(jax.local_devices()), 2], [self._termination.due, seconds], np.float32)
        return self._all(jax.make_array_from_process_local_data(self._sharding, told))
