from collections import Counter

import numpy as np
import pytest

from refrag_lightning.data.conversations import Conversation
from refrag_lightning.data.mixture import Mixture, WeightedSource


def part(name, size):
    return [Conversation(f"{name}{n}", ()) for n in range(size)]


def test_weights_worked_by_hand():
    parts = [part("a", 4), part("b", 2), part("c", 3)]
    lengths = [np.array([1, 2, 3, 4]), np.array([10, 20]), np.array([7, 8, 8])]
    mixture = Mixture(parts, [0.5, 2, 1], lengths)
    np.random.seed(0)
    ids = [mixture[n].id for n in range(len(mixture))]
    # Half of four, twice two, three.
    assert len(ids) == 2 + 4 + 3
    assert all(name.startswith("a") for name in ids[:2])
    assert ids[2:] == ["b0", "b1", "b0", "b1", "c0", "c1", "c2"]
    # What is drawn counts as its source's mean, 2.5 rounded up.
    assert mixture.lengths.tolist() == [3, 3, 10, 20, 10, 20, 7, 8, 8]


def test_the_broken_part_of_a_weight_is_drawn_from_the_whole_source():
    mixture = Mixture([part("a", 4)], [1.5])
    assert [mixture[n].id for n in range(4)] == ["a0", "a1", "a2", "a3"]
    np.random.seed(0)
    drawn = Counter(mixture[n].id for _ in range(2000) for n in (4, 5))
    assert len(mixture) == 6 and len(drawn) == 4
    assert max(drawn.values()) < 1.2 * min(drawn.values())


def test_an_empty_source_takes_no_place():
    mixture = Mixture([[], part("a", 2)], [3, 1], [np.zeros(0, dtype=int), np.array([5, 6])])
    assert [mixture[n].id for n in range(len(mixture))] == ["a0", "a1"]
    assert mixture.lengths.tolist() == [5, 6]


def test_a_weight_must_be_positive():
    with pytest.raises(ValueError, match=r"weight \(0\) must be above 0"):
        WeightedSource(None, 0)
