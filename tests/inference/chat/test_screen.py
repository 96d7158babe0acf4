"""What the chat shows of a session with a tiny model."""

import io
import re

import pytest
from rich.console import Console

from refrag_lightning.inference.chat.screen import Screen
from refrag_lightning.inference.chat.session import Session
from refrag_lightning.text.documents import Document

RIVERS = Document(
    "The Seine flows through Paris to the sea.",
    title="Rivers [bold]of[/bold] France\x1b[2J",
    attributes={"source": "rivers.md"},
)


class Shown:
    """A screen, and what stands on it since the last look."""

    def __init__(self, width=100):
        self.file = io.StringIO()
        self.screen = Screen(Console(file=self.file, width=width, highlight=False))

    def look(self):
        text = self.file.getvalue()
        self.file.seek(0)
        self.file.truncate()
        assert "\x1b" not in text
        return text


@pytest.fixture
def shown():
    return Shown()


@pytest.fixture
def session(pipeline):
    session = Session(pipeline, "runs/seine", options={"max_new_tokens": 40, "strict": False})
    session.add([RIVERS])
    return session


def answered(session):
    reply = session.ask("<doc title=Typed>The Rhone.</doc> Where does the Seine flow?")
    list(reply)
    return reply.turn


def test_an_answer_has_its_sources_and_figures_under_it(shown, session):
    reply = session.ask("Where?")
    shown.screen.stream(reply)
    shown.screen.summary(reply.turn)
    lines = [line.rstrip() for line in shown.look().splitlines() if line.strip()]
    assert lines[0] == "The Seine flows through Paris [1]."
    # Markup in a title is not obeyed, and neither are escape sequences.
    assert lines[1] == "  [1] Rivers [bold]of[/bold] France[2J  rivers.md"
    assert re.fullmatch(
        r"  1 document, \d+ rows as vectors · \d+ positions instead of \d+ · first token \S+ m?s"
        r" · [\d.]+ tokens/s",
        lines[2],
    )


def test_figures_are_not_torn_apart_on_a_narrow_screen(session):
    narrow = Shown(width=44)
    narrow.screen.summary(answered(session))
    lines = [line.strip() for line in narrow.look().splitlines() if "row" in line or "tok" in line]
    assert re.fullmatch(r"2 documents, \d+ rows as vectors", lines[0])
    assert re.fullmatch(r"first token \S+ m?s · [\d.]+ tokens/s", lines[-1])


def test_a_citation_of_nothing_is_told_and_so_is_what_was_left_out(shown, session):
    session.clear(documents=True)
    session.options |= {"too_long": "drop", "max_new_tokens": 3900}
    session.add([RIVERS, Document("word " * 8000)])
    turn = answered(session)
    session.clear(documents=True)
    session.options["max_new_tokens"] = 40
    shown.screen.summary(turn)
    assert turn.trace.actions
    assert " ".join(turn.trace.actions[0].split()[:3]) in shown.look()
    reply = session.ask("Where?")
    list(reply)
    shown.screen.summary(reply.turn)
    assert "[1] is no document" in shown.look()


def test_the_trace_has_a_line_for_each_document_and_each_row(shown, session):
    turn = answered(session)
    shown.screen.trace(turn)
    text = shown.look()
    given, typed = turn.trace.documents
    for document, title in ((given, "Rivers"), (typed, "Typed")):
        (line,) = [line for line in text.splitlines() if title in line]
        words = line.split()
        assert words[0] == document.placed.document.id
        assert str(len(document.placed.document.text)) in words
        assert str(len(document.rows)) in words
        assert {"encoded": "encoded now", "memory": "read before"}[document.origin] in line
    assert f"{turn.trace.positions} positions instead of {turn.trace.positions_as_text}" in text
    assert "4 tokens a row" in text and "first token" in text

    shown.screen.trace(turn, "1")
    text = shown.look()
    for number, row in enumerate(given.rows):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [str(number)]]
        assert f"{row.start}-{row.end}" in line and "vector" in line
    with pytest.raises(ValueError, match="read no document '9'; it read: 1, 2"):
        shown.screen.trace(turn, "9")


def test_documents_are_listed_by_how_they_came_and_shown_by_their_number(shown, session):
    shown.screen.documents(session)
    assert "given to every question" in shown.look()
    answered(session)
    shown.screen.documents(session)
    text = shown.look()
    assert "typed with a question" in text and "rivers.md" in text
    shown.screen.documents(session, "2")
    assert "The Rhone." in shown.look()
    with pytest.raises(ValueError, match="there is no document '3'"):
        shown.screen.documents(session, "3")
    session.clear(documents=True)
    shown.screen.documents(session)
    assert "there are no documents; /add FILE gives some" in shown.look()


@pytest.mark.parametrize("width", [100, 60])
def test_two_answers_stand_beside_each_other_where_there_is_room(session, width):
    shown = Shown(width)
    turn = answered(session)
    shown.screen.beside(turn, session.ask_with_full_text())
    lines = shown.look().splitlines()
    both = [line for line in lines if "as it was answered" in line and "with full text" in line]
    assert bool(both) == (width == 100)
    text = "\n".join(lines)
    assert text.count("The Seine flows through Paris [1].") == 2
    assert "2 documents as text" in text and "rows as vectors" in text
    assert max(map(len, lines)) <= width


def test_an_answer_that_was_stopped_at_once_has_no_trace(shown, session):
    reply = session.ask("Where?")
    reply.stop()
    shown.screen.stream(reply)
    shown.screen.summary(reply.turn)
    assert shown.look().split() == ["stopped"]
    with pytest.raises(ValueError, match="stopped before its documents were read"):
        shown.screen.trace(reply.turn)


def test_an_error_is_one_line(shown):
    shown.screen.error(ValueError("two\n  lines \x1b[2J"))
    shown.screen.error(FileNotFoundError(2, "No such file or directory", "a.md"))
    assert shown.look().split("\n") == [
        "error: two lines [2J",
        "",
        "error: No such file or directory: a.md",
        "",
        "",
    ]


def test_the_help_names_every_command(shown):
    from refrag_lightning.inference.chat.commands import COMMANDS

    shown.screen.help()
    text = shown.look()
    assert all(f"{command.name} " in text for command in COMMANDS)
