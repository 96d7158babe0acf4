"""Training loaders that know their position: for data sets and for streams (see data/resume.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from refrag_lightning.data.sampler import EpochOrder, TokenOrder
from refrag_lightning.data.stream import Stream
from refrag_lightning.data.worker import BatchDataset, StreamBatches, as_it_is


class MicroBatch(NamedTuple):
    """A batch of an accumulated gradient, with all batches that the optimiser's step is made of.

    A target is to weigh the same in each of them, so the first one already has to know how many
    targets there are in all.

    Attributes:
        batch: The batch.
        number: Which of the step's batches it is.
        step: The step's batches, in order.
    """

    batch: Any
    number: int
    step: Sequence[Any]


class ResumableLoader:
    """What the two loaders below share: where they stand.

    Where gradients are accumulated over several batches, it gives each as a `MicroBatch`, and
    `ResumableDataModule` hands the module what is in it.

    Lightning asks for an iterator more than once at the beginning of an epoch, and before it has
    restored its own counters (`Trainer.estimated_stepping_batches` does). So an epoch counts as
    begun when the trainer's count of processed batches has moved, not when `iter` is called.

    Args:
        trainer: The trainer whose progress is followed.
        num_workers: Worker processes; 0 loads in the main process.
        pin_memory: Copy batches to pinned memory, for a faster way to the GPU.

    Attributes:
        restart_epoch: Whether a place in an epoch of other data may be taken for its beginning.
        restarted: Whether one was.
        data_key: What the data depend on beside their order; plain data.
    """

    restart_epoch = False
    restarted = False
    data_key: Any = None

    def __init__(self, trainer: Trainer, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.trainer = trainer
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.begin: dict[str, Any] = {"epoch": 0, "batch": 0, "processed": 0}

    def _processed(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def _batches_since_begin(self) -> int:
        # The counters are restored after the first call of `iter`: until then they say 0.
        return max(0, self._processed() - self.begin["processed"])

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which samples stand in which batch: a place means nothing under others."""
        raise NotImplementedError

    def _at(self, num_batches: int) -> dict[str, Any]:
        """The position `num_batches` after `begin`, in the same epoch."""
        raise NotImplementedError

    def _next_epoch(self, position: dict[str, Any]) -> dict[str, Any]:
        """The beginning of the epoch after `position`'s."""
        raise NotImplementedError

    def _batches(self) -> Iterator[Any]:
        """Yields the batches from `begin` to the end of its epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        done = self._batches_since_begin()
        if done:
            self.begin = self._next_epoch(self._at(done)) | {"processed": self._processed()}
        return self._micro_batches(self._batches(), self.begin["batch"])

    def _micro_batches(self, batches: Iterator[Any], place: int) -> Iterator[Any]:
        """Yields batches from the epoch's batch `place` on, fetching those of a step together."""
        while True:
            accumulated = self.trainer.accumulate_grad_batches
            # As in Lightning, steps are counted from the epoch's first batch, and its last one
            # ends a step.
            size = accumulated - place % accumulated
            limit = self.trainer.limit_train_batches
            if not isinstance(limit, int):
                limit = self.trainer.num_training_batches
            step = list(islice(batches, int(max(1, min(size, limit - place)))))
            if not step:
                return
            for number, batch in enumerate(step):
                yield batch if accumulated == 1 else MicroBatch(batch, number, step)
            place += len(step)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was trained on, of every rank."""
        done = self._batches_since_begin()
        position = self._at(done)
        if done and self.trainer.is_last_batch:
            position = self._next_epoch(position)
        position = position | {"processed": self.begin["processed"] + done}
        return {"ranks": _gather(position), "settings": self._own_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state` at the next `iter`.

        Raises:
            ValueError: If `state` was written by another number of ranks, or in the middle of an
                epoch of other data or in another order, and the epoch may not be started anew.
        """
        ranks = state["ranks"]
        if len(ranks) != self.trainer.world_size:
            raise ValueError(
                f"the checkpoint was written by {len(ranks)} rank(s), this run has "
                f"{self.trainer.world_size}: the position in the data would not be the same"
            )
        self.begin = dict(ranks[self.trainer.global_rank])
        changes = self._changes(state.get("settings"))
        if not changes or not self.begin["batch"]:
            return
        if not self.restart_epoch:
            raise ValueError(
                f"the checkpoint was written after batch {self.begin['batch']} of an epoch of "
                f"other training data ({'; '.join(changes)}), so that place means nothing here: "
                "give the data of the checkpoint, or --restart_epoch true to begin the epoch anew"
            )
        self.restarted = True
        self.begin = self._next_epoch(self.begin) | {"epoch": self.begin["epoch"]}

    def _own_settings(self) -> dict[str, Any]:
        # Through JSON: what comes back from a checkpoint has lists where there were tuples.
        settings: dict[str, Any] = json.loads(json.dumps(self.settings | {"data": self.data_key}))
        return settings

    def _changes(self, saved: dict[str, Any] | None) -> list[str]:
        """What is not as it was when a checkpoint's settings were written."""
        if saved is None:
            return []  # of an earlier version, which did not write them
        own = self._own_settings()
        changes = [
            f"{name} {saved.get(name)} -> {own.get(name)}"
            for name in sorted(own.keys() | saved.keys())
            if name != "data" and own.get(name) != saved.get(name)
        ]
        if own["data"] != saved.get("data"):
            changes.append("other sources or settings of what is read")
        return changes


