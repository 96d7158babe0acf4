"""Subcommands that are one function: its arguments are the options."""

import importlib
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from refrag_lightning.cli import UsageError
from refrag_lightning.cli_errors import explain

FUNCTIONS = {
    "generate": "refrag_lightning.inference.generate:generate",
    "chain": "refrag_lightning.launch.chain:chain",
}


def run(args: list[str]) -> None:
    """Runs a subcommand.

    Args:
        args: Its name and its options.

    Raises:
        UsageError: If they cannot be understood.
    """
    module, name = FUNCTIONS[args[0]].split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    parser = ArgumentParser(
        prog=f"python -m refrag_lightning {args[0]}", exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(function, as_group=False)
    try:
        options = parser.parse_args(args[1:])
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser, {})) from error
    function(**options.as_dict())
