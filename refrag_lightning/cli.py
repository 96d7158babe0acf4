"""The command line: the one table of subcommands, and how failures are told.

`python -m refrag_lightning` imports nothing heavy until it knows what to run. A row of `COMMANDS`
names the function that does the work; it takes the arguments after the subcommand.

A failure is one line on standard error. Exit codes: 1 for a run that failed, 2 for a command that
cannot be understood, 130 for Ctrl-C, 143 for SIGTERM. `--debug`, anywhere, shows the traceback.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from refrag_lightning.plain_text import plain_messages, say


class Command(NamedTuple):
    """A subcommand: its name, one line for `--help`, and `module:function` to call."""

    name: str
    summary: str
    target: str


_LIGHTNING = "refrag_lightning.cli_lightning:run"
_HELLO = "refrag_lightning.cli_lightning:hello"
_FUNCTIONS = "refrag_lightning.cli_functions:run"

COMMANDS = (
    Command("fit", "Train a model and write it to a run folder.", _LIGHTNING),
    Command("validate", "Measure a model on the validation data.", _LIGHTNING),
    Command("test", "Measure a model on the test data.", _LIGHTNING),
    Command("predict", "Run a model on the prediction data.", _LIGHTNING),
    Command("hello", "Show which processes run where, and check that they meet.", _HELLO),
    Command("chain", "Run a recipe of several runs, or go on with it.", _FUNCTIONS),
    Command("chat", "Ask a model about documents, in the terminal or in a pipe.", _FUNCTIONS),
    Command("generate", "Answer one prompt with <doc> blocks from a model folder.", _FUNCTIONS),
    Command("index", "Build, search and check an index of passages.", _FUNCTIONS),
    Command("fetch", "Get the default models, without the Hugging Face Hub too.", _FUNCTIONS),
    Command("export", "Write a trained model for others to use.", _FUNCTIONS),
)


class UsageError(Exception):
    """The command line or a configuration file cannot be understood."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        args: The arguments; None takes those of the process.

    Raises:
        SystemExit: With the code in the module's docstring, unless everything went well.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with plain_messages():
            _dispatch(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            # Not left to Python: a message may hold a document's text or a file's name.
            say(traceback.format_exc(), file=sys.stderr, end="")
        if isinstance(error, KeyboardInterrupt):
            _fail("interrupted", code=130)
        if isinstance(error, UsageError):
            _fail(str(error), code=2)
        _fail(one_line(error), code=1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(overview())
        return
    names = [command.name for command in COMMANDS]
    if arguments[0].startswith("-"):
        # Every option belongs to a subcommand, so `--config x.yaml fit` can only mean one thing.
        first = next((place for place, value in enumerate(arguments) if value in names), None)
        if first is None:
            raise UsageError(
                f"expected a subcommand before {arguments[0]!r}: one of {', '.join(names)}"
            )
        arguments.insert(0, arguments.pop(first))
    name = arguments[0]
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        raise UsageError(
            f"there is no subcommand {name!r}{nearest(name, names)}; --help lists them"
        )
    module, function = command.target.split(":")
    run = getattr(importlib.import_module(module), function)
    run(arguments)


def overview() -> str:
    """The text of `--help`: each subcommand with one line."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: python -m refrag_lightning SUBCOMMAND [options] [--debug]",
            "",
            "Retrieval-augmented generation with documents as vectors, one for a row of tokens.",
            "",
            *lines,
            "",
            "`SUBCOMMAND --help` lists its options, `--debug` shows the traceback of a failure.",
        ]
    )


def nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the known word that is nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """What `error` says, on one line.

    ValueError and OSError carry messages meant for the user; of anything else the type is told
    too, and how to see where it came from.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "Original Traceback" in str(error):
        # A DataLoader puts a worker's traceback into the message; what was raised ends it.
        message = lines[-1].partition(": ")[2] or lines[-1]
    else:
        message = " ".join(lines)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.strerror}: {error.filename}"
    if isinstance(error, ValueError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message} (run again with --debug for the traceback)"


def _fail(message: str, *, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
