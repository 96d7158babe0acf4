"""The order of a map-style data set as a pure function of (seed, epoch).

Nothing is drawn while training runs, so the batch that follows any position is known without
replaying what came before: that is what makes a resume exact whatever the number of workers.

Several ranks: a global batch of `batch_size * world_size` samples is dealt out, rank r taking
every `world_size`-th sample from r on. Every rank gets the same number of batches of the same
size. With `drop_last` the incomplete global batch at the end of an epoch is left out; without it
the batch is kept, and at most `world_size - 1` samples from the epoch's start are repeated to make
it even.

`TokenOrder` cuts an epoch into batches of about equal numbers of tokens instead of samples: the
permuted samples are laid end to end and cut into equal lengths, each sample going to the piece
that it starts in. How many pieces there are depends on the total alone, so every epoch has the
same number of batches, which a learning rate schedule and a resume need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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

    @property
    def settings(self) -> dict[str, Any]:
        """What the order depends on; plain data."""
        return {
            "samples": self.num_samples,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[list[int]]:
        """Yields the sample indices of batches `start`, `start + 1`, … of `epoch`."""
        order = _permutation(self.num_samples, self.seed, epoch, shuffle=self.shuffle)
        stride = self.batch_size * self.world_size
        for number in range(start, len(self)):
            samples = order[number * stride : (number + 1) * stride]
            uneven = -len(samples) % self.world_size
            if uneven:
                samples = np.concatenate([samples, np.resize(order, uneven)])
            yield samples[self.rank :: self.world_size].tolist()


class TokenOrder:
    """Which samples make up batch `n` of epoch `e` on one rank, where a batch is so many tokens.

    Every sample comes once an epoch, and every rank has the same number of batches, none of them
    empty. A batch has fewer than `tokens_per_batch` plus one sample's tokens, unless there are too
    few samples to give so many batches to each rank.

    Args:
        lengths: Tokens of each sample.
        tokens_per_batch: Tokens a batch and rank.
        seed: Seed of the permutation; the same seed and epoch always give the same order.
        shuffle: False keeps the data set's own order in every epoch.
        rank: This rank, from 0.
        world_size: Number of ranks.

    Raises:
        ValueError: If an epoch would have no batch, or a sample is longer than a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        tokens_per_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        longest = int(self.lengths.max(initial=1))
        if tokens_per_batch < longest:
            raise ValueError(
                f"tokens_per_batch ({tokens_per_batch}) must be at least the {longest} tokens of "
                "the longest training sample"
            )
        if len(self.lengths) < world_size:
            raise ValueError(
                f"{len(self.lengths)} training samples make no batch on {world_size} rank(s)"
            )
        assert 0 <= rank < world_size, (rank, world_size)
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        share = tokens_per_batch * world_size
        wanted = max(1, -(-int(self.lengths.sum()) // share))
        self._num_batches = min(wanted, len(self.lengths) // world_size)

    def __len__(self) -> int:
        """Batches an epoch and rank."""
        return self._num_batches

    @property
    def settings(self) -> dict[str, Any]:
        """What the order depends on; plain data."""
        return {
            "samples": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "tokens_per_batch": self.tokens_per_batch,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[list[int]]:
        """Yields the sample indices of batches `start`, `start + 1`, … of `epoch`."""
        num_samples = len(self.lengths)
        order = _permutation(num_samples, self.seed, epoch, shuffle=self.shuffle)
        lengths = self.lengths[order]
        # One piece for each batch of each rank; the ranks' batches of a step lie side by side.
        pieces = np.arange(self._num_batches * self.world_size)
        starts = np.cumsum(lengths) - lengths
        # The piece's first sample is the first that starts at or after piece * total / pieces.
        firsts = np.searchsorted(starts * len(pieces), pieces * int(lengths.sum()))
        # A sample longer than a piece would leave the next one empty: every piece takes at least
        # one sample, and leaves at least one to each piece after it.
        firsts = np.maximum.accumulate(firsts - pieces) + pieces
        firsts = np.minimum(firsts, num_samples - len(pieces) + pieces)
        cuts = [*firsts.tolist(), num_samples]
        for number in range(start, self._num_batches):
            piece = number * self.world_size + self.rank
            yield order[cuts[piece] : cuts[piece + 1]].tolist()


def _permutation(num_samples: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_samples)
    # Both numbers go into the seed sequence: seed 1, epoch 0 is not seed 0, epoch 1.
    return np.random.default_rng([seed, epoch]).permutation(num_samples)
