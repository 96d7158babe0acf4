"""The order of a map-style data set as a pure function of (seed, epoch).

Nothing is drawn while training runs, so the batch that follows any position is known without
replaying what came before: that is what makes a resume exact whatever the number of workers.

Several ranks: a global batch of `batch_size * world_size` samples is dealt out, rank r taking
every `world_size`-th sample from r on. Every rank gets the same number of batches of the same
size. With `drop_last` the incomplete global batch at the end of an epoch is left out; without it
the batch is kept, and at most `world_size - 1` samples from the epoch's start are repeated to make
it even.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class EpochOrder:
    """Which samples make up batch `n` of epoch `e` on one rank.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples a batch and rank.
        seed: Seed of the permutation; the same seed and epoch always give the same order.
        shuffle: False keeps the data set's own order in every epoch.
        drop_last: Leave out the incomplete batch at the end of an epoch.
        rank: This rank, from 0.
        world_size: Number of ranks.

    Raises:
        ValueError: If an epoch would have no batch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        assert 0 <= rank < world_size, (rank, world_size)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        if len(self) == 0:
            raise ValueError(
                f"{num_samples} training samples make no batch of batch_size ({batch_size}) "
                f"on {world_size} rank(s)" + (" with drop_last" if drop_last else "")
            )

    def __len__(self) -> int:
        """Batches an epoch and rank."""
        whole, rest = divmod(self.num_samples, self.batch_size * self.world_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[list[int]]:
        """Yields the sample indices of batches `start`, `start + 1`, … of `epoch`."""
        if self.shuffle:
            # Both numbers go into the seed sequence: seed 1, epoch 0 is not seed 0, epoch 1.
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        else:
            order = np.arange(self.num_samples)
        stride = self.batch_size * self.world_size
        for number in range(start, len(self)):
            samples = order[number * stride : (number + 1) * stride]
            uneven = -len(samples) % self.world_size
            if uneven:
                samples = np.concatenate([samples, np.resize(order, uneven)])
            yield samples[self.rank :: self.world_size].tolist()
