"""A run's settings and its folder `runs/<name>/<time>/`.

    config.yaml         everything that was set; `fit --config` takes it again
    metrics.csv         what was logged
    checkpoints/        last.ckpt and best.ckpt: what trains, the optimiser, the place in the data
    model/              the exported model folder, for `RefragModel.from_pretrained`

A resumed run gets a folder of its own beside the one that it goes on from.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal


@dataclass
class RunSettings:
    """What a run does beside training.

    Args:
        name: Name of the run; None takes the module's class name (AlignmentModule: align).
        runs_dir: Where run folders go.
        validate_first: Validate before the first step; a resumed run leaves it out.
        test_after_fit: Run the test loop on the trained model.
        export: Write the trained model as a folder at the end.
        save_every: Optimiser steps between two writings of last.ckpt.
        monitor: Metric that best.ckpt goes by; null for none.
        monitor_mode: Whether a lower or a higher metric is better.
        wandb: Log to Weights & Biases as well; offline needs no account.
        wandb_project: Weights & Biases project.
    """

    name: str | None = None
    runs_dir: str = "runs"
    validate_first: bool = False
    test_after_fit: bool = False
    export: bool = True
    save_every: int = 100
    monitor: str | None = "val/loss"
    monitor_mode: Literal["min", "max"] = "min"
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "refrag_lightning"

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.name):
            raise ValueError(f"name ({self.name!r}) may have letters, digits, '.', '_', '-', '/'")
        if self.save_every < 1:
            raise ValueError(f"save_every ({self.save_every}) must be at least 1")


_NAMES = {"AlignmentModule": "align"}


def default_name(class_name: str) -> str:
    """The run's name for a module's class: `PretrainModule` -> `pretrain`, `MyToy` -> `my-toy`."""
    if class_name in _NAMES:
        return _NAMES[class_name]
    stem = class_name.removesuffix("Module") or class_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", stem).lower()


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
