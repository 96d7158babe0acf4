"""What a typed line is: a question, or a command with its words."""

import pytest

from refrag_lightning.inference.chat.commands import COMMANDS, Call, read


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("Where does the Seine flow?", None),
        ("/usr/bin/env is what?", None),
        ("what does /help do?", None),
        ("1/2 or 2/3?", None),
        ("/help", Call("/help")),
        ("  /Trace  ", Call("/trace")),
        ("/trace 2", Call("/trace", ("2",))),
        ("/add a.md 'b c.md'", Call("/add", ("a.md", "b c.md"))),
        ("/clear all", Call("/clear", ("all",))),
    ],
)
def test_a_line_is_a_question_or_a_command(line, call):
    assert read(line) == call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/ful", "there is no command /ful, did you mean /full?"),
        ("/xyzzy", "there is no command /xyzzy; /help lists them"),
        ("/", "there is no command /; /help lists them"),
        ("/add", "/add needs a file: /add FILE…"),
        ("/save", "/save needs a file: /save FILE"),
        ("/save a.md b.md", "/save takes FILE behind it, got 'a.md b.md'"),
        ("/quit now", "/quit takes nothing behind it, got 'now'"),
        ("/docs 1 2", "/docs takes [ID] behind it, got '1 2'"),
        ("/add 'a", "/add: a quotation mark is never closed"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(line, message):
    with pytest.raises(ValueError) as raised:
        read(line)
    assert str(raised.value) == message


def test_every_command_is_told_apart_by_its_name():
    names = [command.name for command in COMMANDS]
    assert len({*names}) == len(names) and all(name == name.lower() for name in names)
