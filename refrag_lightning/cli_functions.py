"""Subcommands that are one function, or a group of them: its arguments are the options."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from refrag_lightning.cli import Command, UsageError, nearest
from refrag_lightning.cli_errors import explain
from refrag_lightning.plain_text import say

FUNCTIONS = {
    "generate": "refrag_lightning.inference.generate:generate",
    "chain": "refrag_lightning.launch.chain:chain",
    "chat": "refrag_lightning.inference.chat.command:chat",
    "fetch": "refrag_lightning.hub:fetch",
    "export": "refrag_lightning.inference.export:export",
}
_INDEX = "refrag_lightning.retrieval.commands"
_SEARCH = "refrag_lightning.retrieval.commands_search"
GROUPS = {
    "index": (
        Command(
            "build", "Put documents and their row states into an index.", f"{_INDEX}:index_build"
        ),
        Command("search", "Find the passages for a question.", f"{_INDEX}:index_search"),
        Command("info", "Say what an index holds.", f"{_INDEX}:index_info"),
        Command(
            "verify", "Compare an index with what a model gives now.", f"{_INDEX}:index_verify"
        ),
        Command(
            "evaluate",
            "Measure how often search finds the gold passage.",
            f"{_SEARCH}:index_evaluate",
        ),
    ),
}


def run(args: list[str]) -> None:
    """Runs a subcommand.

    Args:
        args: Its name, or those of a group and of one of its subcommands, and the options.

    Raises:
        UsageError: If they cannot be understood.
    """
    if args[0] in GROUPS and (len(args) == 1 or args[1] in ("-h", "--help", "help")):
        say(overview(args[0]))
        return
    function, options = parse(args)
    function(**options)


def parse(args: list[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a subcommand, and the arguments that its options are.

    Args:
        args: As in `run`.

    Raises:
        UsageError: If they cannot be understood.
    """
    name, *words = args
    if name in GROUPS:
        targets = {command.name: command.target for command in GROUPS[name]}
        given = words.pop(0) if words else ""
        if given not in targets:
            raise UsageError(
                f"{name} has no subcommand {given!r}{nearest(given, list(targets))}; it has "
                f"{', '.join(targets)}"
            )
        name, target = f"{name} {given}", targets[given]
    else:
        target = FUNCTIONS[name]
    module, attribute = target.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    parser = ArgumentParser(
        prog=f"python -m refrag_lightning {name}", exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(function, as_group=False)
    try:
        options = parser.parse_args(written_out(words, get_type_hints(function)))
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser, {})) from error
    return function, options.as_dict()


def overview(group: str) -> str:
    """The text of a group's `--help`: each of its subcommands with one line."""
    width = max(len(command.name) for command in GROUPS[group])
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in GROUPS[group]]
    usage = f"usage: python -m refrag_lightning {group} SUBCOMMAND [options]"
    return "\n".join([usage, "", *lines, "", "`SUBCOMMAND --help` lists its options."])


def written_out(words: list[str], hints: Mapping[str, Any]) -> list[str]:
    """Writes options as the parser takes them.

    `--paths a b` becomes `--paths=["a", "b"]` where an option takes a list, `--full` becomes
    `--full=true` where it is a switch, and `--merge-lora` means `--merge_lora`.

    Args:
        words: The options.
        hints: The type of each argument, by its name.
    """
    written: list[str] = []
    place = 0
    while place < len(words):
        option, equals, value = words[place].partition("=")
        place += 1
        if option[:2] != "--":
            written.append(words[place - 1])
            continue
        name = option[2:].replace("-", "_")
        if name in hints:
            option = f"--{name}"
        item = _item_type(hints.get(name))
        values = [value] if equals else []
        while item is not None and place < len(words) and not words[place].startswith("--"):
            values.append(words[place])
            place += 1
        if hints.get(name) is bool and not equals:
            given = place < len(words) and words[place].lower() in ("true", "false")
            written.append(f"{option}={words[place].lower() if given else 'true'}")
            place += given
        elif item is None or not values:
            written.append(f"{option}{equals}{value}")
        elif len(values) == 1 and values[0].startswith("["):
            written.append(f"{option}={values[0]}")
        elif item is str:
            written.append(f"{option}={json.dumps(values)}")
        else:
            written.append(f"{option}=[{', '.join(values)}]")
    return written


def _item_type(hint: Any) -> Any:
    """The type of a list's items, also where the list may be None; None for anything else."""
    for choice in (hint, *get_args(hint)):
        if get_origin(choice) is list:
            return get_args(choice)[0]
    return None
