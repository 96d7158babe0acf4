from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.biographies import FACTS, UNKNOWN, Biographies

groups = st.tuples(st.integers(0, 10**9), st.integers(1, 5))


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    one, same, other = Biographies(3), Biographies(3), Biographies(4)
    assert one.group(5, 2) == same.group(5, 2)
    assert [p.values for p in one.group(5, 2)] == [p.values for p in same.group(5, 2)]
    assert one.group(5, 2) != one.group(6, 2)
    assert not set(one.lasts) & set(one.firsts)
    assert one.places != other.places


@given(groups, st.integers(0, 3))
def test_every_answer_stands_in_the_biographies_that_it_needs(group, seed):
    world = Biographies(seed, left_out=0.2)
    people = world.group(*group)
    rng = random.Random(seed)
    texts = [world.text(person, rng) for person in people]
    assert len({person.name for person in people}) == len(people)
    for question in world.questions(people, rng):
        if question.kind == "unanswerable":
            assert question.answer == UNKNOWN
            continue
        assert question.answer in texts[question.people[-1]]
        assert people[question.people[0]].name in question.text
        if question.kind == "two":
            first, second = question.people
            # The first document leads to the second, which the question does not name.
            assert people[second].name in texts[first]
            assert people[second].name not in question.text


@given(groups)
def test_each_person_is_asked_about_each_fact_once(group):
    world = Biographies(0)
    people = world.group(*group)
    single = [q for q in world.questions(people, random.Random(0)) if q.kind == "one"]
    assert len(single) == len(FACTS) * len(people)
    assert {q.detail for q in single} == {"name", "place", "date", "number", "employer"}


def test_facts_a_sentence():
    world = Biographies(0, facts_a_sentence=(1, 1))
    person = world.group(0)[0]
    text = world.text(person, random.Random(0))
    assert text.count(".") == len(FACTS) == text.count(person.name)
    told = Biographies(0, facts_a_sentence=(8, 8)).text(person, random.Random(0))
    assert told.count(".") == 1 == told.count(person.name)


def test_a_stranger_is_in_no_document():
    world = Biographies(0)
    people = world.group(1, 3)
    question = world.stranger(people, random.Random(0))
    assert question.answer == UNKNOWN and not question.people
    assert not any(person.name in question.text for person in people)


def test_words_holds_every_word_that_is_written():
    world = Biographies(0, left_out=0.1)
    words, rng = set(world.words()), random.Random(0)
    for number in range(200):
        people = world.group(number, 3)
        written = [world.text(person, rng) for person in people]
        for question in [*world.questions(people, rng), world.stranger(people, rng)]:
            written += [question.text, question.answer]
        assert set(re.findall(r"\w+|[^\w\s]", " ".join(written))) <= words


def test_teachers_are_drawn_from_the_group_about_half_of_the_time():
    world = Biographies(0)
    known = [
        first.values["teacher"] == second.name
        for first, second in (world.group(number, 2) for number in range(1000))
    ]
    assert 0.45 < sum(known) / 1000 < 0.55


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"facts_a_sentence": (3, 2)}, r"facts_a_sentence \(\(3, 2\)\)"),
        ({"facts_a_sentence": (0, 2)}, r"facts_a_sentence \(\(0, 2\)\)"),
        ({"left_out": 1.0}, r"left_out \(1.0\)"),
        ({"wordings": 0}, r"wordings \(0\)"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Biographies(0, **setting)
