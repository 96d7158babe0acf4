"""A run's Weights & Biases side, which changes nothing about the run.

Losses and checkpoints are the same with it and without: the random states are put back after it has
started, and neither a start that fails nor a broken connection stops the training.

The run's id lies in its folder, so a run that goes on in the same folder goes on in the same W&B
run. Without a connection W&B cannot go on: there the new part begins with everything that
metrics.csv has of the earlier ones, so the newest `offline-run-*` folder holds the whole curve.
"""

from __future__ import annotations

import netrc
import os
import random
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from refrag_lightning.cache import write_text
from refrag_lightning.git_state import git_state
from refrag_lightning.plain_text import say
from refrag_lightning.training.metrics_csv import read_rows
from refrag_lightning.training.run_folder import RunFolder
from refrag_lightning.training.run_state import WANDB_ID

Mode = Literal["auto", "offline", "online"]
_HOST = "https://api.wandb.ai"
_STEP = "trainer/global_step"


def has_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B would find a key: in the environment, or in the file that `wandb login` writes.

    Args:
        environment: The process's variables.
    """
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or _HOST).netloc
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(path.expanduser()).authenticators(host)
            if found is not None and found[2]:
                return True
    return False


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts the global random states back that were there before the block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class WandbRun(WandbLogger):
    """Logs a run to W&B: what was set, the commit, metrics, and the tables of others.

    Only the first rank logs. A line says where to; where W&B cannot start, one line says why, and
    the run goes on without it.

    Args:
        folder: The run's folder.
        name: The run's name.
        project: The W&B project.
        mode: `online`, `offline`, or `auto`: as WANDB_MODE says, else online where a key is found
            and offline where there is none.
        settings: Everything that was set.
        resumed_from: The checkpoint that the run goes on from, if any.

    Raises:
        ModuleNotFoundError: If wandb is not installed.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        name: str,
        project: str,
        mode: Mode,
        settings: Mapping[str, Any],
        resumed_from: str | None = None,
    ) -> None:
        self.folder = folder
        self._why = ""
        if mode != "auto":
            self._mode: str | None = mode
        elif os.environ.get("WANDB_MODE") or has_key():
            self._mode = None
        else:
            self._mode, self._why = "offline", "no key found (WANDB_API_KEY or `wandb login`), "
        self._settings = dict(settings)
        self._resumed_from = resumed_from
        self._ended = False
        super().__init__(
            name=f"{name}/{folder.local.name}",
            # W&B's service may have been started in another folder.
            save_dir=str(folder.local.resolve()),
            project=project,
            group=name,
            mode=self._mode,
        )

    @property
    def started(self) -> bool:
        """Whether this rank has started a W&B run, or tried to."""
        return self._experiment is not None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; started when it is first asked for."""
        if self._experiment is None:
            with undisturbed():
                self._experiment = self._start()
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Starts W&B. What is set in the module is among everything that was set."""
        _ = self.experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs metrics, tables or images; W&B sends them in a process of its own.

        Args:
            metrics: Name -> value.
            step: The optimiser steps done.
        """
        try:
            super().log_metrics(metrics, step)
        except Exception as error:
            # Whatever W&B raises, its service gone among it, the training is worth more.
            _tell(f"stopped ({_brief(error)}); the run goes on without it")
            self._experiment = _disabled()

    @rank_zero_only
    def finish(self, *, failed: bool = False) -> None:
        """Ends the W&B run, so that its files are complete.

        Args:
            failed: Whether the run did.
        """
        if self._experiment is None or self._ended:
            return
        self._ended = True
        try:
            self._experiment.finish(exit_code=int(failed))
        except Exception as error:
            _tell(f"did not end well ({_brief(error)})")

    def _start(self) -> Any:
        run: Any = None
        try:
            import wandb

            run_id, known = self._run_id()
            git = git_state()
            config = {**self._settings, "resumed_from": self._resumed_from}
            config["git"] = git._asdict() if git is not None else None
            is_offline = (self._mode or os.environ.get("WANDB_MODE")) in ("offline", "dryrun")
            # W&B's own look at the checkout would keep the user's name in the remote's address,
            # which may be a token, and a copy of what was changed.
            told: dict[str, Any] = {"disable_git": True, "allow_val_change": True}
            told |= {"silent": True} if is_offline else {"quiet": True}
            if git is not None:
                told |= {"git_commit": git.commit, "git_remote_url": git.remote or None}
            self._wandb_init.pop("anonymous", None)
            self._wandb_init |= {
                "id": run_id,
                "config": config,
                "settings": wandb.Settings(**told),
                # Without a connection there is nothing that it could be resumed from.
                "resume": None if is_offline else "allow",
            }
            run = wandb.init(**self._wandb_init)
            run.define_metric(_STEP)
            run.define_metric("*", step_metric=_STEP, step_sync=True)
            offline = bool(getattr(run, "offline", False))
            if offline and known:
                self._repeat(run)
            self._tell_where(run, offline)
        except Exception as error:
            _tell(f"could not start ({_brief(error)}); the run goes on without it")
            if run is not None:
                with suppress(Exception):
                    run.finish(exit_code=1)
            return _disabled()
        return run

    def _run_id(self) -> tuple[str, bool]:
        """The id of the folder's W&B run, and whether it was there before."""
        path = self.folder.local / WANDB_ID
        if path.is_file():
            return path.read_text().strip(), True
        run_id = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, run_id + "\n")
        return run_id, False

    def _repeat(self, run: Any) -> None:
        """Logs what an earlier part of the run has logged."""
        for row in read_rows(self.folder.local / "metrics.csv"):
            metrics = {name: float(value) for name, value in row.items() if value}
            step = int(metrics.pop("step", 0))
            run.log({**metrics, _STEP: step})

    def _tell_where(self, run: Any, offline: bool) -> None:
        if offline:
            part = Path(run.dir).resolve().parent.relative_to(self.folder.local.resolve())
            place = self.folder.shown(str(part))
            how = f"`wandb sync {place}` uploads it"
            if self.folder.address is not None:
                how = f"`wandb sync` uploads a copy of {place}"
            _tell(f"offline, {self._why}{how}")
        else:
            _tell(str(run.url or "disabled"))


def _disabled() -> Any:
    """A W&B run that takes everything and keeps nothing."""
    import wandb

    return wandb.init(mode="disabled")


def _tell(text: str) -> None:
    say(f"{'W&B:':<11}{text}", flush=True)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def finish(trainer: Any, *, failed: bool = False) -> None:
    """Ends the W&B runs of a trainer, and waits for W&B's service, which writes their files.

    Args:
        trainer: The trainer.
        failed: Whether its run did.
    """
    runs = [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]
    for run in runs:
        run.finish(failed=failed)
    if any(run.started for run in runs):
        import wandb

        with suppress(Exception):
            wandb.teardown()


def installed() -> bool:
    """Whether W&B can be imported; nothing is."""
    import importlib.util

    return importlib.util.find_spec("wandb") is not None
