"""A run's settings and its folder `<runs_dir>/<name>/<time or id>/`.

    config.yaml         everything that was set; `fit --config` takes it again
    metrics.csv         what was logged
    checkpoints/        last.ckpt and best.ckpt: what trains, the optimiser, the place in the data
    model/              the exported model folder, for `RefragModel.from_pretrained`

A run without an id gets a folder of its own at each start, named by the time. A run with an id has
one folder, and a second start of the same command goes on in it (`training/run_state.py`). The
folder may lie at an address such as `s3://bucket/runs`; then the run works in a local copy
(`training/mirror.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from refrag_lightning.cache import cache_dir
from refrag_lightning.training.remote import RemoteFolder, is_address


@dataclass
class RunSettings:
    """What a run does beside training.

    Args:
        name: Name of the run; None takes the module's class name (AlignmentModule: align).
        runs_dir: Where run folders go: a folder, or an address such as s3://bucket/runs.
        run_id: Name of the run's folder in place of the time. With it, a second start of the same
            command goes on from the run's last checkpoint. None takes the job's id in an AWS Batch
            job, where a retry is such a second start.
        restart_epoch: Where a checkpoint was written in the middle of an epoch and the training
            data or their batches are others now, begin that epoch anew instead of refusing.
        validate_first: Validate before the first step; a resumed run leaves it out.
        test_after_fit: Run the test loop on the trained model.
        export: Write the trained model as a folder at the end.
        save_every: Optimiser steps between two writings of last.ckpt.
        monitor: Metric that best.ckpt goes by; null for none.
        monitor_mode: Whether a lower or a higher metric is better.
        wandb: Log to Weights & Biases as well: online, offline (needs no account), or auto, which
            is online where a key is found and offline where there is none.
        wandb_project: Weights & Biases project.
        wandb_samples: Held-out questions whose answers go to Weights & Biases as a table at each
            validation and test; 0 for none.
    """

    name: str | None = None
    runs_dir: str = "runs"
    run_id: str | None = None
    restart_epoch: bool = False
    validate_first: bool = False
    test_after_fit: bool = False
    export: bool = True
    save_every: int = 100
    monitor: str | None = "val/loss"
    monitor_mode: Literal["min", "max"] = "min"
    wandb: Literal["auto", "off", "offline", "online"] = "off"
    wandb_project: str = "refrag_lightning"
    wandb_samples: int = 8

    def __post_init__(self) -> None:
        # Parts of paths and keys: none is "..", or looks like an option.
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.name):
            raise ValueError(
                f"name ({self.name!r}) may have letters, digits, '.', '_', '-', '/', and each part "
                "begins with a letter, a digit or '_'"
            )
        if self.run_id is not None and not re.fullmatch(r"\w[\w.-]*", self.run_id):
            raise ValueError(f"run_id ({self.run_id!r}) may have letters, digits, '.', '_', '-'")
        if self.save_every < 1:
            raise ValueError(f"save_every ({self.save_every}) must be at least 1")
        if self.wandb_samples < 0:
            raise ValueError(f"wandb_samples ({self.wandb_samples}) must not be negative")


_NAMES = {"AlignmentModule": "align"}


def default_name(class_name: str) -> str:
    """The run's name for a module's class: `PretrainModule` -> `pretrain`, `MyToy` -> `my-toy`."""
    if class_name in _NAMES:
        return _NAMES[class_name]
    stem = class_name.removesuffix("Module") or class_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", stem).lower()


def batch_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The id of the AWS Batch job that this process belongs to, as a folder's name; None outside.

    All attempts of a job have the same id. The nodes of a multi-node job have `id#0`, `id#1` and so
    on, and share the part before it; the children of an array job have `id:0`, which differ.

    Args:
        environment: The process's variables.
    """
    job = environment.get("AWS_BATCH_JOB_ID", "")
    return job.partition("#")[0].replace(":", "-") or None


@dataclass(frozen=True)
class RunFolder:
    """Where a run lies, and where it works.

    Attributes:
        local: The folder that it works in.
        address: Where the folder ends up, if that is not `local`.
        has_id: Whether another start of the same command gets the same folder.
    """

    local: Path
    address: str | None = None
    has_id: bool = False

    def shown(self, part: str = "") -> str:
        """Where the folder, or a part of it such as `model`, is to be found."""
        if self.address is None:
            return str(self.local / part) if part else str(self.local)
        return f"{self.address}/{part}" if part else self.address

    @property
    def remote(self) -> RemoteFolder | None:
        """The folder at its address."""
        return None if self.address is None else RemoteFolder(self.address)


def known_folder(settings: RunSettings, name: str, *, suffix: str = "") -> RunFolder | None:
    """The folder of a run that has an id, the same on every rank; None for one without.

    Args:
        settings: The run's settings.
        name: Name of the run.
        suffix: Appended to the id, such as `_test`.
    """
    run_id = settings.run_id or batch_job_id()
    return None if run_id is None else _folder(settings.runs_dir, name, run_id + suffix, True)


def new_folder(runs_dir: str, name: str, *, suffix: str = "") -> RunFolder:
    """A folder named by the time, which was not there before; its local folder is made.

    Args:
        runs_dir: Folder or address of all runs.
        name: Name of the run.
        suffix: Appended to the time, such as `_test`.
    """
    if not is_address(runs_dir):
        return RunFolder(make_run_folder(runs_dir, name, suffix=suffix))
    local = make_run_folder(_workplace(runs_dir), name, suffix=suffix)
    while RemoteFolder(f"{runs_dir.rstrip('/')}/{name}/{local.name}").names():
        # Made by another machine.
        local = make_run_folder(_workplace(runs_dir), name, suffix=suffix)
    return _folder(runs_dir, name, local.name, False)


def unnamed_folder(settings: RunSettings, name: str) -> RunFolder:
    """What stands for a run folder on the ranks that do not write."""
    return _folder(settings.runs_dir, name, "", False)


def make_run_folder(runs_dir: str | Path, name: str, *, suffix: str = "") -> Path:
    """Makes and returns `<runs_dir>/<name>/<time><suffix>`, a folder that was not there before.

    Args:
        runs_dir: Folder of all runs.
        name: Name of the run.
        suffix: Appended to the time, such as `_test`.
    """
    parent = Path(runs_dir) / name
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + suffix
    number = 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _folder(runs_dir: str, name: str, last: str, has_id: bool) -> RunFolder:
    if not is_address(runs_dir):
        return RunFolder(Path(runs_dir) / name / last, has_id=has_id)
    address = f"{runs_dir.rstrip('/')}/{name}/{last}".rstrip("/")
    return RunFolder(_workplace(runs_dir) / name / last, address, has_id)


def _workplace(runs_dir: str) -> Path:
    """Where the runs of an address work: in the cache, apart from those of other addresses."""
    digest = hashlib.sha256(runs_dir.rstrip("/").encode()).hexdigest()
    return cache_dir() / "runs" / digest[:12]
