"""SIGTERM on several ranks: all of them stop after the same batch."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StopTogether(Callback):
    """Lets a run on several ranks end where one of them is told to by SIGTERM.

    Lightning 2.6 sends word around from within the signal's handler, in the middle of whatever else
    the ranks are exchanging, and a rank raises at the end of its own batch: the ranks wait for one
    another for ever. Here the handler notes the signal, and after each batch the ranks compare
    their notes. A run on one rank is left to Lightning.
    """

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal over."""
        main = threading.current_thread() is threading.main_thread()
        if trainer.world_size > 1 and main:
            self._told = False
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares notes; Lightning waits for the device once a batch anyway."""
        if trainer.world_size == 1:
            return
        told = torch.tensor(float(self._told), device=pl_module.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if told.item():
            # By this Lightning raises SIGTERMException when the batch is over.
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
