"""Spikes of the loss: when a step's is one, and how often a run may go back before one.

The loss is the same number on all processes, so all of them decide alike without asking each other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

EXIT_DIVERGED = 5
"""Exit code of a process whose run diverged: the same start would come to the same end."""

LEAST_SPREAD = 1e-3
"""Of the median: losses that hardly differ, as at a learning rate of 0, would make a spike of any noise."""


class SpikeError(Exception):
    """A step's loss is a spike, and the run should go back.

    Attributes:
      step: whose loss it is. batches: how many the stage had read for it and those before.
    """

    def __init__(self, step: int, batches: int, text: str):
        super().__init__(f"step {step}: {text}")
        self.step, self.batches = step, batches


class SpikeLimitError(RuntimeError):
    """The loss spiked once more than `train.spike.max_rollbacks` allows."""

    exit_code = EXIT_DIVERGED


class SpikeDetector:
    """Judges losses by those before them; see `fathom.recipe_blocks.SpikeBlock` for the rule.

    Losses that are not finite are not among those that others are judged by; see `refuse`.

    Args:
      factor, window, max_rollbacks: the recipe's `train.spike`.

    Attributes:
      rollbacks: how often the run went back. calm_at: the last step of the time after the last rollback in which
        something is done about spikes (`train.anticipatory_routing.after_spike`), 0 without one.
    """

    def __init__(self, *, factor: float | None, window: int, max_rollbacks: int):
        self._factor, self._window, self._max_rollbacks = factor, window, max_rollbacks
        self._losses: deque[float] = deque(maxlen=window)
        self.rollbacks = self.calm_at = 0

    def observe(self, step: int, loss: float, batches: int) -> None:
        """Takes the loss of a step, once; `batches`: see `SpikeError`.

        Raises:
          SpikeError: when it is a spike. It is not among those that later ones are judged by; those before it stay.
        """
        if self._factor is None or not math.isfinite(loss):
            return
        if len(self._losses) == self._window:
            middle = statistics.median(self._losses)
            deviation = statistics.median(abs(value - middle) for value in self._losses)
            spread = max(NORMAL * deviation, LEAST_SPREAD * abs(middle))
            if loss > middle + self._factor * spread:
                raise SpikeError(
                    step,
                    batches,
                    f"loss {loss:.6g} is a spike: the median of the {self._window} before it is {middle:.6g}, "
                    f"their spread {spread:.3g}, train.spike.factor {self._factor:g}",
                )
        self._losses.append(loss)

    def refuse(self, error: Exception, step: int, batches: int) -> None:
        """SpikeError for a step that may not be skipped as `error` says, where a run goes back before spikes."""
        if self._factor is not None:
            raise SpikeError(step, batches, str(error).removeprefix(f"step {step}: ")) from error

    def roll_back(self, spike: SpikeError) -> None:
        """Counts a rollback; SpikeLimitError when it is one too many."""
        if self.rollbacks >= self._max_rollbacks:
            raise SpikeLimitError(
                f"{spike}; the run has gone back {self.rollbacks} times, train.spike.max_rollbacks is "
                f"{self._max_rollbacks}; look at the data of these steps, lower optimizer.learning_rate, or "
                "raise train.spike.factor or train.spike.max_rollbacks"
            ) from spike
        self.rollbacks += 1

    def forget(self) -> None:
        """Judges by the losses to come alone."""
        self._losses.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"losses": list(self._losses), "rollbacks": self.rollbacks, "calm_at": self.calm_at}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave; of more losses than the window now holds the newest."""
        self._losses = deque(state["losses"], maxlen=self._window)
        self.rollbacks, self.calm_at = state["rollbacks"], state["calm_at"]
