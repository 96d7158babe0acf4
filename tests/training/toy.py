"""A toy model and toy data modules with everything that a resume has to bring back.

The model has dropout (global random state), a frozen part and two parts that train; the data has
noise drawn in `__getitem__` or `collate` (worker random state).
"""

import os
import signal
from functools import partial

import torch
from torch import nn
from torch.utils.data import Dataset

from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.stream import IterableStream, MappedStream, ShuffledStream
from refrag_lightning.training.base import RefragLightningModule


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
        self.projector = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8))
        self.decoder = nn.Linear(8, 1)
        self.encoder.requires_grad_(False)

    def forward(self, x):
        return self.decoder(self.projector(self.encoder(x)))

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "toy.pt")


class ToyModule(RefragLightningModule):
    """A toy.

    Args:
        nan_at: Global step whose loss is NaN.
        kill_at: Global step at which the process kills itself as `kill -9` does.
        term_at: Global step at which the first rank gets SIGTERM.
    """

    def __init__(self, nan_at: int = -1, kill_at: int = -1, term_at: int = -1, **kwargs):
        super().__init__(**kwargs)
        self.nan_at = nan_at
        self.kill_at = kill_at
        self.term_at = term_at
        self.history: list[tuple] = []

    def configure_model(self):
        if self.model is None:
            generator = torch.Generator().manual_seed(7)
            self.model = ToyModel().eval()
            for parameter in self.model.parameters():
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def _loss(self, batch):
        return (self.model(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_step == self.term_at and self.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.global_step == self.nan_at:
            loss = loss * float("nan")
        self.log_train({"loss": loss}, num_tokens=batch.numel())
        self.history.append((self.global_step, batch_idx, batch.sum().item(), loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch), batch_size=len(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self._loss(batch), batch_size=len(batch))


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size
        self.lengths = [1 + index % 5 for index in range(size)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return float(index) / 10 + 0.1 * torch.rand(4)


class ToyDataModule(ResumableDataModule):
    """Numbers.

    Args:
        size: Training samples.
    """

    def __init__(self, size: int = 46, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def training_data(self):
        return Numbers(self.size)

    def collate(self, samples):
        return torch.stack(samples) + 0.01 * torch.randn(1)

    def val_dataloader(self):
        return self.eval_dataloader(Numbers(9))

    test_dataloader = val_dataloader


class ToyStreamDataModule(ToyDataModule):
    """The same numbers as a stream, shuffled in blocks, two samples or none of each."""

    def training_data(self):
        stream = ShuffledStream(IterableStream(partial(range, self.size)), block_size=7, seed=3)
        return MappedStream(stream, _two_or_none)


def _two_or_none(number):
    return [torch.full((4,), number / 10 + share / 3) for share in range(2) if number % 5]
