"""Rows of data sets, from JSON lines files and the Hub, and which of them are held out."""

from __future__ import annotations

import glob
import gzip
import json
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

Split = Literal["train", "val", "test"]
Row = Mapping[str, Any]
T = TypeVar("T")

# Millions of characters that a line or a document may have; a long book has three.
MAX_MB = 64
# JSON packs to a tenth, and to a hundredth where it repeats itself; gzip goes to 1/1032.
_MOST_PACKED = 200
_DEEPEST = 100


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
        max_mb: See `json_rows`.
    """

    def __init__(self, paths: str | list[str], max_mb: float = MAX_MB) -> None:
        self.paths = [paths] if isinstance(paths, str) else paths
        self.max_mb = max_mb

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for file in matching_files(self.paths):
            yield from json_rows(file, max_mb=self.max_mb)

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


def json_rows(file: str, *, max_mb: float = MAX_MB) -> Iterator[tuple[str, Row]]:
    """Yields each line of a JSON lines file, gzipped or not, and what to call it.

    Not through `datasets`: it settles on one type for each field, and rows of conversations differ.

    Args:
        file: The file.
        max_mb: Most millions of characters of a line. A gzipped file that unpacks to more than
            200 times its size is refused too, if it is larger than this in MB.

    Raises:
        ValueError: If a line is no JSON object, or longer or more deeply nested than may be, or the
            file is not what its name says.
    """
    check_regular(Path(file))
    longest = int(max_mb * 1e6)
    is_packed = file.endswith(".gz")
    opened: Any = gzip.open if is_packed else open
    largest = max(longest, _MOST_PACKED * Path(file).stat().st_size)
    with opened(file, "rt", encoding="utf-8") as lines:
        try:
            for number in count(1):
                # Not `for line in lines`, which puts a line together however long it is.
                line = lines.readline(longest + 1)
                if not line:
                    break
                where = f"row {number} of {file!r}"
                if len(line) > longest:
                    raise ValueError(
                        f"{where} is longer than {max_mb:g} million characters; if that is meant, "
                        "raise max_mb"
                    )
                if is_packed and lines.buffer.tell() > largest:
                    raise ValueError(
                        f"{file!r} unpacks to more than {_MOST_PACKED} times its size (row "
                        f"{number}); if that is meant, raise max_mb ({max_mb:g}) to all of it in MB"
                    )
                if line.strip():
                    yield where, parse_row(line, where)
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise ValueError(f"{file!r} cannot be read as JSON lines: {error}") from error


def parse_row(line: str, where: str) -> Row:
    """Reads a JSON object.

    Args:
        line: Its text.
        where: What to call it in messages.

    Raises:
        ValueError: If it is none, or nested more deeply than may be.
    """
    try:
        row = json.loads(line)
        # Whoever walks down such values would fail later on, far from here.
        if line.count("[") + line.count("{") > _DEEPEST and _depth(row) > _DEEPEST:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where} is nested more than {_DEEPEST} deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object: {line.strip()[:40]!r}")
    return row


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def check_regular(file: Path) -> None:
    """Raises where a file is none that can be read from its start to its end.

    Raises:
        OSError: If it is not there.
        ValueError: If it is a folder, a FIFO, a socket or a device. Opening a FIFO would wait for
            whoever writes into it.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{str(file)!r} is a {kind_of(mode)}, not a file that can be read")


def kind_of(mode: int) -> str:
    """What a path is that is no regular file: `FIFO`, `device` and so on.

    Args:
        mode: Its `st_mode`.
    """
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


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
