"""Runs of words that training texts share with test texts, and copies of the data without them.

A run is 13 words side by side, compared in lower case and without punctuation, as Brown et al. 2020
(GPT-3, appendix C) look for test data in training data. A text of fewer words has none.

Files are JSON lines, gzipped or not. Of a record with `passages` (a question) each passage is a
text, and in a test set the gold ones alone; of any other record its `text` is.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refrag_lightning.cache import replace_file
from refrag_lightning.data.questions import read_passages
from refrag_lightning.data.rows import Row, field_of, json_rows, text_of
from refrag_lightning.data.sources import BLANK_LINES
from refrag_lightning.plain_text import literal_markdown

Run = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+")


@dataclass
class Overlap:
    """What a training file shares with a test file.

    Attributes:
        texts: Different texts of the training file.
        sharing: How many of them share a run.
        runs: The shared runs.
    """

    texts: int = 0
    sharing: int = 0
    runs: set[Run] = field(default_factory=set)


class OverlapCheck:
    """The runs of test files, to be looked for in training files.

    Time is linear in the texts, about a second for a million words; memory is taken for the runs of
    the test files, about 200 bytes a word.

    Args:
        test_files: The test files.
        num_words: Words of a run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a test file has no run, or is not as described above.
    """

    def __init__(self, test_files: Iterable[str], num_words: int = 13) -> None:
        if num_words < 1:
            raise ValueError(f"a run must have at least 1 word, not {num_words}")
        self.num_words = num_words
        self._shared: dict[int, bool] = {}
        self.runs: dict[str, set[Run]] = {}
        for file in test_files:
            texts = (text for row in json_rows(file) for text in _texts(*row, gold_only=True))
            self.runs[file] = {run for text in texts for run in self._runs_of(_words(text))}
            if not self.runs[file]:
                raise ValueError(
                    f"{file!r} has no text (of questions: no gold passage) of {num_words} words"
                )

    def overlaps(self, file: str) -> dict[str, Overlap]:
        """What a training file shares with each test file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not as described above.
        """
        found = {test: Overlap() for test in self.runs}
        seen: set[int] = set()
        for where, row in json_rows(file):
            for text in _texts(where, row):
                # A passage often stands with many questions.
                if hash(text) in seen:
                    continue
                seen.add(hash(text))
                words = _words(text)
                for test, runs in self.runs.items():
                    shared = runs.intersection(self._runs_of(words))
                    found[test].texts += 1
                    found[test].sharing += bool(shared)
                    found[test].runs |= shared
        return found

    def write_clean(self, file: str, path: Path) -> tuple[int, int]:
        """Writes a copy of a training file that shares no run with the test files.

        A passage that shares one is left out, and if it is a gold one, its question. Of other texts
        the paragraphs (parted by blank lines) that a shared run touches are left out, and the
        record if nothing remains. Everything else in a record is kept.

        Args:
            file: The training file.
            path: The copy; gzipped if its name ends with .gz.

        Returns:
            How many records there were, and how many are left out.

        Raises:
            FileExistsError: If there is such a file already.
        """
        records = left_out = 0
        opened: Any = gzip.open if path.suffix == ".gz" else open
        if path.exists():
            raise FileExistsError(f"{path} is there already")
        with replace_file(path) as part, opened(part, "wt", encoding="utf-8") as copy:
            for where, row in json_rows(file):
                records += 1
                kept = self._without_shared(where, row)
                if kept is None:
                    left_out += 1
                else:
                    copy.write(json.dumps(kept, ensure_ascii=False) + "\n")
        return records, left_out

    def _without_shared(self, where: str, row: Row) -> Row | None:
        if "passages" not in row:
            text = _text(where, row)
            kept = self._kept_paragraphs(text)
            return {**row, "text": kept} if kept else None
        kept_passages = []
        for item, passage in zip(
            row["passages"], read_passages(row["passages"], where), strict=True
        ):
            if not self._is_shared(passage.text):
                kept_passages.append(item)
            elif passage.gold:
                return None
        return {**row, "passages": kept_passages} if kept_passages else None

    def _kept_paragraphs(self, text: str) -> str:
        """A text without the paragraphs that a shared run touches."""
        paragraphs = [p.strip("\n") for p in BLANK_LINES.split(text)]
        words: list[str] = []
        owner: list[int] = []
        for number, paragraph in enumerate(paragraphs):
            own = _words(paragraph)
            words += own
            owner += [number] * len(own)
        touched: set[int] = set()
        for place, run in enumerate(self._runs_of(words)):
            if any(run in runs for runs in self.runs.values()):
                touched.update(owner[place : place + self.num_words])
        if not touched:
            return text
        return "\n\n".join(p for number, p in enumerate(paragraphs) if number not in touched)

    def _is_shared(self, text: str) -> bool:
        """Whether a passage shares a run; kept, since it may stand with many questions."""
        if hash(text) not in self._shared:
            words = _words(text)
            alone = all(runs.isdisjoint(self._runs_of(words)) for runs in self.runs.values())
            self._shared[hash(text)] = not alone
        return self._shared[hash(text)]

    def _runs_of(self, words: list[str]) -> Iterator[Run]:
        return zip(*(words[start:] for start in range(self.num_words)), strict=False)


def table(found: Iterable[tuple[str, dict[str, Overlap]]]) -> str:
    """A Markdown table of what training files share with test files.

    Args:
        found: Training files, each with its `OverlapCheck.overlaps`.
    """
    lines = [
        "| training file | test file | texts | texts with a shared run | shared runs |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {literal_markdown(Path(file).name)} | {literal_markdown(Path(test).name)} "
        f"| {o.texts:,} | {o.sharing:,} | {len(o.runs):,} |"
        for file, overlaps in found
        for test, o in overlaps.items()
    ]
    return "\n".join(lines)


def _texts(where: str, row: Row, *, gold_only: bool = False) -> list[str]:
    """The texts of a record."""
    if "passages" not in row:
        return [_text(where, row)]
    passages = read_passages(row["passages"], where)
    return [passage.text for passage in passages if passage.gold or not gold_only]


def _text(where: str, row: Row) -> str:
    return text_of(field_of(row, "text", where), "text", where)


def _words(text: str) -> list[str]:
    """The words that are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())
