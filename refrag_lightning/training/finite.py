"""The stop on a loss or gradient that is not finite."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A loss or a gradient norm was NaN or infinite; the message names the batch."""


class FiniteWatch:
    """Raises at the first value that is not finite, naming the batch it came from.

    On the CPU a value is looked at at once, before the optimiser steps. On a GPU that would make
    every step wait for the device, so the flag is copied without waiting and looked at when the
    copy has arrived, usually one step later. `settle` waits for all of them; calling it before a
    checkpoint is written is what keeps NaN weights out of checkpoints.
    """

    def __init__(self) -> None:
        self._batch = "before the first batch"
        self._pending: deque[tuple[Tensor, torch.cuda.Event, str]] = deque()

    def begin(self, *, epoch: int, batch_idx: int, ids: Any = None) -> None:
        """Names the batch that the values to come belong to.

        Args:
            epoch: Epoch, from 0.
            batch_idx: Batch within the epoch, from 0.
            ids: What identifies the batch's texts, if anything does.
        """
        self._batch = f"batch {batch_idx} of epoch {epoch}"
        if ids is not None and len(ids):
            shown = ", ".join(str(value) for value in list(ids)[:8])
            self._batch += f" (texts {shown}{', …' if len(ids) > 8 else ''})"

    def check(self, name: str, value: Tensor) -> None:
        """Looks at `value`, a scalar, now or as soon as its copy arrives.

        Raises:
            NonFiniteError: If it, or an earlier value, is not finite.
        """
        what = f"{name} of {self._batch}"
        value = value.detach()
        if not value.is_cuda:
            self._raise_unless_finite(value, what)
            return
        copy = torch.empty((), dtype=torch.float32, pin_memory=True)
        copy.copy_(value.float(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((copy, event, what))
        while self._pending and self._pending[0][1].query():
            copy, _, what = self._pending.popleft()
            self._raise_unless_finite(copy, what)

    def settle(self) -> None:
        """Waits for every value handed over and looks at it.

        Raises:
            NonFiniteError: If one is not finite.
        """
        while self._pending:
            copy, event, what = self._pending.popleft()
            event.synchronize()
            self._raise_unless_finite(copy, what)

    @staticmethod
    def _raise_unless_finite(value: Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"the {what} is {value.item()}: stopped before it reaches a checkpoint; "
                "a lower learning rate or trainer.gradient_clip_val may help"
            )
