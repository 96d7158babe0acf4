"""What runs inside a loader's workers: making batches, and seeding them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from refrag_lightning.data.stream import Stream


class BatchDataset(Dataset):
    """Indexed by a job; gives the finished batch."""

    def __init__(
        self, dataset: Dataset, collate: Callable[[list[Any]], Any], seed: list[int]
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed

    def __getitem__(self, job: tuple[int, int, list[int]]) -> Any:
        epoch, number, samples = job
        with seeded([*self.seed, epoch, number]):
            return self.collate([self.dataset[index] for index in samples])


class EvalDataset(Dataset):
    """Gives the finished batch of a list of indices, seeded by the first of them."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> Any:
        """The batch; a DataLoader prefers this to one `__getitem__` a sample."""
        with seeded([self.seed, indices[0]]):
            return self.collate([self.dataset[index] for index in indices])


class StreamBatches(IterableDataset):
    """Runs in each worker: yields (share, state after the batch, batch).

    A DataLoader takes a batch from its workers in turn. To go on in the middle of a round, worker
    w reads share `(first + w) % shares`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        epoch: int,
        endless: bool,
        states: list[Any],
        first: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.epoch = epoch
        self.endless = endless
        self.states = states
        self.first = first
        self.rank = rank
        self.world_size = world_size

    def _samples(self, share: int, reading: int, state: Any) -> Iterator[tuple[Any, int, Any]]:
        shares = len(self.states)
        while True:
            empty = state is None
            for sample, state in self.stream.read(  # noqa: B020
                epoch=reading,
                shard=self.rank * shares + share,
                num_shards=self.world_size * shares,
                state=state,
            ):
                empty = False
                yield sample, reading, state
            if not self.endless:
                return
            if empty:
                raise ValueError(
                    f"the training stream has nothing for share {share + 1} of {shares} on rank "
                    f"{self.rank}: use fewer workers (num_workers) or more text"
                )
            reading, state = reading + 1, None

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        worker = get_worker_info()
        share = (self.first + (worker.id if worker else 0)) % len(self.states)
        saved = self.states[share]
        if saved is None:
            saved = {"reading": self.epoch, "state": None, "batches": 0}
        batches = saved["batches"]
        samples: list[Any] = []
        after = saved
        for sample, reading, state in self._samples(share, saved["reading"], saved["state"]):
            samples.append(sample)
            after = {"reading": reading, "state": state, "batches": batches + 1}
            if len(samples) == self.batch_size:
                yield share, after, self._collate(samples, reading, share, batches)
                samples, batches = [], batches + 1
        if samples:
            yield share, after, self._collate(samples, after["reading"], share, batches)

    def _collate(self, samples: list[Any], reading: int, share: int, batches: int) -> Any:
        with seeded([self.seed, self.rank, reading, share, batches]):
            return self.collate(samples)


@contextmanager
def seeded(seed: list[int]) -> Iterator[None]:
    """Seeds torch, numpy and random for the block, and puts their states back after it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    torch.default_generator.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are finished."""
    return batch
