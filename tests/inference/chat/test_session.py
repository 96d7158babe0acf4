"""A conversation without a terminal, on a tiny model whose answer is known."""

import pytest

from refrag_lightning.inference.chat.session import Session
from refrag_lightning.text.documents import Document, parse
from tests.inference.chat.conftest import ENDLESS, SAYS

RIVERS = Document("The Seine flows through Paris to the sea.", title="Rivers")
TOWNS = Document("Lyon lies on the Rhone.", title="Towns", attributes={"source": "towns.md"})


@pytest.fixture
def session(pipeline):
    return Session(pipeline, "seine", options={"max_new_tokens": 40, "strict": False})


@pytest.fixture
def long(endless_pipeline):
    return Session(endless_pipeline, "endless", options={"max_new_tokens": 2000})


def test_an_answer_comes_in_pieces_and_is_remembered_with_its_sources(session):
    session.add([RIVERS, TOWNS])
    reply = session.ask("Where does the Seine flow?")
    assert session.turns == []
    pieces = list(reply)
    assert len(pieces) > 5 and "".join(pieces) == SAYS
    assert session.turns == [reply.turn]
    assert (reply.turn.text, reply.turn.stopped) == (SAYS, False)
    (citation,) = reply.turn.citations
    assert (citation.id, citation.title, citation.text) == ("1", "Rivers", RIVERS.text)
    assert [placed.source for placed in reply.turn.trace.placed] == ["", "towns.md"]


def test_what_is_fed_is_the_conversation_with_the_documents_at_its_end(session):
    session.system = "Be brief."
    list(session.ask("Hello?"))
    added = session.add([RIVERS])
    reply = session.ask("Where?")
    list(reply)
    fed = session.pipeline.prepare(session.messages(session.turns[:1], ["Where?"]), added)
    expected = session.pipeline.tokenizer.apply_chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": SAYS},
            {"role": "user", "content": [*added, "Where?"]},
        ]
    )
    assert fed.batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert reply.turn.trace.positions == expected["input_ids"].shape[1]


def test_documents_are_numbered_on_over_all_ways_to_give_them(session):
    assert [d.id for d in session.add([RIVERS, TOWNS])] == ["1", "2"]
    reply = session.ask("<doc title=Typed>The Rhone.</doc> Which river?")
    list(reply)
    assert [d.id for d in session.add([RIVERS])] == ["4"]
    list(session.ask("And now?"))
    placed = session.last.trace.placed
    assert sorted((p.document.id, p.document.title, p.kind) for p in placed) == [
        ("1", "Rivers", "given"),
        ("2", "Towns", "given"),
        ("3", "Typed", "message"),
        ("4", "Rivers", "given"),
    ]
    session.clear(documents=True)
    assert [d.id for d in session.add([TOWNS])] == ["1"]


def test_what_only_looks_like_a_tag_is_text(session):
    reply = session.ask("What does <doc> mean?")
    list(reply)
    assert reply.turn.parts == ["What does <doc> mean?"]
    # As part of a conversation it stays text, and so does what a model says.
    reply.turn.text = 'Like this: <doc id="9">evil</doc>'
    messages = session.messages(session.turns, ["And?"])
    assert [message["content"] for message in messages] == [
        ["What does <doc> mean?"],
        ['Like this: <doc id="9">evil</doc>'],
        ["And?"],
    ]


def test_stopping_keeps_what_was_said_and_marks_it(long):
    reply = long.ask("Tell me.")
    said = []
    for piece in reply:
        said.append(piece)
        if len(said) == 6:
            reply.stop()
    turn = long.last
    assert turn is reply.turn and turn.stopped and turn.answer.finish == "cancelled"
    assert turn.text == "".join(said) and turn.text.startswith("The Seine")
    assert len(turn.text) < len(ENDLESS) * 100
    # The next question goes on from there.
    assert long.messages(long.turns, ["Go on."])[1] == {
        "role": "assistant",
        "content": [turn.text],
    }


def test_stopping_before_the_first_word_leaves_the_question_out_of_the_conversation(long):
    reply = long.ask("Tell me.")
    reply.stop()
    assert list(reply) == []
    assert long.turns == [reply.turn] and reply.turn.stopped and reply.turn.trace is None
    assert long.messages(long.turns, ["Again?"]) == [{"role": "user", "content": ["Again?"]}]


def test_giving_up_takes_what_has_come(long):
    reply = long.ask("Tell me.")
    first = next(iter(reply))
    reply.give_up()
    reply.give_up()
    assert long.turns == [reply.turn]
    assert reply.turn.stopped and reply.turn.text == first and reply.turn.answer is None
    assert reply.turn.citations == () and reply.turn.trace is not None
    long.close()
    assert reply._stream.is_done


def test_full_text_is_asked_with_the_same_words_and_leaves_the_conversation_alone(session):
    session.add([RIVERS, TOWNS])
    list(session.ask("Hello?"))
    list(session.ask("Where?"))
    reply = session.ask_with_full_text()
    list(reply)
    assert len(session.turns) == 2 and reply.turn.text == SAYS
    vectors, full = session.last.trace, reply.turn.trace
    assert full.positions == full.positions_as_text == vectors.positions_as_text
    assert full.positions > vectors.positions
    assert {row.state for row in full.row_traces} == {"tokens"}
    assert {row.state for row in vectors.row_traces} == {"vector"}


def test_full_text_needs_documents_that_were_compressed(session):
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        session.ask_with_full_text()
    list(session.ask("Hello?"))
    with pytest.raises(ValueError, match="without documents"):
        session.ask_with_full_text()
    session.add([RIVERS])
    session.options["expand"] = "all"
    list(session.ask("Where?"))
    with pytest.raises(ValueError, match="full text already"):
        session.ask_with_full_text()


def test_a_refused_question_is_not_remembered(session):
    session.options["max_new_tokens"] = 100_000
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(session.ask("Where?"))
    with pytest.raises(ValueError, match="the question is empty"):
        session.ask(" \n")
    assert session.turns == []


def test_clearing_forgets_the_conversation_and_only_then_the_documents(session):
    session.add([RIVERS])
    list(session.ask("Where?"))
    session.clear()
    assert session.turns == [] and len(session.documents) == 1
    session.clear(documents=True)
    assert session.documents == []


def test_questions_are_parsed_as_everywhere(session):
    question = 'Where? <doc id="7" title="Rivers">The Seine.</doc>'
    assert session.ask(question).turn.parts == parse(question)
