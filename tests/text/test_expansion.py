from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.text.expansion import expansion_masks


def chosen(num_rows, expand):
    """The expanded rows of each text, counted through its documents."""
    masks = expansion_masks(num_rows, expand)
    assert [[len(mask) for mask in text] for text in masks] == num_rows
    return [np.flatnonzero(np.concatenate([np.zeros(0, bool), *text])).tolist() for text in masks]


def test_each_text_may_say_its_own():
    num_rows = [[2, 1], [3], [], [2]]
    assert chosen(num_rows, ["all", "none", "all", [1]]) == [[0, 1, 2], [], [], [1]]
    assert chosen([[3]], ["all"]) == [[0, 1, 2]]
    assert chosen([[3]], [[0, 2]]) == [[0, 2]]
    assert chosen([[3]], [0, 2]) == [[0, 2]]
    assert chosen([[3], [2]], "all") == [[0, 1, 2], [0, 1]]


@given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 9))
def test_a_share_is_rounded_and_at_least_one(num_rows, share, seed):
    np.random.seed(seed)
    [rows] = chosen([[num_rows]], [share])
    expected = 0 if share == 0 or num_rows == 0 else max(1, round(share * num_rows))
    assert len(rows) == expected


def test_a_share_is_drawn_with_the_global_random_state():
    drawn = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        drawn.append(chosen([[20, 20], [40]], 0.5))
    assert drawn[0] == drawn[1] != drawn[2]
    # Each text draws its own.
    assert drawn[0][0] != drawn[0][1]
    # Every row has the same chance: 2,000 draws of 2 in 8, so 500 +- 5 standard deviations of 19.4.
    np.random.seed(0)
    counts = np.bincount(np.concatenate(chosen([[8]] * 2000, 0.25)).astype(int), minlength=8)
    assert (abs(counts - 500) < 97).all()


@pytest.mark.parametrize(
    ("expand", "message"),
    [
        ([1.5, "none"], r"expand \(1.5\) as a share"),
        ([-0.5, "none"], r"expand \(-0.5\) as a share"),
        (["most", "none"], r"expand \('most'\)"),
        (["all"], "1 entries for 2 texts"),
        ([[3], []], "text 0 has 3 rows, no row 3"),
        ([[True, False, True], []], "text 0 has a mask"),
    ],
)
def test_what_cannot_be_expanded(expand, message):
    with pytest.raises(ValueError, match=message):
        expansion_masks([[3], [1]], expand)
