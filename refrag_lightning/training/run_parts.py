"""The loggers and callbacks of a run, by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from refrag_lightning.plain_text import say
from refrag_lightning.training import wandb_run
from refrag_lightning.training.callbacks import ProgressLine, SpeedMonitor, ValidateFirst
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.metrics_csv import MetricsCSV
from refrag_lightning.training.mirror import Mirror
from refrag_lightning.training.run_folder import RunFolder, RunSettings
from refrag_lightning.training.samples import SampleTables
from refrag_lightning.training.summary import Announcement


def run_callbacks(
    settings: RunSettings,
    folder: RunFolder,
    *,
    trainer: Mapping[str, Any],
    checkpoints: Checkpoints | None,
    mirror: Mirror | None,
) -> list[Callback]:
    """What `fit` needs beside its loggers.

    Args:
        settings: The run's settings.
        folder: The run's folder.
        trainer: The trainer's settings.
        checkpoints: What writes the checkpoints.
        mirror: What copies the folder to its address.
    """
    speed = SpeedMonitor()
    callbacks: list[Callback] = [Announcement(folder.shown()), speed]
    if not trainer["enable_progress_bar"]:
        callbacks.append(ProgressLine(speed))
    if checkpoints is not None:
        callbacks.append(checkpoints)
    if settings.validate_first:
        callbacks.append(ValidateFirst())
    if mirror is not None:
        callbacks.append(mirror)
    return callbacks


def sample_tables(settings: RunSettings) -> list[Callback]:
    """What gives W&B tables of answers, if there are to be any."""
    wanted = settings.wandb != "off" and settings.wandb_samples
    return [SampleTables(settings.wandb_samples)] if wanted else []


def run_loggers(
    settings: RunSettings,
    folder: RunFolder,
    *,
    given: Any,
    name: str,
    config: Mapping[str, Any],
    resumed_from: str | None,
    first_rank: bool,
) -> list[Logger]:
    """metrics.csv always, W&B if it is asked for, then what the configuration adds.

    Args:
        settings: The run's settings.
        folder: The run's folder.
        given: What the configuration adds: a logger, several, or anything else for none.
        name: Name of the run.
        config: Everything that was set, for W&B.
        resumed_from: The checkpoint that the run starts from, for W&B.
        first_rank: Whether this is the rank that says what is going on.
    """
    loggers: list[Logger] = [MetricsCSV(folder.local)]
    if settings.wandb != "off":
        if wandb_run.installed():
            wandb = wandb_run.WandbRun(
                folder,
                name=name,
                project=settings.wandb_project,
                mode=settings.wandb,
                settings=config,
                resumed_from=resumed_from,
            )
            loggers.append(wandb)
        elif first_rank:
            say("W&B:       not installed (pip install wandb); the run goes on without it")
    if isinstance(given, Logger):
        loggers.append(given)
    elif isinstance(given, list | tuple):
        loggers += given
    return loggers
