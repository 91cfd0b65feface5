"""What a run tells of itself; metrics are read one step late, so that logging never holds up the devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fathom.recipe import Recipe
from fathom.train.metrics import MetricWriter, make_progress, plot_loss
from fathom.train.session import Session
from fathom.train.spike import EXIT_DIVERGED
from fathom.train.text_log import LogLines

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss, a gradient or an update was not finite; the step was not applied and nothing was saved."""

    exit_code = EXIT_DIVERGED


SHOWN_FIRST = ("loss", "grad_norm", "learning_rate", "tokens_per_second")


class StepReader:
    """Holds the metrics of the latest step on the devices until the next one has been dispatched.

    Args:
      emit: called with (steps done, metrics as floats) for every step, in order.
      flops_per_token: training flops of one token, for model_flops_per_second.
      skip_nonfinite: how many non-finite steps in a row are skipped before NonFiniteError.
      refuse: called with that error and the step before it is raised; may raise another.
    """

    def __init__(
        self,
        emit: Callable[[int, dict[str, Any]], None],
        *,
        flops_per_token: float,
        skip_nonfinite: int,
        refuse: Callable[[NonFiniteError, int], None],
    ):
        self._emit, self._refuse = emit, refuse
        self._flops_per_token = flops_per_token
        self._skip_nonfinite = skip_nonfinite
        self._skipped = 0
        self._clock: float | None = None
        self._pending: tuple[int, Mapping[str, jax.Array], str] | None = None
        self.last: dict[str, Any] = {}

    def push(self, step: int, metrics: Mapping[str, jax.Array], batch_hash: str) -> None:
        """Takes the metrics of `step`, and reports those of the step before it."""
        self.flush()
        self._pending = (step, metrics, batch_hash)

    def flush(self) -> None:
        """Reports the held step, waiting for the devices.

        Raises:
          NonFiniteError: when it was one bad step too many.
        """
        if self._pending is None:
            return
        (step, metrics, batch_hash), self._pending = self._pending, None
        values = {name: float(np.asarray(x)) for name, x in metrics.items()}
        now = time.perf_counter()
        tokens = values.pop("tokens")
        finite = bool(values.pop("finite"))
        if self._clock is not None:
            values["tokens_per_second"] = tokens / max(now - self._clock, 1e-9)
            values["model_flops_per_second"] = values["tokens_per_second"] * self._flops_per_token
        self._clock = now
        self._skipped = 0 if finite else self._skipped + 1
        values["skipped_steps"] = self._skipped
        values["batch_hash"] = int(batch_hash[:12], 16)
        first = {name: values[name] for name in SHOWN_FIRST if name in values}
        self.last = values = first | values
        self._emit(step, values)
        if self._skipped > self._skip_nonfinite:
            error = NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the update was "
                f"not applied and nothing was saved ({self._skipped} bad steps in a row, "
                f"train.skip_nonfinite allows {self._skip_nonfinite}); lower optimizer.learning_rate, look "
                "at the data of this step, or raise train.skip_nonfinite"
            )
            self._refuse(error, step)
            raise error

    def busy(self) -> bool:
        """Whether the devices still compute the held step."""
        return self._pending is not None and not self._pending[1]["loss"].is_ready()

    def restart_clock(self) -> None:
        """Keeps time spent elsewhere (saving, evaluation) out of the next step's throughput."""
        if self._clock is not None:
            self._clock = time.perf_counter()


class RunReport:
    """The metric files, the progress display and the recipe as run; a context that closes them and draws loss.png.

    Args:
      recipe: of the stage. headline: shown first. start: steps done before, 0 for a new run.
      whole: the recipe with all stages, the one to write down. session: its clock and its log are told too.
      watch: called with (step, loss) of every step after it was written; may raise to end the run.
      refuse: see `StepReader`.

    Attributes:
      last: metrics of the newest step that was read.
    """

    def __init__(
        self,
        recipe: Recipe,
        headline: str,
        start: int,
        whole: Recipe,
        session: Session,
        watch: Callable[[int, float], None],
        refuse: Callable[[NonFiniteError, int], None],
    ):
        self._session, self._watch = session, watch
        self._last_step, self._log_every = recipe.train.steps, recipe.train.log_every
        self._log_lines = LogLines(session.log, recipe.train.steps, every=recipe.train.log_every)
        session.log.event(headline)
        self._is_main = is_main = jax.process_index() == 0
        self._run_dir = recipe.run_dir
        spec = recipe.model_spec()
        self._progress = make_progress(
            recipe.train.steps, start, every=recipe.train.log_every, enabled=is_main
        )
        self._progress.message(headline)
        self._writer = MetricWriter(
            recipe.run_dir,
            recipe.metrics.tensorboard,
            recipe.metrics.wandb,
            enabled=is_main,
            resume_step=start or None,
            config=whole.to_dict(),
        )
        if is_main:
            (recipe.run_dir / "recipe.yaml").write_text(whole.to_yaml(), encoding="utf-8")
        self._reader = StepReader(
            self._emit,
            flops_per_token=spec.flops_per_token(spec.config, recipe.data.sequence_length),
            skip_nonfinite=recipe.train.skip_nonfinite,
            refuse=refuse,
        )
        self.push, self.flush = self._reader.push, self._reader.flush
        self.restart_clock, self.busy = self._reader.restart_clock, self._reader.busy

    @property
    def last(self) -> dict[str, Any]:
        return self._reader.last

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes the results of an evaluation after `step`."""
        self.flush()
        self._writer.write(step, values)
        self.message(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self.restart_clock()

    def message(self, text: str) -> None:
        """Shows and logs a line."""
        self._progress.message(text)
        self._session.log.event(text)

    def _emit(self, step: int, values: dict[str, Any]) -> None:
        clock = self._session.clock
        clock.step_done()
        if step % self._log_every == 0 or step == self._last_step:
            values = values | clock.metrics()
            self._session.store_times(step)
        self._writer.write(step, values)
        self._progress.update(step, values)
        self._log_lines.update(step, values)
        self._watch(step, values["loss"])

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.close()
        try:
            self._draw()
        finally:
            self._writer.close()

    def _draw(self) -> None:
        """loss.png, however the run ended; a picture that fails must not hide why it did."""
        if not self._is_main or not self.last:
            return
        try:
            plot_loss(self._run_dir)
        except Exception as error:
            logger.warning("loss.png is not drawn: %s", error)
