"""The chat at a real pseudo-terminal."""

import json
import re
import time

import pytest

from tests.inference.chat.pseudo_terminal import Terminal

# It stands behind the prompt until something is typed.
READY = "Ask a question, or /help"
CTRL_C, CTRL_D, ENTER, ALT_ENTER = "\x03", "\x04", "\r", "\x1b\r"


@pytest.fixture
def rivers(tmp_path):
    path = tmp_path / "rivers.md"
    path.write_text("# Rivers\n\nThe Seine flows through Paris to the sea, and past Rouen.\n")
    return path


@pytest.mark.slow
def test_a_chat_from_the_first_question_to_the_last(seine, rivers, tmp_path):
    arguments = ["chat", "--model", str(seine), "--docs", str(rivers), "--max_new_tokens", "40"]
    saved = tmp_path / "chat.json"
    with Terminal(arguments, tmp_path / "cache") as terminal:
        greeting = terminal.until(READY, "Ctrl-D leaves", "1 document")
        assert f"{seine}, 4 tokens a row, on cpu" in greeting.replace("\n", "")
        terminal.type("Where does" + ALT_ENTER + "the Seine flow?" + ENTER)
        shown = terminal.until("The Seine flows through Paris [1].", "tokens/s", READY)
        # Rendered Markdown: the marks are gone. Its source and its figures stand under it.
        assert "**" not in shown
        assert re.search(r"\[1\] Rivers", shown)
        assert re.search(r"1 document, \d+ rows as vectors · \d+ positions instead of \d+", shown)

        terminal.type("/trace" + ENTER)
        shown = terminal.until("as vectors", "encoded now", "first token", READY)
        assert re.search(r"prompt +\d+ positions instead of \d+", shown)
        terminal.type("/trace 1" + ENTER)
        terminal.until("compressed: encoded now", "through Paris", READY)
        terminal.type("/full" + ENTER)
        shown = terminal.until("as it was answered", "with full text", "1 document as text", READY)
        assert shown.count("Paris [1].") == 2
        terminal.type("/docs" + ENTER)
        terminal.until("given to every question", "rivers.md", READY)
        terminal.type("/ful" + ENTER)
        terminal.until("error: there is no command /ful, did you mean /full?", READY)
        terminal.type("/trace 7" + ENTER)
        terminal.until("error: the last answer read no document '7'", READY)
        terminal.type("/add nowhere.md" + ENTER)
        terminal.until("error: ", "nowhere.md", READY)
        terminal.type(f"/save {saved}" + ENTER)
        terminal.until("wrote", READY)
        terminal.type("/clear" + ENTER)
        terminal.until("forgot the conversation", READY)
        terminal.type("/trace" + ENTER)
        terminal.until("error: nothing has been asked yet", READY)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
    (turn,) = json.loads(saved.read_text())["turns"]
    assert turn["question"] == "Where does\nthe Seine flow?"
    assert turn["answer"] == "The **Seine** flows through Paris [1]."
    assert turn["citations"][0]["title"] == "Rivers"
    history = tmp_path / "cache" / "chat" / "history"
    assert "+Where does\n+the Seine flow?\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_nothing_else(endless, tmp_path):
    # Far longer than the test waits, if nothing stopped it, and room for what comes after it.
    arguments = ["chat", "--model", str(endless), "--max_new_tokens", "2000"]
    with Terminal(arguments, tmp_path / "cache") as terminal:
        terminal.until(READY)
        terminal.type("Tell me." + ENTER)
        terminal.until("The Seine flows through Paris.")
        assert "stopped" not in terminal.text
        pressed = time.monotonic()
        terminal.type(CTRL_C)
        terminal.until("stopped", READY)
        assert time.monotonic() - pressed < 10
        assert terminal.process.poll() is None
        # It can be asked again, and stopped again.
        terminal.type("And more?" + ENTER)
        terminal.until("The Seine flows through Paris.")
        terminal.type(CTRL_C)
        terminal.until("stopped", READY)
        saved = tmp_path / "chat.json"
        terminal.type(f"/save {saved}" + ENTER)
        terminal.until("wrote", READY)
        # Ctrl-C at the prompt clears the line: what is left of it is no command.
        terminal.type("/nonsense" + CTRL_C + "/trace" + ENTER)
        terminal.until("first token", READY)
        terminal.type("/quit" + ENTER)
        assert terminal.ended() == 0
    turns = json.loads(saved.read_text())["turns"]
    assert [turn["stopped"] for turn in turns] == [True, True]
    assert all(turn["answer"].startswith("The Seine flows through Paris.") for turn in turns)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere'"),
        (["--model", "@", "--docs", "nowhere.md"], "nowhere.md"),
        (["--model", "@"], "sha256:"),
    ],
)
def test_what_does_not_fit_is_told_before_any_prompt(other_base, tmp_path, arguments, message):
    arguments = [str(other_base) if word == "@" else word for word in arguments]
    with Terminal(["chat", *arguments], tmp_path / "cache", columns=400) as terminal:
        assert terminal.ended() == 1
        (line,) = [line for line in terminal.text.splitlines() if line.strip()]
        assert line.startswith("error: ") and message in line
        assert READY not in terminal.output
