from collections import Counter
from functools import partial

import pytest

from refrag_lightning.data.stream import IterableStream, MappedStream, ShuffledStream, Stream


def numbers(size=23):
    return IterableStream(partial(range, size))


def repeated(number):
    return [(number, copy) for copy in range(number % 3)]


STREAMS = {
    "plain": numbers(),
    "shuffled": ShuffledStream(numbers(), block_size=5, seed=1),
    "mapped": MappedStream(numbers(), repeated),
    "mapped, shuffled": ShuffledStream(MappedStream(numbers(), repeated), block_size=4),
    "shuffled, mapped": MappedStream(ShuffledStream(numbers(), block_size=4), repeated),
}


@pytest.mark.parametrize("name", STREAMS)
def test_reading_goes_on_after_any_state(name):
    stream = STREAMS[name]
    assert isinstance(stream, Stream)
    for shard in range(2):
        whole = list(stream.read(epoch=1, shard=shard, num_shards=2))
        for place, (_, state) in enumerate(whole, start=1):
            rest = list(stream.read(epoch=1, shard=shard, num_shards=2, state=state))
            assert rest == whole[place:]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_the_shards_together_are_the_whole(name, num_shards):
    stream = STREAMS[name]
    parts = [
        sample
        for shard in range(num_shards)
        for sample, _ in stream.read(epoch=0, shard=shard, num_shards=num_shards)
    ]
    whole = range(23)
    if "mapped" in name:
        whole = [pair for number in range(23) for pair in repeated(number)]
    assert Counter(parts) == Counter(whole)


def test_blocks_are_shuffled_anew_in_each_epoch():
    stream = STREAMS["shuffled"]
    epochs = [
        [sample for sample, _ in stream.read(epoch=epoch, shard=0, num_shards=1)]
        for epoch in range(2)
    ]
    assert epochs[0] != epochs[1] and epochs[0] != list(range(23))
    assert sorted(epochs[0][:5]) == [0, 1, 2, 3, 4]