class ResumableDataLoader(ResumableLoader):
    """Loads a map-style data set in the order of an `EpochOrder` or a `TokenOrder`.

    Args:
        trainer: The trainer whose progress is followed.
        dataset: Has `__getitem__`.
        order: Which samples make up which batch.
        collate: List of samples -> batch.
        num_workers: Worker processes.
        pin_memory: Copy batches to pinned memory.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        dataset: Dataset,
        order: EpochOrder | TokenOrder,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(trainer, num_workers=num_workers, pin_memory=pin_memory)
        self.dataset = dataset
        self.order = order
        self.collate = collate

    def __len__(self) -> int:
        """Batches of a whole epoch, also where this one is resumed in its middle."""
        return len(self.order)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the order."""
        return self.order.settings

    def _at(self, num_batches: int) -> dict[str, Any]:
        return self.begin | {"batch": self.begin["batch"] + num_batches}

    def _next_epoch(self, position: dict[str, Any]) -> dict[str, Any]:
        return position | {"epoch": position["epoch"] + 1, "batch": 0}

    def _batches(self) -> Iterator[Any]:
        return iter(
            DataLoader(
                BatchDataset(self.dataset, self.collate, [self.order.seed, self.order.rank]),
                sampler=_Jobs(self.order, self.begin["epoch"], self.begin["batch"]),
                batch_size=None,
                collate_fn=as_it_is,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),
            )
        )


class ResumableStreamLoader(ResumableLoader):
    """Loads a `Stream`, each worker of each rank its own share of it.

    Args:
        trainer: The trainer whose progress is followed.
        stream: What to read.
        batch_size: Samples a batch.
        collate: List of samples -> batch.
        seed: Seed of random numbers drawn in the stream or in `collate`.
        batches_per_epoch: Batches that make an epoch; None makes one reading an epoch.
        num_workers: Worker processes.
        pin_memory: Copy batches to pinned memory.

    Raises:
        ValueError: If `batches_per_epoch` is None on several ranks.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        stream: Stream,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int = 0,
        batches_per_epoch: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(trainer, num_workers=num_workers, pin_memory=pin_memory)
        if batches_per_epoch is None and trainer.world_size > 1:
            raise ValueError(
                f"a stream on {trainer.world_size} ranks needs batches_per_epoch, since the "
                "ranks' shares of it may differ in length"
            )
        self.stream = stream
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self.begin |= {"workers": None, "turn": 0}
        self._recent: dict[int, dict[str, Any]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stream's batches."""
        return {
            "batch_size": self.batch_size,
            "batches_per_epoch": self.batches_per_epoch,
            "seed": self.seed,
        }

    def __len__(self) -> int:
        """Batches an epoch; a TypeError, as for any iterable, where that is not known."""
        if self.batches_per_epoch is None:
            raise TypeError("a stream without batches_per_epoch has no length")
        return self.batches_per_epoch

    def _at(self, num_batches: int) -> dict[str, Any]:
        return self._recent[num_batches] if num_batches else self.begin

    def _next_epoch(self, position: dict[str, Any]) -> dict[str, Any]:
        position = position | {"epoch": position["epoch"] + 1, "batch": 0}
        if self.batches_per_epoch is None:
            position |= {"workers": None, "turn": 0}
        return position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state` at the next `iter`.

        Raises:
            ValueError: If `state` was written by another number of ranks or workers.
        """
        super().load_state_dict(state)
        saved = self.begin["workers"]
        if saved is not None and len(saved) != max(1, self.num_workers):
            raise ValueError(
                f"the checkpoint was written in the middle of a stream with num_workers="
                f"{len(saved)}, this run has num_workers={self.num_workers}: the shares of the "
                "workers would not be the same"
            )

    def _batches(self) -> Iterator[Any]:
        shares = max(1, self.num_workers)
        begin = self.begin
        states: list[Any] = list(begin["workers"] or [None] * shares)
        dataset = StreamBatches(
            self.stream,
            batch_size=self.batch_size,
            collate=self.collate,
            seed=self.seed,
            epoch=begin["epoch"],
            endless=self.batches_per_epoch is not None,
            states=states,
            first=begin["turn"],
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        loader = DataLoader(
            dataset,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        return self._follow(iter(loader), states)

    def _follow(self, batches: Iterator[Any], states: list[Any]) -> Iterator[Any]:
        begin, states = self.begin, list(states)
        self._recent = {}
        left = (self.batches_per_epoch or 0) - begin["batch"]
        for number, (share, state, batch) in enumerate(batches, start=1):
            states[share] = state
            self._recent[number] = begin | {
                "batch": begin["batch"] + number,
                "workers": list(states),
                "turn": (share + 1) % len(states),
            }
            # A step's batches are fetched together, and Lightning fetches one batch ahead where
            # there is no length, never more.
            self._recent.pop(number - 4 - self.trainer.accumulate_grad_batches, None)
            yield batch
            if number == left:
                return


class _Jobs:
    """A sampler of (epoch, batch number, sample indices)."""

    def __init__(self, order: EpochOrder | TokenOrder, epoch: int, start: int) -> None:
        self.order = order
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        batches = self.order.batches(self.epoch, start=self.start)
        for number, samples in enumerate(batches, start=self.start):
            yield self.epoch, number, samples

    def __len__(self) -> int:
        return len(self.order) - self.start


def _gather(value: Any) -> list[Any]:
    """`value` of every rank, in the ranks' order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
