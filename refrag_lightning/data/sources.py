"""Text sources: where training text comes from, one class a kind, named by class path in YAML.

A source gives its texts in the same order every time, and a key that changes when they do. Some
texts can be held out of training: text n goes to validation or test by its position alone, so a
streaming source splits in the same way as one on disk.
"""

import glob
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]


class TextSource:
    """Base of the sources.

    Args:
        held_out: Share of the texts for validation, and the same again for test: every
            1 / held_out-th text. 0 gives everything to training.
        limit: Most texts that are read; None reads all.
    """

    def __init__(self, held_out: float = 0.0, limit: int | None = None) -> None:
        if not 0 <= held_out <= 1 / 3:
            raise ValueError(f"held_out ({held_out}) must be 0 to 1/3")
        self.held_out = held_out
        self.limit = limit

    def read(self) -> Iterator[str]:
        """Yields every text, in an order that never changes."""
        raise NotImplementedError

    def key(self) -> dict[str, Any]:
        """Plain data that changes whenever the texts may have changed; a cache is named by it."""
        raise NotImplementedError

    def texts(self, split: Split) -> Iterator[str]:
        """Yields the texts of one split."""
        period = round(1 / self.held_out) if self.held_out else 0
        for number, text in enumerate(islice(self.read(), self.limit)):
            place = number % period if period else 0
            # The last two of each period are held out, so the first text is always for training.
            held = {period - 1: "val", period - 2: "test"}.get(place, "train")
            if held == split or (not period and split == "train"):
                yield text


class PydocSource(TextSource):
    """The Python language reference that every CPython carries: about 370 kB of English.

    The topics overlap, so a paragraph that stood in an earlier topic is left out; the rest is cut
    between paragraphs into sections, so that held-out text is text that training never saw.

    Args:
        section: Characters after which a section ends with its paragraph.
        held_out: Share of the sections for validation, and the same again for test.
        limit: Most sections that are read.
    """

    def __init__(
        self, section: int = 2000, held_out: float = 0.1, limit: int | None = None
    ) -> None:
        super().__init__(held_out, limit)
        self.section = section

    def read(self) -> Iterator[str]:
        """Yields the sections."""
        from pydoc_data.topics import topics

        seen: set[str] = set()
        for _, topic in sorted(topics.items()):
            section: list[str] = []
            for paragraph in topic.split("\n\n"):
                bare = " ".join(paragraph.split())
                if not bare or bare in seen:
                    continue
                seen.add(bare)
                section.append(paragraph.strip("\n"))
                if sum(map(len, section)) >= self.section:
                    yield "\n\n".join(section)
                    section = []
            if section:
                yield "\n\n".join(section)

    def key(self) -> dict[str, Any]:
        """The Python version, which the text comes with, and the settings."""
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "pydoc": version,
            "section": self.section,
            "held_out": self.held_out,
            "limit": self.limit,
        }


class JsonLinesSource(TextSource):
    """JSON lines files, gzipped or not.

    Args:
        paths: Files or patterns such as `data/*.jsonl.gz`, or one of them.
        field: The field that holds the text.
        held_out: Share of the texts for validation, and the same again for test.
        limit: Most texts that are read.

    Raises:
        FileNotFoundError: If a path or pattern matches no file.
    """

    def __init__(
        self,
        paths: str | list[str],
        field: str = "text",
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        super().__init__(held_out, limit)
        self.paths = [paths] if isinstance(paths, str) else paths
        self.field = field

    def files(self) -> list[str]:
        """The files that the paths match, each pattern's in the order of their names."""
        files: list[str] = []
        for path in self.paths:
            matched = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
            if not matched:
                raise FileNotFoundError(f"no file matches {path!r}")
            files += matched
        return files

    def read(self) -> Iterator[str]:
        """Yields the field of each line, file after file."""
        from datasets import load_dataset

        for file in self.files():
            try:
                rows = load_dataset("json", data_files=file, split="train", streaming=True)
                yield from _field(rows, self.field, file)
            except (ValueError, OSError) as error:
                if file in str(error):
                    raise
                raise ValueError(f"{file!r} cannot be read as JSON lines: {error}") from error

    def key(self) -> dict[str, Any]:
        """The files' names, sizes and times of change, and the settings."""
        stats = {file: Path(file).stat() for file in self.files()}
        return {
            "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()],
            "field": self.field,
            "held_out": self.held_out,
            "limit": self.limit,
        }


class HubSource(TextSource):
    """A data set of the Hugging Face Hub.

    Args:
        name: The data set's name.
        config: Its configuration, where it has several.
        split: The split that is read, whatever it is used for here.
        field: The column that holds the text.
        revision: A commit or tag; the newest one if None.
        streaming: Read over the network as needed, instead of downloading everything first.
        held_out: Share of the texts for validation, and the same again for test.
        limit: Most texts that are read.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        streaming: bool = True,
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        super().__init__(held_out, limit)
        self.name = name
        self.config = config
        self.split = split
        self.field = field
        self.revision = revision
        self.streaming = streaming

    def read(self) -> Iterator[str]:
        """Yields the column of each row.

        Raises:
            OSError: If the data set cannot be had, for example without a network.
        """
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
        yield from _field(rows, self.field, self.name)

    def key(self) -> dict[str, Any]:
        """The settings; without a revision the data set counts as unchanging."""
        return {
            "hub": [self.name, self.config, self.split, self.revision],
            "field": self.field,
            "held_out": self.held_out,
            "limit": self.limit,
        }


def _field(rows: Any, field: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise ValueError(f"row {number} of {where!r} has no field {field!r}, only {[*row]}")
        if not isinstance(row[field], str):
            raise ValueError(f"{field!r} in row {number} of {where!r} is no text: {row[field]!r}")
        yield row[field]
