"""Keys and Ctrl-C, without a terminal."""

import os
import signal

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document as Line
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from refrag_lightning.inference.chat.commands import COMMANDS
from refrag_lightning.inference.chat.keyboard import CommandCompleter, ctrl_c, prompt_line

PASTE = "\x1b[200~{}\x1b[201~"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("Where?\r", "Where?"),
        ("Where\x1b\ris it?\r", "Where\nis it?"),
        (PASTE.format("two\nlines") + "\r", "two\nlines"),
        ("nonsense\x03Where?\r", "Where?"),
        ("a\x1b\rb\x03c\r", "c"),
        # What was typed while an answer came has line feeds at its ends.
        ("Where?\n", "Where?"),
    ],
)
def test_keys(tmp_path, keys, line):
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text(keys)
        assert prompt_line(tmp_path / "history", lambda: "").prompt() == line


def test_ctrl_d_leaves_on_an_empty_line_only(tmp_path):
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("ab\x1b[D\x1b[D\x04\r\x04")
        line = prompt_line(tmp_path / "history", lambda: "")
        assert line.prompt() == "b"
        with pytest.raises(EOFError):
            line.prompt()


def test_the_history_is_a_file_of_the_user_alone(tmp_path):
    path = tmp_path / "cache" / "chat" / "history"
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("A secret?\r")
        prompt_line(path, lambda: "").prompt()
        keyboard.send_text("\x1b[A\r")
        assert prompt_line(path, lambda: "").prompt() == "A secret?"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_place_that_cannot_be_written_is_no_reason_not_to_chat(tmp_path):
    (tmp_path / "file").write_text("")
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("Where?\r")
        assert prompt_line(tmp_path / "file" / "history", lambda: "").prompt() == "Where?"


def completions(text):
    return [c.text for c in CommandCompleter().get_completions(Line(text), CompleteEvent())]


def test_commands_and_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rivers.md").write_text("")
    assert completions("/") == [command.name for command in COMMANDS]
    assert completions("/tr") == ["/trace"]
    assert completions("/add riv") == completions("/add a.md riv") == ["ers.md"]
    assert completions("/trace riv") == completions("Where") == completions("a\n/tr") == []


def test_ctrl_c_asks_once_and_interrupts_then():
    asked = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ctrl_c(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [1]
        os.kill(os.getpid(), signal.SIGINT)
    assert asked == [1] and signal.getsignal(signal.SIGINT) is before
