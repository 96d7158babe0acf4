"""The curriculum against the paper's own table, and properties for other settings."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.data.curriculum import Curriculum

# Table 8 of arXiv 2509.01092: contexts of 1, 2, 4, … 256 chunks of 8 tokens, over nine stages.
PAPER = np.asarray(
    [
        [1333, 445, 148, 49, 16, 6, 2, 1, 0],
        [333, 298, 267, 238, 213, 191, 171, 153, 137],
        [83, 102, 126, 156, 193, 238, 293, 362, 447],
        [20, 35, 61, 106, 185, 324, 565, 985, 1719],
        [5, 11, 23, 48, 103, 220, 468, 997, 2125],
        [1, 3, 7, 19, 50, 133, 353, 939, 2496],
        [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
        [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
        [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
    ]
)
SETTINGS = st.builds(
    Curriculum,
    max_rows=st.integers(4, 600),
    num_stages=st.integers(1, 12),
    num_examples=st.integers(1, 100_000),
    min_rows=st.integers(1, 4),
)


def test_the_papers_settings_give_the_papers_table():
    curriculum = Curriculum(max_rows=256, num_stages=9, num_examples=42_000)
    assert curriculum.sizes.tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    # Not one cell of 81 differs when each is rounded by itself, as the paper's are.
    assert np.array_equal(np.rint(curriculum.shares() * 42_000).astype(int), PAPER)
    # The table that is trained on has exactly 42,000; the paper's sums to 42,008.
    assert curriculum.stage_table().sum() == 42_000
    assert np.abs(curriculum.stage_table() - PAPER).max() <= 1


def test_a_table_worked_by_hand():
    # Sizes 1 and 2 in two stages. Totals 2000 and 4000 (the second size lies in the second third
    # of two: 3 * 1 // 2 = 1), first terms 1333 and 333.
    table = Curriculum(max_rows=2, num_stages=2, num_examples=6000).stage_table()
    assert table.tolist() == [[1333, 667], [333, 3667]]
    # A tenth of it: 133.3 + 66.7 and 33.3 + 366.7.
    table = Curriculum(max_rows=2, num_stages=2, num_examples=600).stage_table()
    assert table.tolist() == [[133, 67], [33, 367]]


@given(SETTINGS)
def test_sizes_double_up_to_the_largest(curriculum):
    sizes = curriculum.sizes
    assert sizes[0] == curriculum.min_rows and sizes[-1] == curriculum.max_rows
    assert np.array_equal(sizes[1:-1], 2 * sizes[:-2])
    assert all(small < large <= 2 * small for small, large in pairwise(sizes))


@given(SETTINGS)
def test_rows_are_geometric_and_rounded(curriculum):
    shares = curriculum.shares()
    assert shares.sum() == pytest.approx(1)
    if curriculum.num_stages > 1:
        ratios = shares[:, 1:] / shares[:, :-1]
        assert np.allclose(ratios, ratios[:, :1], rtol=1e-9)
        # Longer contexts come later.
        assert (np.diff(ratios[:, 0]) > -1e-12).all()
    table = curriculum.stage_table()
    assert table.sum() == curriculum.num_examples and (table >= 0).all()
    # A row's total is rounded first, which moves its cells by their share of less than 1.
    assert np.abs(table - shares * curriculum.num_examples).max() < 2


@given(SETTINGS, st.integers(0, 3))
def test_a_schedule_has_each_stages_examples_in_its_place(curriculum, seed):
    rows = curriculum.schedule(seed)
    table = curriculum.stage_table()
    assert len(rows) == curriculum.num_examples
    for part, counts in zip(np.split(rows, table.sum(axis=0).cumsum()[:-1]), table.T, strict=True):
        assert np.array_equal(np.sort(part), np.repeat(curriculum.sizes, counts))
    assert np.array_equal(rows, curriculum.schedule(seed))


def test_the_seed_shuffles_within_stages():
    curriculum = Curriculum(max_rows=16, num_stages=3, num_examples=300)
    first, second = curriculum.schedule(0), curriculum.schedule(1)
    assert not np.array_equal(first, second)
    stage = slice(0, curriculum.stage_table()[:, 0].sum())
    assert np.array_equal(np.sort(first[stage]), np.sort(second[stage]))
    assert not np.array_equal(first[stage], np.sort(first[stage]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rows": 0}, r"max_rows \(0\) must be at least 1"),
        ({"num_stages": 0}, r"num_stages \(0\) must be at least 1"),
        ({"num_examples": -1}, r"num_examples \(-1\) must be at least 1"),
        ({"max_rows": 4, "min_rows": 8}, r"min_rows \(8\) must be at most max_rows \(4\)"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**settings)
