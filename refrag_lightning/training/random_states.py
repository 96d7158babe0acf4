"""The global random states in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RandomStates(Callback):
    """Saves torch's, numpy's and Python's random state of every rank, so dropout goes on exactly.

    They are put back when training starts: by then the loaders and the model have been built.
    """

    def __init__(self) -> None:
        self._states: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks. Lightning calls this on every rank and keeps rank 0's answer."""
        states = _collect()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [states]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, states)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
        self._states = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the states back; with another number of ranks there are none to put back."""
        if self._states is not None and len(self._states["ranks"]) == trainer.world_size:
            _restore(self._states["ranks"][trainer.global_rank])
        self._states = None


def _collect() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        # Plain lists: torch.load(weights_only=True) takes no numpy arrays.
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, numbers, gauss_next = states["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
