"""Groups of subcommands, and how options may be written."""

import importlib

import pytest

from refrag_lightning.cli import main
from refrag_lightning.cli_functions import FUNCTIONS, GROUPS, written_out
from tests.test_cli import failure


@pytest.mark.parametrize("args", [["index"], ["index", "--help"]])
def test_a_group_lists_its_subcommands(capsys, args):
    main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m refrag_lightning index SUBCOMMAND [options]"
    for command in GROUPS["index"]:
        assert any(line.split()[:1] == [command.name] and command.summary in line for line in lines)


def test_every_target_is_a_function():
    targets = [
        *FUNCTIONS.values(),
        *(command.target for each in GROUPS.values() for command in each),
    ]
    for target in targets:
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name)), target


@pytest.mark.parametrize("command", [command.name for command in GROUPS["index"]])
def test_help_of_a_subcommand_describes_every_option(capsys, command):
    with pytest.raises(SystemExit) as raised:
        main(["index", command, "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: python -m refrag_lightning index {command}" in out and "--index INDEX" in out


def test_a_wrong_subcommand_is_told_in_one_line(capsys):
    assert failure(capsys, ["index", "biuld"], code=2) == (
        "index has no subcommand 'biuld', did you mean 'build'?; it has build, search, info, "
        "verify, evaluate"
    )
    message = failure(capsys, ["index", "build", "--index", "x"], code=2)
    assert message == "--paths must be given"
    message = failure(capsys, ["index", "build", "--indx", "x"], code=2)
    assert message == "there is no option '--indx', did you mean '--index'?"


HINTS = {
    "paths": list[str],
    "rates": list[int] | None,
    "index": str,
    "set": dict[str, int] | None,
    "merge_lora": bool,
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--paths a b --index x", ['--paths=["a", "b"]', "--index", "x"]),
        ("--index x --paths a", ["--index", "x", '--paths=["a"]']),
        ("--paths ['a','b'] --rates 8", ["--paths=['a','b']", "--rates=[8]"]),
        ("--rates 8 16", ["--rates=[8, 16]"]),
        ("--paths=a b --rates=8", ['--paths=["a", "b"]', "--rates=[8]"]),
        ("--paths --rates 8", ["--paths", "--rates=[8]"]),
        ("--paths+ a --set.x 1", ["--paths+", "a", "--set.x", "1"]),
        ('--paths a"b', ['--paths=["a\\"b"]']),
        ("--merge-lora --index x", ["--merge_lora=true", "--index", "x"]),
        ("--merge_lora False --index x", ["--merge_lora=false", "--index", "x"]),
        ("--merge-lora=false", ["--merge_lora=false"]),
        ("--no-such x", ["--no-such", "x"]),
        ("", []),
    ],
)
def test_options_are_written_as_the_parser_takes_them(words, expected):
    assert written_out(words.split(), HINTS) == expected
