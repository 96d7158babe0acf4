"""What a second start of a run with an id finds in the run's folder, and how it goes on.

It goes on from the run's own `checkpoints/last.ckpt`. Before there is one it starts again, from
`--ckpt_path` where that was given. Rows of metrics.csv that came after the checkpoint are dropped,
since they will be logged again. A run that came to its end leaves `finished.json`; while the limits
of its training are the same, another start does nothing.

Every rank reads the same files and comes to the same answer, so on several nodes the folder has to
be one that all of them see, or an address.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refrag_lightning.cache import remove, take_away_leftovers, write_text
from refrag_lightning.training.metrics_csv import drop_rows
from refrag_lightning.training.remote import fetch_checkpoint, has_checkpoint
from refrag_lightning.training.run_folder import RunFolder
from refrag_lightning.training.sharded import META

LAST = "checkpoints/last.ckpt"
BEST = "checkpoints/best.ckpt"
WANDB_ID = "wandb/run_id"
_FINISHED = "finished.json"
_LIMITS = ("max_steps", "max_epochs", "max_time")


def own_checkpoint(folder: RunFolder) -> Path | None:
    """The run's last checkpoint, copied to here if it lies at an address; None before there is one.

    Args:
        folder: The run's folder.

    Raises:
        OSError: If it is there and cannot be read.
    """
    if folder.remote is None:
        path = folder.local / LAST
        take_away_leftovers(path)
        return path if path.exists() else None
    return fetch_checkpoint(folder.shown(LAST)) if has_checkpoint(folder.remote, LAST) else None


def has_best(folder: RunFolder) -> bool:
    """Whether the run has a best.ckpt."""
    if folder.remote is None:
        return (folder.local / BEST).exists()
    return has_checkpoint(folder.remote, BEST)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint; of one in shards, all but them.

    Args:
        path: A file, or the folder of a sharded one.

    Raises:
        FileNotFoundError: If there is none, or the folder is none of a checkpoint.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    file = path / META if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no checkpoint: it has no {META}")
    checkpoint: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    return checkpoint


def prepare(folder: RunFolder, checkpoint: Path | None) -> None:
    """Makes the local folder of a run with an id ready; the first rank calls it.

    Args:
        folder: The run's folder.
        checkpoint: What the run goes on from, if it is the run's own.
    """
    remote = folder.remote
    if remote is not None:
        # What an earlier attempt left on this machine may be older than what is at the address.
        shutil.rmtree(folder.local, ignore_errors=True)
    folder.local.mkdir(parents=True, exist_ok=True)
    for unfinished in (folder.local / LAST).parent.glob("*.partial"):
        remove(unfinished)
    take_away_leftovers(folder.local / BEST)
    metrics = folder.local / "metrics.csv"
    if checkpoint is None:
        metrics.unlink(missing_ok=True)
        (folder.local / WANDB_ID).unlink(missing_ok=True)
        return
    if remote is not None:
        for name in ("metrics.csv", WANDB_ID):
            content = remote.read(name)
            if content is not None:
                (folder.local / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(folder.local / name, content.decode())
    drop_rows(metrics, from_step=read_checkpoint(checkpoint)["global_step"])


def mark_finished(folder: RunFolder, trainer: Mapping[str, Any], *, step: int) -> None:
    """Notes that the run came to its end.

    Args:
        folder: The run's folder.
        trainer: The settings of the trainer.
        step: Its optimiser steps.
    """
    text = json.dumps({"step": step, "limits": _limits(trainer)})
    write_text(folder.local / _FINISHED, text + "\n")


def finished_step(folder: RunFolder, trainer: Mapping[str, Any]) -> int | None:
    """The step at which the run came to its end under the same limits, or None.

    Args:
        folder: The run's folder.
        trainer: The settings of the trainer.
    """
    if folder.remote is not None:
        content = folder.remote.read(_FINISHED)
    else:
        path = folder.local / _FINISHED
        content = path.read_bytes() if path.is_file() else None
    if content is None:
        return None
    found = json.loads(content)
    return int(found["step"]) if found["limits"] == _limits(trainer) else None


def _limits(trainer: Mapping[str, Any]) -> dict[str, str]:
    """How long the training is to last."""
    return {name: str(trainer.get(name)) for name in _LIMITS}
