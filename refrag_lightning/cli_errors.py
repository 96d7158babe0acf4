"""From jsonargparse's messages to the one line that is of use."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import ArgumentParser

from refrag_lightning.cli import nearest


def explain(message: str, parser: ArgumentParser, bases: dict[str, type]) -> str:
    """Says in one line what is wrong, names the option, and offers the nearest valid one.

    Args:
        message: What jsonargparse said.
        parser: The subcommand's parser, for the options that there are.
        bases: For each option that takes a class (`model`, `data`), the base class.
    """
    if found := re.search(r"File does not exist: '(.*)'", message):
        return f"there is no file {_short(found[1])}{_nearest_file(found[1])}"
    if found := re.search(r"arguments are required: (.*)", message):
        missing = ", ".join("--" + name.split(".", 1)[-1] for name in found[1].split(", "))
        config = any(action.dest == "config" for action in parser._actions)
        advice = "; a configuration file usually does: --config FILE" if config else ""
        return f"{missing} must be given{advice}"
    keys = re.findall(r'Parser key "([^"]*)"', message)
    path = ".".join(keys)
    if found := re.search(
        r"class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)([\w.]+)", message
    ):
        class_path, option = found[1], found[2]
        known = _init_arguments(class_path, bases.values())
        return (
            f"{path}: {class_path.rpartition('.')[2]} has no option {option!r}"
            f"{nearest(option, known)}"
        )
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        names = [cls.__name__ for cls in _subclasses(bases[keys[0]])] if keys[0] in bases else []
        return f"{path}: there is no class {found[1]!r}{nearest(found[1], names)}"
    if found := re.search(r"does not accept option '([^']*)'", message):
        option = found[1]
        for ending in (".class_path", ".init_args"):
            option = option.split(ending)[0]
        return f"there is no option {option!r}{nearest(option, _options(parser))}"
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        option = found[1].split("=")[0]
        known = ["--" + name for name in _options(parser)]
        return f"there is no option {option!r}{nearest(option, known)}"
    if keys:
        return f"{path}: {_expected(message.rpartition('Parser key')[2])}"
    return " ".join(message.split())


def _expected(message: str) -> str:
    """`expected float or dict[str, float], got 'abc'` from the innermost complaint."""
    given = re.search(r"(?:Given value: |Got value: )(.*)", message)
    if types := re.search(r"Subtypes: \[(.*)\]", message):
        wanted = re.sub(r", (?![^\[]*\])", " or ", _plain(types[1]))
    elif types := re.search(r"Expected an? (.*?)(?:\. Got value|$)", message, flags=re.MULTILINE):
        wanted = _plain(types[1])
    else:
        return " ".join(message.partition(":")[2].split())
    return f"expected {wanted}" + (f", got {given[1].strip()!r}" if given else "")


def _plain(types: str) -> str:
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types)
    return types.replace("typing.Literal", "one of ").replace("NoneType", "null")


def _options(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest not in ("help", "config")]


def _init_arguments(class_path: str, bases: Iterable[type]) -> list[str]:
    """The arguments of a class and of the classes that it is built on."""
    name = class_path.rpartition(".")[2]
    for base in bases:
        for cls in _subclasses(base):
            if cls.__name__ == name:
                # Up to the base: what lies beyond are Lightning's and torch's own.
                parts = cls.__mro__[: cls.__mro__.index(base) + 1]
                inits = [vars(part)["__init__"] for part in parts if "__init__" in vars(part)]
                return sorted({arg for init in inits for arg in inspect.signature(init).parameters})
    return []


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [base, *(cls for child in children for cls in _subclasses(child))]


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    names = [_short(str(file)) for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(_short(path), names)


def _short(path: str) -> str:
    """`path` from the current folder on, if it lies there."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
