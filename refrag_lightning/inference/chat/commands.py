"""What can be typed at the prompt beside a question: `/help` and its like."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its name, what may stand behind it, and one line on what it does."""

    name: str
    argument: str
    summary: str


COMMANDS = (
    Command("/help", "", "what can be typed here"),
    Command("/docs", "[ID]", "the documents at hand and those of the last answer, or one's text"),
    Command("/add", "FILE…", "give documents to every question from now on"),
    Command("/trace", "[ID]", "what became of each document of the last answer, or of one's rows"),
    Command("/full", "", "the last question with full text, beside the answer from vectors"),
    Command("/clear", "[all]", "forget the conversation; with `all` the documents too"),
    Command("/save", "FILE", "write the conversation: .md to read, .json with every row's trace"),
    Command("/quit", "", "leave; so does Ctrl-D"),
)

# `/usr/bin/env is what?` is a question.
_COMMAND = re.compile(r"/([A-Za-z]*)(?:\s+(.*))?\Z", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A command as it was typed.

    Attributes:
        name: One of the names in `COMMANDS`.
        arguments: The words behind it; quotes keep white space inside a word.
    """

    name: str
    arguments: tuple[str, ...] = ()


def read(line: str) -> Call | None:
    """Reads a typed line.

    Returns:
        The command, or None if the line is a question.

    Raises:
        ValueError: It begins as a command does, and is none, or has too many or too few words.
    """
    found = _COMMAND.match(line.strip())
    if found is None:
        return None
    name = "/" + found[1].lower()
    names = [command.name for command in COMMANDS]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f", did you mean {close[0]}?" if close else "; /help lists them"
        raise ValueError(f"there is no command {name}{hint}")
    try:
        words = tuple(shlex.split(found[2] or ""))
    except ValueError:
        raise ValueError(f"{name}: a quotation mark is never closed") from None
    argument = next(command.argument for command in COMMANDS if command.name == name)
    required = bool(argument) and not argument.startswith("[")
    if required and not words:
        raise ValueError(f"{name} needs a file: {name} {argument}")
    if len(words) > (0 if not argument else 1) and not argument.endswith("…"):
        raise ValueError(f"{name} takes {argument or 'nothing'} behind it, got {' '.join(words)!r}")
    return Call(name, words)
