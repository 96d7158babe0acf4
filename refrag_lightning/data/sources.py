"""Text sources: where training text comes from, one class a kind, named by class path in YAML.

A source gives its texts in the same order every time, and a key that changes when they do. Some
texts can be held out of training: text n goes to validation or test by its position alone, so a
streaming source splits in the same way as one on disk.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from refrag_lightning.data.questions import Passage
from refrag_lightning.data.rows import (
    MAX_MB,
    HeldOut,
    HubRows,
    JsonRows,
    Row,
    RowSource,
    Split,
    field_of,
    text_of,
)
from refrag_lightning.text.sentences import sentence_ends

__all__ = [
    "BLANK_LINES",
    "HubSource",
    "JsonLinesSource",
    "PydocSource",
    "Split",
    "TextSource",
    "check_cutting",
    "passages_of",
]

BLANK_LINES = re.compile(r"\n\s*\n")
"""What parts paragraphs."""


class TextSource(HeldOut):
    """Base of the sources of text.

    Args:
        held_out: Share of the texts for validation, and the same again for test: every
            1 / held_out-th text. 0 gives everything to training.
        limit: Most texts that are read; None reads all.
    """

    def read(self) -> Iterator[str]:
        """Yields every text, in an order that never changes."""
        raise NotImplementedError

    def texts(self, split: Split) -> Iterator[str]:
        """Yields the texts of one split."""
        return self._split(self.read(), split)

    def passages(self) -> Iterator[Passage]:
        """Yields every text with its id and title, where the source has them."""
        for number, text in enumerate(self.read(), start=1):
            yield Passage(text, id=f"text {number}")


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


class _TextRows(RowSource, TextSource):
    def item(self, row: Row, where: str) -> str:
        """The text of a row."""
        return text_of(field_of(row, self.fields, where), self.fields, where)

    def passages(self) -> Iterator[Passage]:
        """Yields the text of each row with the row's `id` and `title`, where it has them."""
        for where, row in self.rows:
            title = str(row.get("title") or "")
            yield Passage(self.item(row, where), str(row.get("id") or where), title)


class JsonLinesSource(_TextRows):
    """JSON lines files, gzipped or not.

    Args:
        paths: Files or patterns such as `data/*.jsonl.gz`, or one of them.
        field: The field that holds the text.
        held_out: Share of the texts for validation, and the same again for test.
        limit: Most texts that are read.
        max_mb: Most millions of characters of a line; see `rows.json_rows`.

    Raises:
        FileNotFoundError: If a path or pattern matches no file.
    """

    def __init__(
        self,
        paths: str | list[str],
        field: str = "text",
        held_out: float = 0.0,
        limit: int | None = None,
        max_mb: float = MAX_MB,
    ) -> None:
        super().__init__(JsonRows(paths, max_mb), field, held_out, limit)


class HubSource(_TextRows):
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
        rows = HubRows(name, config, split, revision, streaming)
        super().__init__(rows, field, held_out, limit)


def check_cutting(texts: TextSource, max_words: int | None) -> None:
    """Checks the settings of a source that is made from passages of texts.

    Raises:
        ValueError: If there are no words in a passage, or the texts are held out in two ways.
    """
    if max_words is not None and max_words < 1:
        raise ValueError(f"max_words ({max_words}) must be at least 1")
    if texts.held_out:
        raise ValueError(
            f"held_out of the texts ({texts.held_out}) must be 0: passages are held out, by the "
            "held_out of the source that is made from them"
        )


def passages_of(texts: TextSource, max_words: int | None) -> Iterator[Passage]:
    """Yields the passages of a source's texts, empty ones left out.

    Args:
        texts: The texts.
        max_words: Most words of a passage. Longer texts are cut between paragraphs (parted by
            blank lines), a longer paragraph between sentences, a longer sentence between words;
            each passage takes as much as fits. None takes each text whole.
    """
    for number, whole in enumerate(texts.passages()):
        if texts.limit is not None and number >= texts.limit:
            return
        text = whole.text.strip()
        if max_words is None or len(text.split()) <= max_words:
            if text:
                yield Passage(text, whole.id, whole.title)
            continue
        for piece, joined in enumerate(_joined(_units(text, max_words), max_words), start=1):
            yield Passage(joined, f"{whole.id}-{piece}", whole.title)


def _units(text: str, max_words: int) -> Iterator[tuple[str, str]]:
    """What is not cut: paragraphs, sentences or words, with what parts each from the one before."""
    for paragraph in BLANK_LINES.split(text):
        between = "\n\n"
        if len(paragraph.split()) <= max_words:
            yield paragraph.strip(), between
            continue
        start = 0
        for end in sentence_ends(paragraph).tolist():
            sentence = paragraph[start:end]
            start = end
            words = sentence.split()
            if len(words) <= max_words:
                yield sentence.strip(), between
                between = " "
                continue
            for first in range(0, len(words), max_words):
                yield " ".join(words[first : first + max_words]), between
                between = " "


def _joined(units: Iterable[tuple[str, str]], max_words: int) -> Iterator[str]:
    """Units side by side, as many as have at most `max_words` words."""
    parts: list[str] = []
    num_words = 0
    for unit, between in units:
        words = len(unit.split())
        if parts and num_words + words > max_words:
            yield "".join(parts)
            parts, num_words = [], 0
        parts += [between, unit] if parts else [unit]
        num_words += words
    if parts:
        yield "".join(parts)
