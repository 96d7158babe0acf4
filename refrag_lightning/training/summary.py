"""What a run says before its first step and after its last."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from refrag_lightning.plain_text import say
from refrag_lightning.training.optim import part_of
from refrag_lightning.training.run_folder import RunFolder


class Announcement(Callback):
    """Prints what is about to be done: model, data, what trains, steps, device, precision.

    Args:
        folder: The run's folder, or its address.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints it."""
        datamodule = getattr(trainer, "datamodule", None)
        data = type(datamodule).__name__ if datamodule is not None else "given"
        batches = trainer.num_training_batches
        resumed = f", going on from step {trainer.global_step}" if trainer.global_step else ""
        lines = {
            "model": type(pl_module).__name__,
            "data": f"{data}, {batches} batches an epoch" if batches != float("inf") else data,
            "trains": trained_parts(pl_module),
            "steps": f"{trainer.estimated_stepping_batches}{resumed}",
            "device": f"{trainer.num_devices} x {trainer.strategy.root_device.type}"
            + (f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""),
            "precision": str(trainer.precision),
            "folder": str(self.folder),
        }
        for name, text in lines.items():
            say(f"{name + ':':<11}{text}")
        for line in getattr(pl_module, "describe", list)():
            say(line)


def trained_parts(module: LightningModule) -> str:
    """`projector 1.2 M of 158.4 M parameters (lr 0.001)`, the parts that train first."""
    trained: dict[str, int] = {}
    total = 0
    for name, parameter in module.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            part = part_of(name)
            trained[part] = trained.get(part, 0) + parameter.numel()
    lr = getattr(module, "lr", None)
    parts = [
        f"{part} {_millions(count)} (lr {lr.get(part) if isinstance(lr, dict) else lr})"
        for part, count in trained.items()
    ]
    return f"{', '.join(parts)} of {_millions(total)} parameters"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def resume_command(folder: str, checkpoint: str) -> str:
    """The command that goes on from `checkpoint` of the run in `folder`."""
    words = ["--config", f"{folder}/config.yaml", "--ckpt_path", checkpoint]
    return "python -m refrag_lightning fit " + shlex.join(words)


def closing_lines(folder: str, *, checkpoint: str, best: str, usage: Sequence[str]) -> list[str]:
    """Where everything is, and the commands that use and resume it.

    Args:
        folder: The run's folder, or its address.
        checkpoint: Its last.ckpt, or "".
        best: Its best.ckpt, or "".
        usage: Lines of Python that load the exported model; none if there is no export.
    """
    lines = ["", f"run folder   {folder}", f"metrics      {folder}/metrics.csv"]
    if checkpoint:
        lines.append(f"checkpoint   {checkpoint}" + (f"  (best: {best})" if best else ""))
    if usage:
        lines += [f"model        {folder}/model", "", "use it:"]
        lines += [f"    {line}" for line in usage]
    if checkpoint:
        lines += ["", "train on (raise trainer.max_steps or max_epochs):"]
        lines += [f"    {resume_command(folder, checkpoint)}"]
    return lines


def usage_lines(usage: Callable[[Path], str], folder: RunFolder) -> list[str]:
    """The lines of Python that use the exported model; one at an address is copied first.

    Args:
        usage: Gives the lines for a folder on disk.
        folder: The run's folder.
    """
    if folder.address is None:
        return usage(folder.local / "model").splitlines()
    return [
        "from refrag_lightning.training.remote import fetch_model",
        f'folder = fetch_model("{folder.shown()}")',
        *usage(Path("FOLDER")).replace('"FOLDER"', "folder").splitlines(),
    ]
