"""Callbacks of a run: speed, progress, and a validation before the first step."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from refrag_lightning.plain_text import printable, say


class SpeedMonitor(Callback):
    """Logs `train/tokens_per_second`, without the time of validation, and `train/tokens`.

    The rate is that of the steps since it was logged last; `train/tokens` is how many there were
    since the run began, also before a resume. Both count all ranks. Tokens are those that the
    module counts by `log_train(num_tokens=…)`.

    Attributes:
        tokens_per_second: The rate logged last; 0.0 before.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._since = 0.0
        self._tokens = 0
        self._paused_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._restart(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock go on."""
        self._since += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the rate at the trainer's logging steps."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.fit_loop._should_accumulate() or not every or trainer.global_step % every:
            return
        seconds, before = time.perf_counter() - self._since, self._tokens
        self._restart(pl_module)
        self.tokens_per_second = (self._tokens - before) / max(seconds, 1e-9)
        pl_module.log("train/tokens_per_second", self.tokens_per_second)
        pl_module.log("train/tokens", float(self._tokens))

    def _restart(self, module: Any) -> None:
        self._since, self._tokens = time.perf_counter(), module.total_tokens()


class ValidateFirst(Callback):
    """Runs the whole validation before the first step and logs it at step 0; not at a resume."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates."""
        if trainer.global_step > 0 or not trainer.enable_validation:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


class ProgressLine(Callback):
    """Step, loss, tokens per second and time left.

    One line that is rewritten where the output is a terminal, and otherwise a line every
    `seconds`, so that a log file stays readable.

    Args:
        speed: Whose tokens per second are shown.
        seconds: Between two lines of a log.
    """

    def __init__(self, speed: SpeedMonitor, *, seconds: float = 10.0) -> None:
        self.speed = speed
        self.terminal = sys.stderr.isatty()
        self.seconds = 0.5 if self.terminal else seconds
        self._shown_at = 0.0
        self._begun_at = 0.0
        self._begun_step = 0
        self._width = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the estimate of the time left."""
        self._begun_at = self._shown_at = time.perf_counter()
        self._begun_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the line when it is time."""
        now = time.perf_counter()
        first = trainer.global_step == self._begun_step + 1 and self._width == 0
        if trainer.is_global_zero and (first or now - self._shown_at >= self.seconds):
            self._shown_at = now
            self._show(self._line(trainer, now))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so, because nothing else moves meanwhile."""
        if trainer.is_global_zero and self.terminal:
            self._show(f"step {trainer.global_step}  validating …")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the validation's figures."""
        metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.is_global_zero and metrics:
            figures = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
            self._show(f"step {trainer.global_step}  {figures}", keep=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last line and leaves it there."""
        if trainer.is_global_zero:
            self._show(self._line(trainer, time.perf_counter()), keep=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the line, so that the message has its own."""
        if self.terminal and self._width:
            say(file=sys.stderr)

    def _line(self, trainer: Trainer, now: float) -> str:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        loss = trainer.callback_metrics.get("train/loss")
        done = step - self._begun_step
        left = (now - self._begun_at) / done * (total - step) if done else float("inf")
        pieces = [
            f"step {step}/{total}",
            f"{step / total:4.0%}" if total else "",
            f"loss {float(loss):.4f}" if loss is not None else "",
            f"{self.speed.tokens_per_second:,.0f} tokens/s",
            f"{timedelta(seconds=round(left))} left" if left < 1e8 else "",
        ]
        return "  ".join(piece for piece in pieces if piece)

    def _show(self, line: str, *, keep: bool = False) -> None:
        line = printable(line)
        if self.terminal:
            # The only carriage return that the package writes by itself.
            sys.stderr.write("\r" + line.ljust(self._width) + "\n" * keep)
            self._width = 0 if keep else len(line)
        else:
            say(line, file=sys.stderr)
            self._width = len(line)
        sys.stderr.flush()
