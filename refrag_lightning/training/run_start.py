"""Where a run lies, and what it starts from: decided before anything is built, alike on all ranks.

A run's own last checkpoint counts more than `--ckpt_path`: a job that was given one begins with it,
and when it is tried again goes on from where it came to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from refrag_lightning.cache import sole_writer
from refrag_lightning.plain_text import say
from refrag_lightning.training.remote import fetch_checkpoint, is_address
from refrag_lightning.training.run_folder import (
    RunFolder,
    RunSettings,
    known_folder,
    new_folder,
    unnamed_folder,
)
from refrag_lightning.training.run_state import (
    LAST,
    finished_step,
    own_checkpoint,
    prepare,
    read_checkpoint,
)


class RunFinished(Exception):
    """The run came to its end before; there is nothing left to do."""


class RunStart:
    """A run's folder and checkpoint.

    Args:
        settings: The run's settings.
        name: Name of the run.
        subcommand: `fit`, or another one, which is appended to the folder's name.
        trainer: The trainer's settings.
        checkpoint: What `--ckpt_path` says: a path, an address, a word of Lightning's, or None.

    Attributes:
        folder: The run's folder; None before `open_folder` where it is named by the time.
        checkpoint: What training starts from: a local path, a word of Lightning's, or None.
        given: What `--ckpt_path` says.
        own: The checkpoint, if it is the run's own.
        hyper_parameters: The module's settings that the checkpoint was trained with.

    Raises:
        RunFinished: If the run came to its end before.
        FileNotFoundError: If there is no such checkpoint.
        OSError: If an address cannot be read.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        name: str,
        subcommand: str,
        trainer: Mapping[str, Any],
        checkpoint: str | None,
    ) -> None:
        self.settings = settings
        self.name = name
        self.suffix = "" if subcommand == "fit" else f"_{subcommand}"
        self.folder: RunFolder | None = known_folder(settings, name, suffix=self.suffix)
        self.given = self.checkpoint = checkpoint
        self.own: Path | None = None
        if self.folder is not None and subcommand == "fit":
            step = finished_step(self.folder, trainer)
            if step is not None:
                raise RunFinished(
                    f"the run is finished, at step {step}: {self.folder.shown()}\n"
                    "to train on, raise trainer.max_steps or max_epochs; to train anew, give "
                    "another --run_id"
                )
            self.own = own_checkpoint(self.folder)
        if self.own is not None:
            self.checkpoint = str(self.own)
        elif checkpoint and is_address(checkpoint):
            self.checkpoint = str(fetch_checkpoint(checkpoint))
        self.hyper_parameters: dict[str, Any] = {}
        if self.checkpoint and self.checkpoint not in ("last", "best", "hpc"):
            # Read here, so that one that is none is told before anything is built.
            saved = read_checkpoint(Path(self.checkpoint))
            self.hyper_parameters = saved.get("hyper_parameters", {})

    @property
    def shown_checkpoint(self) -> str | None:
        """Where the checkpoint is to be found."""
        if self.own is None or self.folder is None:
            return self.given
        return self.folder.shown(LAST)

    def open_folder(self, *, first_rank: bool, held: ExitStack) -> RunFolder:
        """The folder, made ready for what is to come.

        Args:
            first_rank: Whether this is the rank that writes.
            held: Takes what keeps other starts away from a folder that they would get too, until
                the run ends. At an address it keeps away those on this machine.

        Raises:
            OSError: Another process is writing this run.
        """
        if not first_rank:
            return self.folder or unnamed_folder(self.settings, self.name)
        if self.folder is None:
            return new_folder(self.settings.runs_dir, self.name, suffix=self.suffix)
        advice = "wait for its end, or give this run another --run_id"
        held.enter_context(sole_writer(self.folder.local, advice=advice))
        prepare(self.folder, self.own)
        if self.own is not None:
            shown = self.folder.shown(LAST)
            given = self.given if self.given != shown else None
            instead = f", not from {given}, where it began" if given else ""
            say(f"going on from the run's own checkpoint, {shown}{instead}")
        elif os.environ.get("AWS_BATCH_JOB_ATTEMPT", "1") != "1" and not self.suffix:
            say(f"no checkpoint from an earlier attempt in {self.folder.shown()}")
        return self.folder
