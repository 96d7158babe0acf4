"""The chat subcommand in a pipe, and what it refuses."""

import io
import os
import subprocess
import sys

import pytest

from refrag_lightning.cli import main
from tests.inference.chat.conftest import ENDLESS, SAYS
from tests.inference.chat.pseudo_terminal import ROOT


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs `chat` with a text on standard input; returns what it prints."""

    def run(text, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        main(["chat", "--max_new_tokens", "40", *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs `chat` and returns its exit code and the one line on standard error."""

    def run(text, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, arguments)])
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert lines[-1].startswith("error: ") and "Traceback" not in captured.err
        return ended.value.code, lines[-1]

    return run


def test_a_pipe_gets_the_answer_alone(ask, seine, tmp_path):
    file = tmp_path / "rivers.txt"
    file.write_text("The Seine flows through Paris.")
    assert ask("Where does\nthe Seine flow?\n", "--model", seine, "--docs", file) == SAYS + "\n"


def test_a_question_on_the_command_line(ask, seine):
    # Standard input is not read.
    assert ask("", "--model", seine, "--question", "Where?") == SAYS + "\n"


def test_a_causal_language_model_alone(ask, plain, tmp_path):
    file = tmp_path / "rivers.txt"
    file.write_text("The Seine flows through Paris.")
    assert ask("Where?", "--model", plain, "--docs", file) == SAYS + "\n"


def test_the_options_reach_the_model(ask, endless):
    said = ask("Tell me.", "--model", endless, "--max_new_tokens", "3")
    assert said.startswith("The S") and len(said) < len(ENDLESS)


@pytest.mark.slow
def test_a_pipe_streams_and_takes_it_well_that_nobody_reads_on(endless, tmp_path):
    command = [sys.executable, "-m", "refrag_lightning", "chat", "--model", str(endless)]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    process.stdin.write("Tell me.\n")
    process.stdin.close()
    assert process.stdout.read(len(ENDLESS)) == ENDLESS
    assert process.poll() is None  # it is still writing
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_on_standard_input_is_no_question(fail, seine, text):
    code, error = fail(text, "--model", seine)
    assert (code, error) == (1, "error: the question is empty")


def test_a_missing_folder_is_one_line(fail, tmp_path):
    code, error = fail("Where?", "--model", tmp_path / "nowhere")
    assert code == 1 and str(tmp_path / "nowhere") in error


def test_a_missing_document_is_told_before_the_model_is_loaded(fail, tmp_path):
    code, error = fail("Where?", "--model", "nowhere", "--docs", tmp_path / "nowhere.md")
    assert code == 1 and "nowhere.md" in error


def test_another_base_is_refused_in_one_line(fail, ask, other_base):
    code, error = fail("Where?", "--model", other_base)
    assert code == 1 and "sha256:" in error and str(other_base / "base") in error
    with pytest.warns(UserWarning, match="sha256:"):
        said = ask("Where?", "--model", other_base, "--allow_base_mismatch", "true")
    assert said == SAYS + "\n"


def test_answers_that_nobody_sees_are_not_typed_for(seine, monkeypatch, capsys):
    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Keyboard())
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", str(seine)])
    assert ended.value.code == 1
    assert "give it as --question, or on standard input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x", "--expand", "some"], "expand: expected one of"),
        (["--model", "x", "--top_k", "few"], "top_k: expected int, got 'few'"),
        ([], "--model must be given"),
    ],
)
def test_a_wrong_option_is_one_line(fail, arguments, message):
    code, error = fail("Where?", *arguments)
    assert code == 2 and message in error
