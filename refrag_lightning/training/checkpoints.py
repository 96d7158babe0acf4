"""Writing last.ckpt and best.ckpt at moments from which a run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from refrag_lightning.cache import put, remove


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt` and `best.ckpt` in a folder.

    Lightning's ModelCheckpoint also writes between the micro-batches of an accumulated gradient,
    which is then lost, and before a validation that is due, which a resume then leaves out. Here
    a checkpoint is written only after an optimiser step, and after the validation and the end of
    epoch that come with it. A file is complete or not there: it is written beside and renamed.

    Args:
        folder: Where to.
        every_n_steps: Optimiser steps between two writings of `last.ckpt`; it is also written at
            the end of an epoch, of the run, and on SIGTERM.
        monitor: Metric that `best.ckpt` goes by; None writes no `best.ckpt`.
        mode: "min" or "max".

    Attributes:
        last_model_path: The checkpoint written last, or "".
        best_model_path: The best one, or "".
        best_score: Its metric, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_steps: int = 100,
        monitor: str | None = "val/loss",
        mode: str = "min",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"save_every ({every_n_steps}) must be at least 1")
        if mode not in ("min", "max"):
            raise ValueError(f"mode ({mode!r}) must be 'min' or 'max'")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.last_model_path = ""
        self.best_model_path = ""
        self.best_score: float | None = None
        self._due = False
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agrees on rank 0's folder."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and where it lies."""
        return {"best_score": self.best_score, "best_model_path": self.best_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint's best score."""
        self.best_score = state_dict["best_score"]
        self.best_model_path = state_dict["best_model_path"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves step 0 out, and the step that was resumed from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every `every_n_steps` steps, or notes that it is due where more comes first."""
        loop = trainer.fit_loop
        if loop._should_accumulate() or trainer.global_step == self._last_step:
            return
        if trainer.global_step % self.every_n_steps == 0:
            validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
            if validates or trainer.is_last_batch:
                self._due = True
            else:
                self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves `best.ckpt` where the metric is better, and `last.ckpt` where it is due."""
        if not self._may_save(trainer):
            return
        if self.monitor is not None and self.monitor in trainer.callback_metrics:
            score = float(trainer.callback_metrics[self.monitor])
            best = self.best_score
            better = best is None or (score < best if self.mode == "min" else score > best)
            # The ranks' metrics may differ; saving is done by all of them or by none.
            if trainer.strategy.broadcast(better):
                self.best_score = score
                self.best_model_path = str(self.folder / "best.ckpt")
                self._save(trainer, self.best_model_path)
        if self._due and not trainer.is_last_batch:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves `last.ckpt`."""
        if trainer.global_step != self._last_step:
            self._save_last(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Saves `last.ckpt` when the job is told to stop; Lightning stops between two batches."""
        if isinstance(exception, SIGTERMException) and self._may_save(trainer):
            self._save_last(trainer)

    def _may_save(self, trainer: Trainer) -> bool:
        return (
            trainer.state.fn == TrainerFn.FITTING
            and trainer.global_step > 0
            and not trainer.fit_loop._should_accumulate()
        )

    def _save_last(self, trainer: Trainer) -> None:
        self._due = False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_step = trainer.global_step
        self.last_model_path = str(self.folder / "last.ckpt")
        self._save(trainer, self.last_model_path)

    @staticmethod
    def _save(trainer: Trainer, path: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        partial = Path(f"{path}.partial")
        if trainer.is_global_zero:
            remove(partial)
        trainer.strategy.barrier("place for a checkpoint")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            put(partial, Path(path))
        trainer.strategy.barrier("checkpoint renamed")
