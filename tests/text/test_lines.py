from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.text.lines import Positions, lay_out, pack_lines


def test_hand_worked_packing():
    # First fit needs three lines of 7 (5 and a 2; 4 and 3; the other 2). On three lines the longest
    # go first, each on the shortest: 5, 4 and 3, then a 2 behind the 3, the other behind the 4.
    lines = pack_lines(np.asarray([2, 5, 2, 3, 4, 0]), 7)
    assert lines.line.tolist() == [2, 0, 1, 2, 1, 0]
    assert lines.start.tolist() == [3, 0, 4, 0, 0, 5]
    assert lines.sizes.tolist() == [5, 6, 5]


def test_where_even_lines_would_be_too_long_first_fits_are_taken():
    # 4 and 3, 3 and 2 and 2: by the shortest line 2 comes behind 4, then 2 behind 3 and 3: 8.
    lines = pack_lines(np.asarray([4, 3, 3, 2, 2]), 7)
    assert lines.line.tolist() == [0, 0, 1, 1, 1]
    assert lines.sizes.tolist() == [7, 7]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(20, 40))
def test_texts_fill_their_lines_without_gap_or_overlap(lengths, line_length):
    lines = pack_lines(np.asarray(lengths, dtype=np.int64), line_length)
    used = [[False] * size for size in lines.sizes]
    assert all(size <= line_length for size in lines.sizes)
    for line, start, length in zip(lines.line, lines.start, lengths, strict=True):
        for place in range(start, start + length):
            assert not used[line][place]
            used[line][place] = True
    assert all(map(all, used))
    # Two lines more than half full on average: what first fit promises.
    assert len(lines.sizes) <= 2 * sum(lengths) // line_length + 1


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
    # Two lines, the longest first, each on the shorter line: text 0; text 1, and text 2 behind it.
    expected = {
        "input_ids": [[11, 12, 13], [21, 9, 31]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
        "position_ids": [[0, 1, 2], [0, 1, 0]],
        "slot_ids": [[-1, -1, -1], [-1, 4, -1]],
        "labels": [[-100, 12, 13], [-100, -100, -100]],
        "segment_ids": [[0, 0, 0], [1, 1, 2]],
    }
    assert data == expected


def test_without_anything_to_learn_there_are_no_labels():
    text = Positions()
    text.add(np.asarray([1, 2]))
    assert "labels" not in lay_out([text], padding_side="left", padding_id=0)
    assert lay_out([], padding_side="left", padding_id=0)["input_ids"].shape == (0, 0)
