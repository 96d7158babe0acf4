"""Conversations from questions, and what passages do to them."""

import pytest

from refrag_lightning.data.conversations import (
    Conversation,
    Place,
    QuestionConversations,
    Turn,
    fill,
)
from refrag_lightning.data.questions import JsonLinesQuestions, Passage, Question
from refrag_lightning.text.documents import Document

LOIRE = Passage("The Loire is long.", "x", "Loire")
SEINE = Passage("The Seine is in Paris.", "y", "Seine", gold=True)
QUESTION = Question("q7", "Which {passages} river?", ("Seine", "the Seine"), (LOIRE, SEINE), "one")


class Two(JsonLinesQuestions):
    """Two questions, without a file."""

    def read(self):
        yield from [QUESTION, QUESTION]

    def key(self):
        return {"two": 2}


def test_a_question_becomes_a_conversation():
    source = QuestionConversations(
        Two("x"), prompt="Read.\n{passages}Q: {question} A:", system="Be brief.", cite=True
    )
    first, second = source.conversations("train")
    assert first == second == source.conversation(QUESTION)
    assert first.task == "answer" and first.kind == "one"
    assert first.references == ("Seine", "the Seine")
    # A question that looks like a field is a question all the same.
    assert fill(first, [SEINE, LOIRE]) == [
        {"role": "system", "content": ["Be brief."], "train": True},
        {
            "role": "user",
            "content": [
                "Read.\n",
                Document("The Seine is in Paris.", "1", "Seine"),
                Document("The Loire is long.", "2", "Loire"),
                "Q: Which {passages} river? A:",
            ],
            "train": True,
        },
        {"role": "assistant", "content": ["Seine [1]"], "train": True},
    ]


def test_citations_follow_the_order_and_go_with_the_gold_passages():
    conversation = QuestionConversations(Two("x"), cite=True).conversation(QUESTION)
    answer = lambda *args, **options: fill(conversation, *args, **options)[-1]["content"]  # noqa: E731
    assert answer([LOIRE, SEINE]) == ["Seine [2]"]
    assert answer([SEINE, LOIRE, SEINE]) == ["Seine [1] [3]"]
    assert answer([LOIRE]) == ["Seine"]
    assert answer([SEINE], documents=False) == ["Seine"]


def test_reading_no_documents_leaves_out_those_in_messages_too():
    turn = Turn("user", ("Look: ", Document("secret"), Place.PASSAGES, "What?"))
    conversation = Conversation("c", (turn, Turn("assistant", ("Nothing.",))))
    assert fill(conversation, [SEINE], documents=False)[0]["content"] == ["Look: What?"]


def test_another_answer_keeps_the_citations():
    conversation = QuestionConversations(Two("x"), cite=True).conversation(QUESTION)
    changed = conversation.with_answer("The Seine, I think.")
    assert fill(changed, [SEINE])[-1]["content"] == ["The Seine, I think. [1]"]
    assert changed.references == conversation.references


@pytest.mark.parametrize("prompt", ["{passages}", "{question}{question}", "{passages}" * 2])
def test_a_prompt_without_its_question_is_an_error(prompt):
    with pytest.raises(ValueError, match=r"must have \{question\} once"):
        QuestionConversations(Two("x"), prompt=prompt)
