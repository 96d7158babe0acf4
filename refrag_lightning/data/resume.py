"""Training data that goes on exactly where a checkpoint was written.

A LightningDataModule becomes resumable in the middle of an epoch by subclassing
`ResumableDataModule` and giving it two things:

    class LinesDataModule(ResumableDataModule):
        def __init__(self, path: str, **kwargs):
            super().__init__(**kwargs)      # batch_size, num_workers, seed, …
            self.path = path

        def training_data(self):            # a map-style Dataset, or a Stream (data/stream.py)
            return Lines(self.path)

        def collate(self, samples):         # list of samples -> batch; runs in the workers
            return torch.stack(samples)

        def val_dataloader(self):
            return self.eval_dataloader(Lines(self.path + ".val"))

A data set that says how long each sample is (`lengths`, tokens) can have batches of about
`tokens_per_batch` tokens instead of `batch_size` samples.

What is saved is a position: for a data set (epoch, batch), because its order is a pure function
of (seed, epoch); for a stream the state that travelled with the last batch that was trained on,
of every worker and every rank. Batches that workers or Lightning fetched ahead do not count. With
it goes what the order depends on (how many samples, `batch_size`, `seed`, …, and `data_key`): a
place in the middle of an epoch is refused where they differ, unless `restart_epoch` is set.

Neither the order nor the workers touch the global random state. Random numbers drawn in a data
set's `__getitem__` or in `collate` (from torch, numpy or random) are seeded by (seed, epoch,
batch), so they too are the same after a resume.

Where gradients are accumulated (`trainer.accumulate_grad_batches`), the batches of an optimiser's
step are fetched together, so that the module can count their targets before the first of them.

An epoch of a stream is one reading of it, or `batches_per_epoch` batches, the reading starting
again whenever the text runs out. Several ranks need the latter, since their shares may differ in
length. A data set may be resumed with another `num_workers`; a stream may not.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from refrag_lightning.data.loaders import (
    MicroBatch,
    ResumableDataLoader,
    ResumableLoader,
    ResumableStreamLoader,
)
from refrag_lightning.data.sampler import EpochOrder, TokenOrder
from refrag_lightning.data.stream import Stream
from refrag_lightning.data.worker import EvalDataset, as_it_is


class ResumableDataModule(LightningDataModule):
    """Base of the data modules: see the module's docstring for what a subclass gives.

    Args:
        batch_size: Training samples a batch and rank.
        eval_batch_size: Samples a batch in validation and test; None takes `batch_size`.
        num_workers: Worker processes of each loader.
        shuffle: Shuffle a data set anew in each epoch. (A stream shuffles itself.)
        drop_last: Leave out the incomplete batch at the end of an epoch of a data set.
        seed: Seed of the order.
        batches_per_epoch: For streams: batches that make an epoch. None makes one reading an epoch.
        pin_memory: Copy batches to pinned memory, for a faster way to the GPU.
        tokens_per_batch: For data sets with lengths: tokens a training batch and rank, in place of
            `batch_size` samples. `drop_last` then leaves out nothing.

    Attributes:
        restart_epoch: Begin the epoch anew where a checkpoint's place in it is one in other data
            (`--restart_epoch true` on the command line); False refuses such a checkpoint.
    """

    restart_epoch = False

    def __init__(
        self,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        batches_per_epoch: int | None = None,
        pin_memory: bool = False,
        tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self.pin_memory = pin_memory
        self.tokens_per_batch = tokens_per_batch
        self._loader: ResumableLoader | None = None
        self._restored: dict[str, Any] | None = None

    def training_data(self) -> Dataset | Stream:
        """The training samples: a map-style data set or a stream. Called after `setup("fit")`."""
        raise NotImplementedError

    def data_key(self) -> Any:
        """What the training data depend on beside their order, as plain data for JSON."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Makes a batch of a list of samples."""
        raise NotImplementedError

    def train_dataloader(self) -> ResumableLoader:
        """The loader of `training_data`, at the checkpoint's position where there is one."""
        trainer = self.trainer
        assert trainer is not None
        data = self.training_data()
        common: dict[str, Any] = {
            "collate": self.collate,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
        }
        if isinstance(data, Stream):
            self._loader = ResumableStreamLoader(
                trainer,
                stream=data,
                batch_size=self.batch_size,
                seed=self.seed,
                batches_per_epoch=self.batches_per_epoch,
                **common,
            )
        else:
            self._loader = ResumableDataLoader(
                trainer, dataset=data, order=self._order(data), **common
            )
        self._loader.restart_epoch = self.restart_epoch
        self._loader.data_key = self.data_key()
        if self._restored is not None:
            self._loader.load_state_dict(self._restored)
            self._restored = None
        return self._loader

    def _order(self, data: Dataset) -> EpochOrder | TokenOrder:
        assert self.trainer is not None
        common: dict[str, Any] = {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
        }
        if self.tokens_per_batch is not None:
            lengths = getattr(data, "lengths", None)
            if lengths is None:
                raise ValueError(
                    f"tokens_per_batch ({self.tokens_per_batch}) needs data that says how long its "
                    f"samples are, which {type(data).__name__} does not: use batch_size"
                )
            return TokenOrder(lengths, tokens_per_batch=self.tokens_per_batch, **common)
        return EpochOrder(
            len(data),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            **common,
        )

    def eval_dataloader(
        self, dataset: Dataset, collate: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader:
        """A loader for validation, test or prediction: in order, each rank its share, no repeats.

        Random numbers drawn for a batch are the same at each validation.

        Args:
            dataset: A map-style data set.
            collate: Makes a batch of a list of samples; the module's own by default.

        Raises:
            ValueError: If there are fewer samples than ranks. Lightning leaves a validation out on
                a rank that has none, and the others would wait for it.
        """
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            if len(dataset) < trainer.world_size:  # type: ignore[arg-type]
                raise ValueError(
                    f"{len(dataset)} samples to validate or test with "  # type: ignore[arg-type]
                    f"are too few for {trainer.world_size} ranks: each needs one at least"
                )
            share = range(trainer.global_rank, len(dataset), trainer.world_size)  # type: ignore[arg-type]
            dataset = Subset(dataset, share)
        return DataLoader(
            EvalDataset(dataset, collate or self.collate, self.seed),
            batch_size=self.eval_batch_size or self.batch_size,
            shuffle=False,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tells the module which batches the optimiser's step is made of, where it accumulates."""
        if not isinstance(batch, MicroBatch):
            return batch
        assert self.trainer is not None
        begin: Any = getattr(self.trainer.lightning_module, "begin_micro_batch", None)
        if begin is not None:
            begin(batch.number, batch.step)
        return batch.batch

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch; to a GPU without waiting for it, as Lightning does for tensors alone."""
        if device.type == "cuda" and hasattr(batch, "pin_memory"):
            return batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def epoch_restarted(self) -> bool:
        """Whether the epoch of the checkpoint that was loaded is begun anew."""
        return self._loader is not None and self._loader.restarted

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for the checkpoint."""
        return self._loader.state_dict() if self._loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the position of a checkpoint; the next `train_dataloader` starts there."""
        self._restored = state_dict
