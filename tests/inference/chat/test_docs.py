"""The page on the chat says what there is."""

import re
import shlex
from typing import get_type_hints

from jsonargparse import ArgumentParser

from refrag_lightning.cli_functions import written_out
from refrag_lightning.inference.chat.command import chat
from refrag_lightning.inference.chat.commands import COMMANDS
from tests.inference.chat.pseudo_terminal import ROOT

TEXT = (ROOT / "docs" / "chat.md").read_text()


def test_every_command_of_the_page_parses():
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(chat, as_group=False)
    commands = re.findall(r"python -m refrag_lightning chat (.*)", TEXT)
    commands = [command.rstrip("`") for command in commands if "--model" in command]
    assert len(commands) >= 5
    for command in commands:
        parser.parse_args(written_out(shlex.split(command), get_type_hints(chat)))


def test_every_option_and_command_of_the_page_is_there():
    known = {action for action in get_type_hints(chat) if action != "return"}
    assert {*re.findall(r"--(\w+)", TEXT)} - known == {"help"}
    named = re.findall(r"`(/[a-z]+)", TEXT.split("| key |")[0])
    assert list(dict.fromkeys(named)) == [command.name for command in COMMANDS]
