"""A run folder at an address: the run works in a local one, and this copies what is finished.

What is copied is whole: metrics.csv and config.yaml between two steps, a checkpoint when it has its
name, the exported model when it is written. metrics.csv goes before the checkpoints, so no row that
led to a checkpoint is missing beside it. Training waits for the copy, as it does for the writing of
a checkpoint: choose `save_every` by that.
"""

from __future__ import annotations

import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from refrag_lightning.plain_text import say
from refrag_lightning.training.remote import RemoteFolder

CHECKPOINTS = "checkpoints"
_Stamp = tuple[tuple[int, ...], ...]


class Mirror(Callback):
    """Copies a run's folder to an address after each checkpoint and validation, and at the end.

    The first rank does it. A copy that fails is told in one line and made up for at the next
    occasion; the first one, and that of `close`, raise.

    Args:
        local: The folder that the run works in.
        address: Where to.
    """

    def __init__(self, local: Path, address: str) -> None:
        self.local = Path(local)
        self.address = address
        self._remote: RemoteFolder | None = None
        self._copied: dict[str, _Stamp] = {}
        self._due = False

    @property
    def remote(self) -> RemoteFolder:
        """The folder at the address."""
        if self._remote is None:
            self._remote = RemoteFolder(self.address)
        return self._remote

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies config.yaml, so that an address which cannot be written to fails here.

        Raises:
            ValueError: If the checkpoints would lie in parts on several machines.
        """
        sharded = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
        if sharded and trainer.num_nodes > 1:
            raise ValueError(
                f"runs_dir ({self.address}) cannot take checkpoints in shards from "
                f"{trainer.num_nodes} nodes: set save_distributed_checkpoint to false"
            )
        if trainer.is_global_zero:
            self.copy()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes that there will be a checkpoint."""
        self._due = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copies a new checkpoint: by now the row of its last step is in metrics.csv."""
        if self._due:
            self.try_to_copy(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the validation's figures."""
        if not trainer.sanity_checking:
            self.try_to_copy(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the last checkpoint."""
        self.try_to_copy(trainer)

    def try_to_copy(self, trainer: Trainer) -> None:
        """Copies what has changed, or says in one line that it could not be done."""
        self._due = False
        if trainer.is_global_zero:
            try:
                self.copy()
            except OSError as error:
                say(f"note: not copied, to be tried again: {error}", file=sys.stderr)

    def copy(self) -> None:
        """Copies every file and sharded checkpoint that has changed since it was copied.

        Raises:
            OSError: If that does not succeed.
        """
        for name, path in sorted(self._finished().items(), key=_checkpoints_last):
            try:
                self._copy_one(name, path)
            except OSError:
                # W&B's service takes files away at any moment.
                if path.exists():
                    raise

    def _copy_one(self, name: str, path: Path) -> None:
        stamp = _stamp(path)
        if self._copied.get(name) == stamp:
            return
        if path.is_dir():
            self.remote.put_folder(path, name, version=secrets.token_hex(4))
            self.remote.remove(name)
        else:
            self.remote.put(path, name)
            if name.startswith(f"{CHECKPOINTS}/"):
                # From an attempt that wrote its checkpoints in shards.
                self.remote.remove(f"{name}.json")
        self._copied[name] = stamp

    def close(self) -> None:
        """Copies what is left, and removes the local folder.

        Raises:
            OSError: If the copy does not succeed; then the local folder stays.
        """
        try:
            self.copy()
        except OSError as error:
            raise OSError(f"{error}; the run's files are in {self.local}") from error
        shutil.rmtree(self.local, ignore_errors=True)

    def leave(self, trainer: Trainer) -> None:
        """Does as `close` where a run was broken off: what does not succeed is told in one line."""
        if trainer.is_global_zero:
            try:
                self.close()
            except OSError as error:
                say(f"note: not copied: {error}", file=sys.stderr)

    def _finished(self) -> dict[str, Path]:
        """What can be copied: name -> file, or folder of a sharded checkpoint."""
        found: dict[str, Path] = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            parts = name.split("/")
            if parts[0] == CHECKPOINTS:
                # Not what is on its way to that name, nor the files of one in shards.
                if len(parts) == 2 and path.suffix == ".ckpt":
                    found[name] = path
            elif path.is_file() and not path.is_symlink() and ".partial" not in name:
                found[name] = path
        return found


def _checkpoints_last(entry: tuple[str, Path]) -> tuple[bool, str]:
    return entry[0].startswith(f"{CHECKPOINTS}/"), entry[0]


def _stamp(path: Path) -> _Stamp:
    files = [path, *(sorted(path.rglob("*")) if path.is_dir() else ())]
    status = [file.stat() for file in files]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in status)
