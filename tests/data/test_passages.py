"""Which passages are drawn: numbers, order, distractors, gold left out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.data.conversations import Conversation
from refrag_lightning.data.passages import PassageChoice
from refrag_lightning.data.questions import Passage


def conversation(name="c", size=6, gold=(2,), **options):
    passages = [Passage(f"{name}{n}", str(n), gold=n in gold) for n in range(size)]
    return Conversation(name, (), tuple(passages), **options)


def texts(passages):
    return [passage.text for passage in passages]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (PassageChoice(), ["c0", "c1", "c2", "c3", "c4", "c5"]),
        # The gold one and the first two others, in the retriever's order.
        (PassageChoice(3), ["c0", "c1", "c2"]),
        (PassageChoice(2), ["c0", "c2"]),
        (PassageChoice(1), ["c2"]),
        (PassageChoice(9), ["c0", "c1", "c2", "c3", "c4", "c5"]),
        (PassageChoice(3, "gold_first"), ["c2", "c0", "c1"]),
        (PassageChoice(3, "gold_last"), ["c0", "c1", "c2"]),
        (PassageChoice(4, "gold_last"), ["c0", "c1", "c3", "c2"]),
        (PassageChoice(3, drop_gold=1.0), ["c0", "c1", "c3"]),
        (PassageChoice(drop_gold=1.0), ["c0", "c1", "c3", "c4", "c5"]),
    ],
)
def test_worked_by_hand(choice, expected):
    assert texts(choice.draw(conversation(), [])) == expected


def test_nothing_is_drawn_where_there_is_no_passage():
    assert PassageChoice(3, distractors="random").draw(Conversation("c", ()), []) == []


def test_random_distractors_take_the_places_of_the_own_ones():
    other = conversation("o", gold=(0, 1, 2, 3, 4, 5))
    pool = [conversation(), other]
    np.random.seed(1)
    drawn = PassageChoice(5, distractors="random").draw(conversation(), pool)
    assert drawn[2].text == "c2" and drawn[2].gold
    others = [passage for passage in drawn if passage.text != "c2"]
    assert len(others) == 4 and all(passage.text.startswith("o") for passage in others)
    # Gold there, not here.
    assert not any(passage.gold for passage in others)


def test_random_distractors_hold_no_answer_where_there_are_others():
    other = conversation("o")
    other = replace(other, passages=(*other.passages, Passage("here is the ANSWER")))
    asking = conversation(references=("Answer",))
    np.random.seed(2)
    drawn = PassageChoice(50, distractors="random").draw(asking, [asking, other])
    assert len(drawn) == 50 and "here is the ANSWER" not in texts(drawn)
    with pytest.raises(ValueError, match="no passage of another conversation than 'c' was found"):
        PassageChoice(5, distractors="random").draw(asking, [asking])


@given(
    size=st.integers(1, 8),
    gold=st.sets(st.integers(0, 7), max_size=3),
    low=st.integers(1, 5),
    extra=st.integers(0, 4),
    order=st.sampled_from(["given", "shuffled", "gold_first", "gold_last"]),
    drop_gold=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_properties(size, gold, low, extra, order, drop_gold, seed):
    asking = conversation(size=size, gold=gold)
    choice = PassageChoice((low, low + extra), order, drop_gold=drop_gold)
    np.random.seed(seed)
    drawn = choice.draw(asking, [])
    assert len(drawn) <= low + extra and len(set(texts(drawn))) == len(drawn)
    assert set(drawn) <= set(asking.passages)
    kept = [passage for passage in asking.passages if passage.gold]
    if drop_gold == 0:
        assert len(drawn) >= min(low, size)
        assert sum(passage.gold for passage in drawn) == min(len(kept), max(low, len(drawn)))
    if drop_gold == 1:
        assert not any(passage.gold for passage in drawn)
    flags = [passage.gold for passage in drawn]
    if order == "gold_first":
        assert flags == sorted(flags, reverse=True)
    if order == "gold_last":
        assert flags == sorted(flags)
    np.random.seed(seed)
    assert choice.draw(asking, []) == drawn
    if drop_gold == 0:
        assert set(drawn) <= set(choice.most(asking))


def test_number_order_and_gold_are_drawn_evenly():
    choice = PassageChoice((1, 3), "shuffled", drop_gold=0.25)
    np.random.seed(0)
    drawn = [choice.draw(conversation(), []) for _ in range(3000)]
    counts = np.bincount([len(passages) for passages in drawn]) / len(drawn)
    np.testing.assert_allclose(counts, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    with_gold = [[p.gold for p in passages] for passages in drawn if any(p.gold for p in passages)]
    assert len(with_gold) / len(drawn) == pytest.approx(0.75, abs=0.03)
    places = np.bincount([flags.index(True) for flags in with_gold if len(flags) == 3])
    np.testing.assert_allclose(places / places.sum(), [1 / 3] * 3, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_passages": 0}, r"num_passages \(0\) must be at least 1"),
        ({"num_passages": (3, 2)}, r"num_passages \(\(3, 2\)\) must be at least 1"),
        ({"drop_gold": 1.5}, r"drop_gold \(1.5\) must be 0 to 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PassageChoice(**options)
