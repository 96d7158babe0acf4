"""Gap closed: against plain means and the normal approximation, over ranks, and undefined gaps."""

import numpy as np
import pytest
import torch

from refrag_lightning.evaluation.gap import Bootstrap, ValueTable, gap_closed


def _sample(number=200, seed=0):
    rng = np.random.default_rng(seed)
    none = rng.normal(3.0, 1.0, number)
    full = none - 2.0 + rng.normal(0, 0.3, number)
    compressed = none + 0.75 * (full - none) + rng.normal(0, 0.2, number)
    return compressed, full, none


def test_estimates_are_plain_means():
    compressed, full, none = _sample()
    gap = gap_closed(compressed, full, none)
    assert gap.compressed.value == pytest.approx(compressed.mean())
    assert gap.full_minus_none.value == pytest.approx(full.mean() - none.mean())
    assert gap.compressed_minus_full.value == pytest.approx(compressed.mean() - full.mean())
    share = (compressed.mean() - none.mean()) / (full.mean() - none.mean())
    assert gap.closed.value == pytest.approx(share)
    # NLL: less is better, and the share still comes out positive.
    assert gap.defined and gap.closed.low < 0.75 < gap.closed.high


def test_intervals_are_those_of_the_normal_approximation():
    compressed, full, none = _sample(400)
    gap = gap_closed(compressed, full, none, num_draws=4000)
    for interval, values in [
        (gap.none, none),
        (gap.compressed_minus_none, compressed - none),
        (gap.full_minus_none, full - none),
    ]:
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
        assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    # The delta method for a ratio of means.
    share, base = gap.closed.value, (full - none).mean()
    half = 1.96 * ((compressed - none) - share * (full - none)).std() / abs(base) / 20
    assert gap.closed.high - gap.closed.low == pytest.approx(2 * half, rel=0.15)


def test_draws_are_of_whole_examples():
    # full = none + 1 for every example: unpaired draws would give the difference an interval.
    none = np.random.default_rng(0).normal(0, 10, 50)
    gap = gap_closed(none + 0.5, none + 1, none)
    assert gap.full_minus_none.low == pytest.approx(1) == gap.full_minus_none.high
    assert (gap.closed.low, gap.closed.high) == pytest.approx((0.5, 0.5))


def test_weights_make_means_over_tokens():
    values, tokens = np.array([1.0, 4.0, 2.0]), np.array([3.0, 1.0, 6.0])
    interval = Bootstrap(values[:, None], weights_N=tokens).mean(0)
    assert interval.value == pytest.approx((3 + 4 + 12) / 10)
    assert 1 <= interval.low < interval.value < interval.high <= 4
    # An example of three tokens counts as much as three of one token in the estimate.
    assert interval.value == pytest.approx(np.repeat(values, tokens.astype(int)).mean())


def test_nothing_closed_where_full_and_none_do_not_differ():
    rng = np.random.default_rng(1)
    none, full, compressed = rng.normal(size=(3, 100))
    assert not gap_closed(compressed, full, none).defined
    same = gap_closed(none, none, none)
    assert not same.defined and np.isnan(same.closed.value)


def test_same_seed_same_interval_and_coverage_of_95_percent():
    compressed, full, none = _sample(60)
    assert gap_closed(compressed, full, none) == gap_closed(compressed, full, none)
    other = gap_closed(compressed, full, none, seed=1)
    assert other.closed.low != gap_closed(compressed, full, none).closed.low
    hits = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=(60, 1))
        hits += Bootstrap(values, num_draws=400).mean(0).holds(0.0)
    # 95 % of 200, give or take three standard deviations and the bootstrap's small-sample bias.
    assert 176 <= hits <= 199


def test_bad_tables_are_named():
    with pytest.raises(ValueError, match="no example"):
        gap_closed([], [], [])
    with pytest.raises(ValueError, match="1 of the values are not finite"):
        gap_closed([1.0], [float("nan")], [0.0])
    with pytest.raises(ValueError, match="weights_N"):
        gap_closed([1.0], [2.0], [0.0], weights=[-1.0])


def test_metric_is_the_same_whatever_rank_saw_what():
    columns = _sample(30)
    values = torch.from_numpy(np.stack(columns, axis=1))
    whole, split = ValueTable(3), ValueTable(3)
    whole.update(torch.arange(30), values)
    # What gathering gives: rank 1's examples behind rank 0's, and one that both had.
    for order in (range(1, 30, 2), [*range(0, 30, 2), 1]):
        split.update(torch.tensor([*order]), values[[*order]])
    gaps = [Bootstrap(t.compute()[1], num_draws=300).gap(0, 1, 2) for t in (whole, split)]
    assert gaps[0] == gaps[1] == gap_closed(*columns, num_draws=300)


def test_table_is_in_order_and_each_example_stands_once():
    table = ValueTable(2)
    assert table.compute()[1].shape == (0, 2)
    table.update(torch.tensor([5, 2]), torch.tensor([[5.0, 50], [2, float("nan")]]))
    table.update(torch.tensor([3, 5]), torch.tensor([[3.0, 30], [5, 50]]))
    index, values = table.compute()
    assert index.tolist() == [2, 3, 5]
    np.testing.assert_array_equal(values, [[2, np.nan], [3, 30], [5, 50]])
