"""Anticipatory routing: which experts a step's tokens go to is decided by the parameters of some steps before.

At step t the learned routers' choices are those of the parameters that step t - delay began with; how the chosen
experts are weighed, and all else, is by the current ones (DeepSeek-V4's report, training stability). For that a batch
is read `delay` steps ahead and passed forward once, without gradients, as soon as it was read; the choices stay on the
devices until its step: delay x batch x sequence x experts per token x 4 bytes for each learned router.

In front of the first step of a process, or after a rollback, there are no earlier parameters: the choices of the first
`delay` steps are then those of the parameters it begins with. A run that was interrupted is therefore not bit for bit
one that was not, with this option; data, and everything else about resuming, is as without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Route = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


class Fed(NamedTuple):
    """What a step takes.

    Attributes:
      batch: on the host. inputs: on the devices, with "routing" where it was anticipated.
      data_state: gives, until the next step's are taken, the data iterator's state after this batch, whatever was read
        beyond it.
    """

    batch: Mapping[str, np.ndarray]
    inputs: dict[str, Any]
    data_state: Callable[[], Any]


class Schedule(NamedTuple):
    """Which steps anticipate.

    Attributes:
      delay: how many steps ahead, 1 or more. until: the last such step, infinity for all, 0 for none.
    """

    delay: int = 1
    until: float = 0

    @classmethod
    def of(cls, block: Any, until: int) -> Schedule:
        """By the recipe's `train.anticipatory_routing`; after a rollback `until` a step, 0 without one."""
        return cls(block.delay, math.inf if block.always else until)

    def ways(self, first: int, last: int) -> set[bool]:
        """Whether steps among these anticipate: both when some do, none when there are no steps."""
        return {step <= self.until for step in (first, last) if first <= last}


class StateAfter:
    """The data iterator's state after a batch: asked for when it is wanted, or, before more is read, settled."""

    def __init__(self, state: Callable[[], Any]):
        self._state = state

    def __call__(self) -> Any:
        return self._state()

    def settle(self) -> None:
        value = self._state()
        self._state = lambda: value


class Feeder:
    """Gives each step its batch, and reads ahead where steps anticipate, or where there is time for it.

    Args:
      read: step -> its batch, called once for each step in order.
      place: batch -> the arrays on the devices. data_state: the data iterator's state.
      route: (state, arrays) -> choices; may be None when no step anticipates.
      last: the last step, beyond which nothing is read.
    """

    def __init__(
        self,
        read: Callable[[int], Mapping[str, np.ndarray]],
        place: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
        data_state: Callable[[], Any],
        route: Route | None,
        schedule: Schedule,
        last: int,
    ):
        self._read, self._place, self._data_state, self._route = read, place, data_state, route
        self._schedule, self._last = schedule, last
        self._ahead: deque[Fed] = deque()
        self._prepared: tuple[Mapping[str, np.ndarray], StateAfter] | None = None
        self._newest: StateAfter | None = None

    def take(self, step: int, state: Any) -> Fed:
        """The batch of `step`, to be called with the state that it begins with, before that is given up."""
        for number in range(step + len(self._ahead), self._target(step) + 1):
            batch, after = self._prepared or self._next(number, settle=number > step)
            self._prepared = None
            inputs = self._place(batch)
            if number <= self._schedule.until:
                inputs["routing"] = self._route(state, inputs)
            self._ahead.append(Fed(batch, inputs, after))
        return self._ahead.popleft()

    def prepare(self, step: int) -> None:
        """Reads the batch that `take` of `step` would read first; to be called while the devices still compute."""
        number = step + len(self._ahead)
        if self._prepared is None and number <= self._target(step):
            self._prepared = self._next(number, settle=True)

    def _target(self, step: int) -> int:
        """The step whose batch is the last that `step` has read; below `step` behind the last."""
        delay, until = self._schedule
        return int(min(max(step, min(step + delay, until)), self._last))

    def _next(self, number: int, settle: bool) -> tuple[Mapping[str, np.ndarray], StateAfter]:
        """A batch from the loader, and the state after it; `settle` where that of the one before may yet be wanted."""
        if settle and self._newest is not None:
            self._newest.settle()
        batch = self._read(number)
        self._newest = StateAfter(self._data_state)
        return batch, self._newest
