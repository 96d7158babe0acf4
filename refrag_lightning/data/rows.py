"""Rows of data sets, from JSON lines files and the Hub, and which of them are held out."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

Split = Literal["train", "val", "test"]
Row = Mapping[str, Any]
T = TypeVar("T")


class HeldOut:
    """Base of the sources: a part of their items is held out of training.

    Args:
        held_out: Share for validation, and the same again for test: every 1 / held_out-th item,
            by position alone. 0 gives everything to training.
        limit: Most items that are read; None reads all.

    Raises:
        ValueError: If `held_out` is not 0 to 1/3.
    """

    def __init__(self, held_out: float = 0.0, limit: int | None = None) -> None:
        if not 0 <= held_out <= 1 / 3:
            raise ValueError(f"held_out ({held_out}) must be 0 to 1/3")
        self.held_out = held_out
        self.limit = limit

    def key(self) -> dict[str, Any]:
        """Plain data that changes whenever the items may have changed; a cache is named by it."""
        raise NotImplementedError

    def _split(
        self, items: Iterable[T], split: Split, group: Callable[[T], Any] | None = None
    ) -> Iterator[T]:
        """Yields the items of one split.

        Args:
            items: All items.
            split: Which split.
            group: Items with the same value of it (hashable, not None) go together, as one that
                stands where the first of them does.
        """
        return (item for item, own in self._assigned(items, group) if own == split)

    def _assigned(
        self, items: Iterable[T], group: Callable[[T], Any] | None = None
    ) -> Iterator[tuple[T, Split]]:
        """Yields each item with its split; the arguments are those of `_split`."""
        period = round(1 / self.held_out) if self.held_out else 0
        # The last two of each period are held out, so the first item is always for training.
        held: dict[int, Split] = {period - 1: "val", period - 2: "test"} if period else {}
        number = 0
        places: dict[Any, int] = {}
        for item in islice(items, self.limit):
            value = group(item) if period and group is not None else None
            place = number if value is None else places.setdefault(value, number)
            number += place == number
            yield item, held.get(place % period, "train") if period else "train"


class RowSource(HeldOut):
    """Base of the sources whose items are rows of files or of the Hub.

    Args:
        rows: The rows.
        fields: What is read of each.
        held_out: As in `HeldOut`.
        limit: As in `HeldOut`.
    """

    def __init__(
        self, rows: JsonRows | HubRows, fields: Any, held_out: float, limit: int | None
    ) -> None:
        super().__init__(held_out, limit)
        self.rows = rows
        self.fields = fields

    def item(self, row: Row, where: str) -> Any:
        """What becomes of a row.

        Args:
            row: The row.
            where: What to call it in messages.
        """
        raise NotImplementedError

    def read(self) -> Iterator[Any]:
        """Yields the item of each row.

        Raises:
            OSError: If the rows cannot be had, for example without a network.
        """
        for where, row in self.rows:
            yield self.item(row, where)

    def key(self) -> dict[str, Any]:
        """The rows' key and the settings."""
        settings = {"fields": self.fields, "held_out": self.held_out, "limit": self.limit}
        return {**self.rows.key(), **settings}


class JsonRows:
    """The rows of JSON lines files, file after file.

    Args:
        paths: Files or patterns, or one of them.
    """

    def __init__(self, paths: str | list[str]) -> None:
        self.paths = [paths] if isinstance(paths, str) else paths

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for file in matching_files(self.paths):
            yield from json_rows(file)

    def key(self) -> dict[str, Any]:
        """The files' names, sizes and times of change."""
        files = [(file, Path(file).stat()) for file in matching_files(self.paths)]
        return {"files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in files]}


@dataclass(frozen=True)
class HubRows:
    """The rows of a data set of the Hugging Face Hub.

    Attributes:
        name: The data set's name.
        config: Its configuration, where it has several.
        split: The split that is read.
        revision: A commit or tag; the newest one if None.
        streaming: Read over the network as needed.
    """

    name: str
    config: str | None
    split: str
    revision: str | None
    streaming: bool

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        from datasets import load_dataset

        try:
            rows = load_dataset(
                self.name,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise OSError(f"the data set {self.name!r} cannot be had: {reason}") from error
        for number, row in enumerate(rows, start=1):
            yield f"row {number} of {self.name!r}", row

    def key(self) -> dict[str, Any]:
        """The data set; without a revision it counts as unchanging."""
        return {"hub": [self.name, self.config, self.split, self.revision]}


def matching_files(paths: str | list[str]) -> list[str]:
    """The files that paths or patterns match, each pattern's in the order of their names.

    Raises:
        FileNotFoundError: If a path or pattern matches no file.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matched = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
        if not matched:
            raise FileNotFoundError(f"no file matches {path!r}")
        files += matched
    return files


def json_rows(file: str) -> Iterator[tuple[str, Row]]:
    """Yields each line of a JSON lines file, gzipped or not, and what to call it.

    Not through `datasets`: it settles on one type for each field, and rows of conversations differ.

    Raises:
        ValueError: If a line is no JSON object, or the file is not what its name says.
    """
    opened: Any = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                where = f"row {number} of {file!r}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is no JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is no JSON object: {line.strip()[:40]!r}")
                yield where, row
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise ValueError(f"{file!r} cannot be read as JSON lines: {error}") from error


def field_of(row: Row, path: str, where: str) -> Any:
    """Reads a field of a row; a dot steps into a nested one.

    Raises:
        ValueError: If there is no such field.
    """
    value: Any = row
    for name in [path] if path in row else path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            has = [*value] if isinstance(value, Mapping) else value
            raise ValueError(f"{where} has no field {path!r}, only {has!r}")
        value = value[name]
    return value


def text_of(value: Any, name: str, where: str) -> str:
    """Returns a text, refusing anything else.

    Raises:
        ValueError: If `value` is no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name!r} in {where} is no text: {value!r}")
    return value
