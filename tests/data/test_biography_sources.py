"""Invented people as questions and conversations: splits, gold passages, answers in the text."""

from itertools import islice

import pytest

from refrag_lightning.data.biography_sources import (
    BiographyConversations,
    BiographyQuestions,
    BiographyTexts,
    BiographyWorld,
)
from refrag_lightning.data.conversations import Place


@pytest.fixture(scope="module")
def world():
    return BiographyWorld(num_people=3, strangers=2, left_out=0.1)


def test_answers_stand_in_the_gold_passages(world):
    source = BiographyQuestions(world, num_groups=40, eval_groups=5)
    questions = list(source.questions("train"))
    kinds = {question.kind for question in questions}
    assert kinds == {"one", "two", "unanswerable"}
    for question in questions:
        gold = [passage.text for passage in question.passages if passage.gold]
        assert len(question.passages) == 3
        (answer,) = question.answers
        if question.kind == "one":
            assert len(gold) == 1 and answer in gold[0]
        elif question.kind == "two":
            assert len(gold) == 2 and any(answer in text for text in gold)
        else:
            assert not any(answer in passage.text for passage in question.passages)


def test_splits_share_no_person_and_come_again(world):
    source = BiographyQuestions(world, num_groups=30, eval_groups=30, limit=600)
    texts = {
        split: {
            passage.text for question in source.questions(split) for passage in question.passages
        }
        for split in ("train", "val", "test")
    }
    assert not texts["train"] & texts["val"]
    assert not texts["train"] & texts["test"]
    assert not texts["val"] & texts["test"]
    again = BiographyQuestions(world, num_groups=30, eval_groups=30, limit=600)
    assert list(again.questions("val")) == list(source.questions("val"))
    assert again.key() == source.key()
    other = BiographyQuestions(BiographyWorld(seed=1, num_people=3), num_groups=30, eval_groups=30)
    assert other.key() != source.key()
    assert next(other.questions("val")) != next(source.questions("val"))


def test_more_groups_leave_the_first_ones_as_they_are(world):
    few = BiographyQuestions(world, num_groups=3, questions_a_group=4)
    many = BiographyQuestions(world, num_groups=30, questions_a_group=4)
    assert list(few.questions("train")) == list(islice(many.questions("train"), 12))


def test_gold_passages_stand_at_every_place(world):
    source = BiographyQuestions(world, num_groups=200, questions_a_group=1)
    places = [[p.gold for p in question.passages] for question in source.questions("train")]
    assert all(40 < sum(flags[place] for flags in places) < 160 for place in range(3))
    source = BiographyQuestions(world, num_groups=20, questions_a_group=1, shuffle=False)
    assert all(
        [p.id for p in question.passages] == ["0", "1", "2"]
        for question in source.questions("train")
    )


def test_conversations_retell_and_ask(world):
    source = BiographyConversations(world, num_groups=20, questions_a_group=4, retell=2)
    for conversation in source.conversations("train"):
        turns = conversation.turns
        assert [turn.role for turn in turns] == ["user", "assistant"] * 6
        assert turns[0].content[0] is Place.PASSAGES
        texts = {passage.text for passage in conversation.passages}
        # Behind the questions, which could otherwise be answered from what is told again.
        for asked, told in zip(turns[8::2], turns[9::2], strict=True):
            (text,) = told.content
            assert text in texts
            # The person's name stands at the end of the request.
            assert text.startswith(asked.content[-1].removeprefix("Repeat the text about ")[:-1])
        assert conversation.references == turns[-1].content
        assert conversation.task == "answer"


def test_retelling_alone_is_reconstruction(world):
    source = BiographyConversations(world, num_groups=2, questions_a_group=0, retell=1)
    tasks = {conversation.task for conversation in source.conversations("train")}
    assert tasks == {"reconstruct"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BiographyWorld(num_people=0), r"num_people \(0\) must be at least 1"),
        (lambda: BiographyWorld(strangers=-1), r"strangers \(-1\) must not be negative"),
        (lambda: BiographyConversations(retell_prompt="Go."), r"'Go.'\) must have \{name\}"),
        (lambda: BiographyConversations(questions_a_group=0), "leave nothing to be said"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_texts_are_those_of_the_groups_and_no_person_stands_in_two_splits():
    world = BiographyWorld(num_people=2)
    source = BiographyTexts(world, num_groups=3, eval_groups=2)
    splits = {split: list(source.texts(split)) for split in ("train", "val", "test")}
    assert [len(texts) for texts in splits.values()] == [3, 2, 2]
    questions = BiographyQuestions(world, num_groups=3, eval_groups=2, shuffle=False)
    read = dict.fromkeys(
        " ".join(p.text for p in question.passages) for question in questions.questions("val")
    )
    assert list(read) == splits["val"]
    assert len({text for texts in splits.values() for text in texts}) == 7
    assert source.key() != BiographyTexts(num_groups=3, eval_groups=2).key()
