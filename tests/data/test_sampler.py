import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.data.sampler import EpochOrder, TokenOrder


def epoch(order, number=0):
    return list(order.batches(number))


def test_an_epoch_worked_by_hand():
    order = EpochOrder(7, batch_size=3, shuffle=False)
    assert epoch(order) == [[0, 1, 2], [3, 4, 5], [6]]
    assert epoch(EpochOrder(7, batch_size=3, shuffle=False, drop_last=True)) == epoch(order)[:2]


def test_ranks_take_turns_and_the_short_batch_is_filled_from_the_start():
    ranks = [
        EpochOrder(9, batch_size=2, shuffle=False, rank=rank, world_size=3) for rank in range(3)
    ]
    # Global batches 0..5 and 6..8; nine samples need no filling, eight need one.
    assert [epoch(order) for order in ranks] == [[[0, 3], [6]], [[1, 4], [7]], [[2, 5], [8]]]
    ranks = [
        EpochOrder(8, batch_size=2, shuffle=False, rank=rank, world_size=3) for rank in range(3)
    ]
    assert [epoch(order)[1] for order in ranks] == [[6], [7], [0]]


@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    number=st.integers(0, 3),
    start=st.integers(0, 5),
)
def test_every_sample_once_an_epoch_and_the_same_from_any_start(
    num_samples, batch_size, world_size, number, start
):
    ranks = [
        EpochOrder(num_samples, batch_size=batch_size, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [epoch(order, number) for order in ranks]
    for order, own in zip(ranks, batches, strict=True):
        assert len(own) == len(order)
        assert [len(batch) for batch in own] == [len(batch) for batch in batches[0]]
        assert list(order.batches(number, start=start)) == own[start:]
    seen = [sample for own in batches for batch in own for sample in batch]
    assert set(seen) == set(range(num_samples))
    assert len(seen) - num_samples < world_size


def test_epochs_and_seeds_differ_and_repeat():
    orders = {
        tuple(map(tuple, epoch(EpochOrder(50, batch_size=7, seed=seed), number)))
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9
    assert epoch(EpochOrder(50, batch_size=7, seed=2), 1) == epoch(
        EpochOrder(50, batch_size=7, seed=2), 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"batch_size": 8, "drop_last": True}, r"5 training samples make no batch of batch_size"),
    ],
)
def test_an_epoch_without_a_batch_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        EpochOrder(5, **options)


def test_an_epoch_by_tokens_worked_by_hand():
    # 19 tokens in batches of 7 make 3 batches of 19 / 3 = 6.33 tokens. The samples start at tokens
    # 0, 3, 5 (before 6.33), 9, 10 (before 12.67) and 16.
    order = TokenOrder([3, 2, 4, 1, 6, 3], tokens_per_batch=7, shuffle=False)
    assert len(order) == 3
    assert epoch(order) == [[0, 1, 2], [3, 4], [5]]


def test_a_long_sample_leaves_no_batch_empty():
    # 9 tokens in batches of 8: two batches of 4.5. The long sample covers both.
    assert epoch(TokenOrder([8, 1], tokens_per_batch=8, shuffle=False)) == [[0], [1]]
    assert epoch(TokenOrder([1, 8], tokens_per_batch=8, shuffle=False)) == [[0], [1]]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=60),
    tokens_per_batch=st.integers(30, 90),
    world_size=st.integers(1, 4),
    number=st.integers(0, 3),
    start=st.integers(0, 5),
)
def test_by_tokens_every_sample_once_in_batches_that_are_about_even(
    lengths, tokens_per_batch, world_size, number, start
):
    ranks = [
        TokenOrder(
            lengths, tokens_per_batch=tokens_per_batch, seed=5, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    batches = [epoch(order, number) for order in ranks]
    wanted = -(-sum(lengths) // (tokens_per_batch * world_size))
    enough = wanted <= len(lengths) // world_size
    for order, own in zip(ranks, batches, strict=True):
        assert len(own) == len(order) == (wanted if enough else len(lengths) // world_size)
        assert list(order.batches(number, start=start)) == own[start:]
        assert all(own)
        for batch in own if enough else []:
            assert sum(lengths[i] for i in batch) < tokens_per_batch + max(lengths)
    seen = sorted(sample for own in batches for batch in own for sample in batch)
    assert seen == list(range(len(lengths)))


def test_orders_by_tokens_differ_by_epoch_and_repeat():
    def order():
        return TokenOrder(range(1, 51), tokens_per_batch=100, seed=2)

    assert epoch(order(), 0) != epoch(order(), 1)
    assert epoch(order(), 1) == epoch(order(), 1)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 9], {"tokens_per_batch": 8}, r"tokens_per_batch \(8\) must be at least the 9 tokens"),
        ([3], {"tokens_per_batch": 8, "world_size": 2}, r"1 training samples make no batch on 2"),
    ],
)
def test_batches_by_tokens_that_cannot_be_are_errors(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        TokenOrder(lengths, **options)
