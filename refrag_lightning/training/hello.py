"""HelloModule: the smallest run on any number of processes, and the template for new modules.

    python -m refrag_lightning hello --trainer.devices 2

Each process says where it runs, an all-reduce checks that they reach one another, and together they
learn a line from numbers. It is a run like any other: a run folder, metrics, checkpoints, a resume.

To write a module of your own, copy this file, and put your model into `configure_model` and your
loss into `training_step`. What a new module has to do is marked with (1) to (5); all else is
`RefragLightningModule` and `ResumableDataModule`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from refrag_lightning.cache import replace_folder
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.plain_text import say
from refrag_lightning.training.across_ranks import gather, num_ranks
from refrag_lightning.training.base import RefragLightningModule

Batch = tuple[Tensor, Tensor]


class Process(NamedTuple):
    """Where one process of a run is.

    Attributes:
        rank: Its number among all, from 0.
        local_rank: Its number on its node.
        node: The node's number.
        host: The node's name.
        pid: Its number in the operating system.
        device: What it computes on.
    """

    rank: int
    local_rank: int
    node: int
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return (
            f"hello from rank {self.rank} (local rank {self.local_rank}, node {self.node}) on "
            f"{self.host}, process {self.pid}, {self.device}"
        )


class HelloModule(RefragLightningModule):
    """Learns y = slope * x + 1 on all processes together, after each has said where it is.

    Args:
        slope: Slope of the line.
        **kwargs: The optimiser's settings; see `RefragLightningModule`.
    """

    # (1) Settings. They become options of the command line, described by `Args:` above, and are
    # kept in the run's config.yaml. Nothing is built here.
    def __init__(self, slope: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**{"lr": 0.3, **kwargs})
        self.slope = slope
        self.val_loss = MeanMetric()

    # (2) The model, built once, on every process. What does not train has requires_grad False.
    def configure_model(self) -> None:
        """Builds the line."""
        if self.model is None:
            self.model = nn.Linear(1, 1)

    # (3) One step: the mean over this process's samples, turned into its share of the mean over all
    # samples of the optimiser's step, so that each weighs the same whichever process has it, and
    # whichever batch where a gradient is accumulated over several.
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the squared error, logged as `train/loss`."""
        errors_B = self._errors(batch)
        shares, means = self.step_means({"loss": errors_B.mean()}, self.count_targets(batch))
        self.log_train(means, num_tokens=len(errors_B))
        return shares["loss"]

    def count_targets(self, batch: Batch) -> dict[str, Tensor | float]:
        """How many samples the loss of a batch is the mean of."""
        return {"loss": len(batch[0])}

    # (4) Validation: a torchmetrics metric gathers, and counts each sample of any process once.
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures held-out numbers."""
        self.val_loss.update(self._errors(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`."""
        # It is the same on every rank, and so is its mean.
        self.log("val/loss", self.val_loss.compute(), sync_dist=True)
        self.val_loss.reset()

    # (5) What comes out, and how it is used.
    def export(self, folder: Path) -> None:
        """Writes the line's two numbers."""
        assert self.model is not None
        with replace_folder(folder) as new:
            torch.save(self.model.state_dict(), new / "line.pt")

    def usage(self, folder: Path) -> str:
        """The line of Python that loads them."""
        return f'import torch\nline = torch.load("{folder / "line.pt"}")'

    def _errors(self, batch: Batch) -> Tensor:
        assert self.model is not None
        x_B, y_B = batch
        return (self.model(x_B[:, None])[:, 0] - y_B).square()

    # From here on it is about the processes alone; a new module has none of it.

    def on_fit_start(self) -> None:
        """Says where the processes are, and checks that they reach one another."""
        super().on_fit_start()
        own = Process(
            self.global_rank,
            self.local_rank,
            self.trainer.node_rank,
            socket.gethostname(),
            os.getpid(),
            _device(self.device),
        )
        # In one piece: several processes write to the same terminal.
        say(f"{own}\n", end="", flush=True)
        self._check_sum()
        processes = gather(own)
        if self.trainer.is_global_zero:
            say(topology(processes, type(self.trainer.strategy).__name__), flush=True)

    def _check_sum(self) -> None:
        number = torch.tensor(float(self.global_rank + 1), device=self.device)
        total = float(self.trainer.strategy.reduce(number, reduce_op="sum"))
        expected = self.trainer.world_size * (self.trainer.world_size + 1) / 2
        if num_ranks() != self.trainer.world_size or total != expected:
            raise ValueError(
                f"rank {self.global_rank}: the all-reduce of rank + 1 gave {total:g} on "
                f"{num_ranks()} process(es), not {expected:g} on {self.trainer.world_size}: the "
                "processes do not reach one another"
            )

    def on_train_end(self) -> None:
        """Checks that all processes have learnt the same."""
        assert self.model is not None
        numbers = [p.detach() for p in self.model.parameters()]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in numbers]
        lines = gather([p.flatten().tolist() for p in whole])
        if any(line != lines[0] for line in lines):
            raise ValueError(f"the processes ended with different weights: {lines}")
        if self.trainer.is_global_zero:
            (slope,), (offset,) = lines[0]
            say(f"learnt on every process: y = {slope:.3f} x + {offset:.3f}", flush=True)


class HelloDataModule(ResumableDataModule):
    """Numbers between -1 and 1, and where a line of slope 2 takes them.

    Args:
        size: How many there are to train on.
        **kwargs: Batches, workers and order; see `ResumableDataModule`.
    """

    def __init__(self, size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def training_data(self) -> Any:
        """The numbers: anything with a length and an index. Each process gets its share."""
        return torch.linspace(-1, 1, self.size)

    def collate(self, samples: list[Tensor]) -> Batch:
        """A batch of them, and their places on the line of the module's slope."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        x_B = torch.stack(samples)
        return x_B, getattr(module, "slope", 2.0) * x_B + 1

    def val_dataloader(self) -> DataLoader:
        """Others between them."""
        return self.eval_dataloader(torch.linspace(-0.9, 0.9, 15))  # type: ignore[arg-type]


def topology(processes: list[Process], strategy: str) -> str:
    """What runs where, a line for each node.

    Args:
        processes: Every process.
        strategy: Name of the strategy.
    """
    nodes: dict[int, list[Process]] = {}
    for process in processes:
        nodes.setdefault(process.node, []).append(process)
    total = sum(process.rank + 1 for process in processes)
    lines = [
        f"topology: {len(nodes)} node(s), {len(processes)} process(es), {strategy}; "
        f"the all-reduce of rank + 1 is {total}, as it should be"
    ]
    for node, members in sorted(nodes.items()):
        ranks = ", ".join(str(process.rank) for process in members)
        devices = ", ".join(sorted({process.device for process in members}))
        lines.append(f"  node {node}  {members[0].host}  ranks {ranks}  {devices}")
    return "\n".join(lines)


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
