"""Gap closed: against plain means and the normal approximation, over ranks, and undefined gaps."""

import numpy as np
import pytest
import torch

from refrag_lightning.evaluation.gap import (
    MIN_GROUPS,
    Bootstrap,
    ValueTable,
    gap_closed,
    groups_of,
)


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
    values, tokens = np.tile([1.0, 4.0, 2.0], 4), np.tile([3.0, 1.0, 6.0], 4)
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


def test_few_examples_have_no_interval_and_no_share_of_a_gap():
    compressed, full, none = (values[:MIN_GROUPS] for values in _sample())
    assert gap_closed(compressed, full, none).defined
    for number in (1, MIN_GROUPS - 1):
        gap = gap_closed(*(values[:number] for values in (compressed, full, none)))
        assert gap.full.value == pytest.approx(full[:number].mean())
        assert np.isnan([gap.full.low, gap.full.high, gap.closed.low]).all()
        assert not gap.defined and not gap.full.known


def test_groups_are_drawn_together():
    # Five questions on each of 40 paragraphs, all five as hard as their paragraph.
    hardness = np.random.default_rng(0).normal(size=40)
    values, groups = np.repeat(hardness, 5)[:, None], np.repeat([*"abcdefghij"] * 4, 5)
    groups = np.char.add(groups, np.repeat(np.arange(4), 50).astype(str))
    one_by_one = Bootstrap(values).mean(0)
    together = Bootstrap(values, groups_N=groups)
    by_paragraph = Bootstrap(hardness[:, None]).mean(0)
    assert (together.num_examples, together.num_groups) == (200, 40)
    # As many independent values as paragraphs: the interval is the paragraphs' own,
    assert together.mean(0).value == pytest.approx(one_by_one.value)
    length = together.mean(0).high - together.mean(0).low
    assert length == pytest.approx(by_paragraph.high - by_paragraph.low, rel=0.05)
    # and sqrt(5) times as long as that of questions taken for independent.
    assert length == pytest.approx((one_by_one.high - one_by_one.low) * 5**0.5, rel=0.1)
    # Groups may be of unequal size and weight, and too few have no interval.
    weights = np.arange(1.0, 201.0)
    mean = Bootstrap(values, weights_N=weights, groups_N=groups).mean(0)
    assert mean.value == pytest.approx(np.average(values[:, 0], weights=weights))
    assert not Bootstrap(values, groups_N=np.repeat([0, 1], 100)).mean(0).known


def test_groups_of_one_change_no_number():
    compressed, full, none = _sample(60)
    groups = groups_of([()] * 30 + [(n,) for n in range(30)])
    assert groups.tolist() == [*range(60)]
    assert gap_closed(compressed, full, none, groups=groups) == gap_closed(compressed, full, none)


def test_groups_stand_on_the_same_things():
    shared = ["ab", "c", "", "ba", "", "b", "c"]
    assert groups_of(shared).tolist() == [0, 1, 2, 0, 4, 5, 1]


def test_examples_without_weight_make_no_interval():
    # A share of citations where one answer of 40 cites.
    values, weights = np.ones((40, 1)), np.eye(40)[3]
    mean = Bootstrap(values, weights_N=weights).mean(0)
    assert mean.value == 1.0 and not mean.known


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(size=150)
    mine = Bootstrap(values[:, None], num_draws=9999).mean(0)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    length = theirs.high - theirs.low
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * length)


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
