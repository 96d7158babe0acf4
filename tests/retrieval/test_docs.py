"""The commands of docs/retrieval.md can be understood."""

import re
import shlex
from pathlib import Path

import pytest

from refrag_lightning.cli_functions import parse

PAGE = (Path(__file__).parent.parent.parent / "docs" / "retrieval.md").read_text()
COMMANDS = re.findall(r"^ *python -m refrag_lightning (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    function, options = parse(shlex.split(command))
    assert callable(function) and options


def test_every_option_that_is_named_is_one():
    import inspect

    from refrag_lightning.inference.chat.command import chat
    from refrag_lightning.retrieval import commands, commands_search

    known = {
        name
        for module in (commands, commands_search)
        for _, function in inspect.getmembers(module, inspect.isfunction)
        for name in inspect.signature(function).parameters
    } | set(inspect.signature(chat).parameters)
    assert len(COMMANDS) > 5
    named = {name.replace("-", "_") for name in re.findall(r"--(\w[\w-]*)", PAGE)}
    assert named <= known
