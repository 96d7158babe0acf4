"""SIGTERM: all ranks stop after the same optimiser step, so that what is saved is exact."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StopTogether(Callback):
    """Lets a run that is told to end by SIGTERM finish the optimiser step that it is in.

    Lightning 2.6 raises at the end of the batch. Between the micro-batches of an accumulated
    gradient nothing can be saved that a resume could go on from exactly, so the run would end
    without a checkpoint of its last steps. And on several ranks it sends word around from within
    the signal's handler, in the middle of whatever else the ranks are exchanging, while a rank
    raises at the end of its own batch: the ranks wait for one another for ever.

    Here the handler notes the signal. When an optimiser step is done the ranks compare their notes.
    One rank alone stops between two batches of a validation too.
    """

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal over."""
        if threading.current_thread() is threading.main_thread():
            self._told = False
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares notes after an optimiser step; Lightning waits for the device anyway."""
        if trainer.fit_loop._should_accumulate():
            return
        told = self._told
        if trainer.world_size > 1:
            notes = torch.tensor(float(told), device=pl_module.device)
            torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
            told = bool(notes.item())
        if told:
            # By this Lightning raises SIGTERMException when the batch is over.
            trainer._signal_connector.received_sigterm = True

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops in a validation; several ranks have different numbers of batches there."""
        if self._told and trainer.world_size == 1:
            trainer._signal_connector.received_sigterm = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signal back."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Gives the signal back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
