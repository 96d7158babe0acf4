"""Streams: training text that is read once from front to back and has no index.

A stream is anything with

    read(*, epoch, shard, num_shards, state=None) -> Iterator[(sample, state)]

`state` is plain data (numbers, strings, lists, dicts) that says where reading stands after that
sample; `read(..., state=state)` goes on with the sample that follows. `shard` of `num_shards`
reads its own share, and the shares together are the whole. The same arguments always give the
same samples. Because each sample carries its state, workers may read ahead as far as they like:
what is saved is the state of the last batch that was trained on.

Streams are built from one another:

    stream = ShuffledStream(IterableStream(read_lines), seed=1)
    stream = MappedStream(stream, cut_into_samples)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Stream(Protocol):
    """What a training stream has to offer (see the module's docstring)."""

    def read(
        self, *, epoch: int, shard: int, num_shards: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (sample, state after it), from after `state` on."""
        ...


class IterableStream:
    """Any iterable that gives the same items in the same order each time.

    The state is the number of items read: a resume reads and drops as many. Items are dealt out
    to the shards in turn.

    Args:
        factory: Called for each reading; returns the iterable (a generator function will do). It
            has to be picklable where workers are spawned rather than forked.
    """

    def __init__(self, factory: Callable[[], Iterable[Any]]) -> None:
        self.factory = factory

    def read(
        self, *, epoch: int, shard: int, num_shards: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """See `Stream`. The order is the same in every epoch."""
        done = state or 0
        for number, item in enumerate(self.factory()):
            if number >= done and number % num_shards == shard:
                yield item, number + 1


class ShuffledStream:
    """Shuffles a stream in blocks of `block_size` samples.

    A rolling buffer, the usual way, would have to be saved with each checkpoint or be lost at a
    resume (Hugging Face's is lost). A block is a pure function of (seed, epoch, shard, block), so
    the state is the place where the block begins and how many of it were taken, and a resume
    reads at most one block again.

    Args:
        stream: The stream to shuffle.
        block_size: Samples held in memory by each worker.
        seed: Seed of the order.
    """

    def __init__(self, stream: Stream, *, block_size: int = 1000, seed: int = 0) -> None:
        if block_size < 1:
            raise ValueError(f"block_size ({block_size}) must be at least 1")
        self.stream = stream
        self.block_size = block_size
        self.seed = seed

    def read(
        self, *, epoch: int, shard: int, num_shards: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """See `Stream`."""
        state = state or {"begin": None, "block": 0, "taken": 0}
        begin, number, taken = state["begin"], state["block"], state["taken"]
        source = self.stream.read(epoch=epoch, shard=shard, num_shards=num_shards, state=begin)
        while True:
            block, end = [], begin
            for sample, position in source:
                block.append(sample)
                end = position
                if len(block) == self.block_size:
                    break
            if not block:
                return
            order = np.random.default_rng([self.seed, epoch, shard, number]).permutation(len(block))
            for place in range(taken, len(block)):
                yield (
                    block[order[place]],
                    {"begin": begin, "block": number, "taken": place + 1},
                )
            begin, number, taken = end, number + 1, 0


class MappedStream:
    """Makes any number of samples of each item of a stream.

    Args:
        stream: The stream to map.
        function: Item -> list of samples, possibly empty. Must always give the same list for the
            same item.
    """

    def __init__(self, stream: Stream, function: Callable[[Any], list[Any]]) -> None:
        self.stream = stream
        self.function = function

    def read(
        self, *, epoch: int, shard: int, num_shards: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """See `Stream`."""
        state = state or {"before": None, "taken": 0}
        before, taken = state["before"], state["taken"]
        for item, after in self.stream.read(
            epoch=epoch, shard=shard, num_shards=num_shards, state=before
        ):
            samples = self.function(item)
            for number in range(taken, len(samples)):
                yield samples[number], {"before": before, "taken": number + 1}
            before, taken = after, 0
