from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.text.lines import Positions, first_fit, lay_out


def test_hand_worked_packing():
    # Longest first: 5 opens line 0, 4 line 1, 3 goes behind the 4 (7 of 7), the first 2 behind
    # the 5 (7 of 7), the second 2 opens line 2, and so does the text without positions find line 0.
    lines = first_fit(np.asarray([2, 5, 2, 3, 4, 0]), 7)
    assert lines.line.tolist() == [0, 0, 2, 1, 1, 0]
    assert lines.start.tolist() == [5, 0, 0, 4, 0, 7]
    assert lines.sizes.tolist() == [7, 7, 2]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(20, 40))
def test_texts_fill_their_lines_without_gap_or_overlap(lengths, line_length):
    lines = first_fit(np.asarray(lengths, dtype=np.int64), line_length)
    used = [[False] * size for size in lines.sizes]
    assert all(size <= line_length for size in lines.sizes)
    for line, start, length in zip(lines.line, lines.start, lengths, strict=True):
        for place in range(start, start + length):
            assert not used[line][place]
            used[line][place] = True
    assert all(map(all, used))
    # No two lines could be one: that is what first fit promises.
    sizes = sorted(lines.sizes)
    assert all(a + b > line_length for a, b in pairwise(sizes))


def texts():
    """Three texts: ids 11 12 13 (the last two learnt), 21 and a slot, 31 (learnt)."""
    first, second, third = Positions(), Positions(), Positions()
    first.add(np.asarray([11]))
    first.add(np.asarray([12, 13]), labels=np.asarray([12, 13]))
    second.add(np.asarray([21]))
    second.add(np.asarray([9]), slots=np.asarray([4]))
    third.add(np.asarray([31]), labels=np.asarray([31]))
    return [first, second, third]


def as_lists(data):
    return {key: value.tolist() for key, value in data.items()}


def test_hand_worked_lines_of_their_own():
    data = as_lists(lay_out(texts(), padding_side="left", padding_id=9))
    assert data == {
        "input_ids": [[11, 12, 13], [9, 21, 9], [9, 9, 31]],
        "attention_mask": [[1, 1, 1], [0, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 1], [0, 0, 0]],
        "slot_ids": [[-1, -1, -1], [-1, -1, 4], [-1, -1, -1]],
        # Nothing predicts 31, the first token of its text.
        "labels": [[-100, 12, 13], [-100, -100, -100], [-100, -100, -100]],
    }
    right = as_lists(lay_out(texts(), padding_side="right", padding_id=9))
    assert right["input_ids"] == [[11, 12, 13], [21, 9, 9], [31, 9, 9]]
    assert right["slot_ids"] == [[-1, -1, -1], [-1, 4, -1], [-1, -1, -1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_hand_worked_packed_lines(side):
    data = as_lists(lay_out(texts(), padding_side=side, padding_id=9, line_length=4))
    # The longest first: text 0, then text 2 behind it after text 1 found no room there.
    both = {
        "input_ids": [[11, 12, 13, 31], [21, 9]],
        "attention_mask": [[1, 1, 1, 1], [1, 1]],
        "position_ids": [[0, 1, 2, 0], [0, 1]],
        "slot_ids": [[-1, -1, -1, -1], [-1, 4]],
        "labels": [[-100, 12, 13, -100], [-100, -100]],
        "segment_ids": [[0, 0, 0, 2], [1, 1]],
    }
    padding = {"input_ids": 9, "attention_mask": 0, "position_ids": 0, "slot_ids": -1}
    padding |= {"labels": -100, "segment_ids": -1}
    for key, (first, second) in both.items():
        pad = [padding[key]] * 2
        assert data[key] == [first, pad + second if side == "left" else second + pad], key


def test_without_anything_to_learn_there_are_no_labels():
    text = Positions()
    text.add(np.asarray([1, 2]))
    assert "labels" not in lay_out([text], padding_side="left", padding_id=0)
    assert lay_out([], padding_side="left", padding_id=0)["input_ids"].shape == (0, 0)
