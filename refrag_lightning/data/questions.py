"""Questions with answers and passages: what they are, and the sources that they come from.

A source gives its questions in the same order every time, and a key that changes when they do; a
part of them can be held out of training, with their gold passages (see `HeldOutByPassage`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

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


@dataclass(frozen=True)
class Passage:
    """A passage that a retriever found.

    Attributes:
        text: Its text.
        id: Its name in the data.
        title: Its title, or "".
        gold: Whether it holds the answer.
    """

    text: str
    id: str = ""
    title: str = ""
    gold: bool = False


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and passages in the retriever's order.

    Attributes:
        id: Its name in tables and messages.
        question: The question.
        answers: Right answers; the first one is what training teaches.
        passages: The passages.
        kind: What sort of question it is, for tables; or "".
        detail: What sort of answer it has, for tables; or "".
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    kind: str = ""
    detail: str = ""


class _WithPassages(Protocol):
    """A question or a conversation."""

    @property
    def passages(self) -> tuple[Passage, ...]: ...


Item = TypeVar("Item", bound=_WithPassages)


class HeldOutByPassage(HeldOut):
    """Base of the sources whose items have passages: passages are held out whole.

    Items with the same gold passages are in one split, wherever they stand, and training reads no
    held-out gold passage, not as another item's distractor either. Where no passage is marked as
    gold, items with the same passages are in one split.
    """

    def _split_by_passage(self, items: Iterable[Item], split: Split) -> Iterator[Item]:
        """Yields the items of one split.

        With `held_out`, those for training are all read before the first is given.
        """
        if split != "train" or not self.held_out:
            yield from self._split(items, split, _passages_key)
            return
        training: list[Item] = []
        held: set[str] = set()
        for item, own in self._assigned(items, _passages_key):
            if own == "train":
                training.append(item)
            else:
                held |= {_bare(passage) for passage in item.passages if passage.gold}
        left_out = 0
        for item in training:
            kept = tuple(p for p in item.passages if _bare(p) not in held)
            if sum(p.gold for p in kept) < sum(p.gold for p in item.passages):
                # It has several gold passages, and shares one of them with a held-out item.
                left_out += 1
            elif len(kept) < len(item.passages):
                yield replace(item, passages=kept)  # type: ignore[type-var]
            else:
                yield item
        if left_out:
            warnings.warn(
                f"{left_out} training items of {json.dumps(self.key())} are left out: one of their "
                "gold passages is held out",
                stacklevel=2,
            )


def _passages_key(item: _WithPassages) -> int | None:
    """The same for items with the same gold passages, or the same ones where none is marked."""
    gold = frozenset(_bare(passage) for passage in item.passages if passage.gold)
    passages = gold or frozenset(map(_bare, item.passages))
    return hash(passages) if passages else None


def _bare(passage: Passage) -> str:
    """A passage's text, with white space as one space."""
    return " ".join(passage.text.split())


class QuestionSource(HeldOutByPassage):
    """Base of the sources of questions.

    Args:
        held_out: Share of the gold passages for validation, and the same again for test.
        limit: Most questions that are read; None reads all.
    """

    def read(self) -> Iterator[Question]:
        """Yields every question, in an order that never changes."""
        raise NotImplementedError

    def questions(self, split: Split) -> Iterator[Question]:
        """Yields the questions of one split."""
        return self._split_by_passage(self.read(), split)


class _QuestionRows(RowSource, QuestionSource):
    def item(self, row: Row, where: str) -> Question:
        """The question of a row."""
        return _question(row, self.fields, where)


class JsonLinesQuestions(_QuestionRows):
    """JSON lines files, gzipped or not, of `id, question, answers, passages` and perhaps `kind`.

    `answers` is a text or a list of texts; `passages` a list of `id, title, text, gold`, of which
    only the text is needed.

    Args:
        paths: Files or patterns such as `data/*.jsonl.gz`, or one of them.
        question: The field of the question.
        answers: The field of the answers; a dot steps into a nested field.
        passages: The field of the passages; None where there are none.
        held_out: Share of the gold passages for validation, and the same again for test.
        limit: Most questions that are read.
        max_mb: Most millions of characters of a line; see `rows.json_rows`.

    Raises:
        FileNotFoundError: If a path or pattern matches no file.
    """

    def __init__(
        self,
        paths: str | list[str],
        question: str = "question",
        answers: str = "answers",
        passages: str | None = "passages",
        held_out: float = 0.0,
        limit: int | None = None,
        max_mb: float = MAX_MB,
    ) -> None:
        super().__init__(JsonRows(paths, max_mb), (question, answers, passages), held_out, limit)


class HubQuestions(_QuestionRows):
    """A data set of the Hugging Face Hub.

    The columns are read as they are found: answers as a text, a list, or a mapping with `text` (as
    SQuAD has them); passages as a text (one gold passage), a list of texts or of mappings, or a
    mapping of lists.

    Args:
        name: The data set's name.
        config: Its configuration, where it has several.
        split: The split that is read, whatever it is used for here.
        question: The column of the question.
        answers: The column of the answers; a dot steps into a nested field.
        passages: The column of the passages (`context` in SQuAD); None where there are none.
        revision: A commit or tag; the newest one if None.
        streaming: Read over the network as needed, instead of downloading everything first.
        held_out: Share of the gold passages for validation, and the same again for test.
        limit: Most questions that are read.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        question: str = "question",
        answers: str = "answers",
        passages: str | None = "passages",
        revision: str | None = None,
        streaming: bool = True,
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        rows = HubRows(name, config, split, revision, streaming)
        super().__init__(rows, (question, answers, passages), held_out, limit)


def _question(row: Row, fields: tuple[str, str, str | None], where: str) -> Question:
    question, answers, passages = fields
    return Question(
        id=str(row.get("id") or where),
        question=text_of(field_of(row, question, where), question, where),
        answers=_answers(field_of(row, answers, where), answers, where),
        passages=() if passages is None else read_passages(field_of(row, passages, where), where),
        kind=str(row.get("kind") or ""),
        detail=str(row.get("detail") or ""),
    )


def _answers(value: Any, name: str, where: str) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = field_of(value, "text", where)
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, Sequence) or not answers:
        raise ValueError(f"{name!r} in {where} holds no answer: {value!r}")
    return tuple(text_of(answer, name, where) for answer in answers)


def read_passages(value: Any, where: str) -> tuple[Passage, ...]:
    """Reads passages in any of the forms that `HubQuestions` lists.

    Args:
        value: What the field holds.
        where: The row, for error messages.

    Raises:
        ValueError: If it is in none of these forms.
    """
    if isinstance(value, str):
        return (Passage(value, gold=True),)
    if isinstance(value, Mapping):
        # How `datasets` gives a list of mappings: a list for each of their fields.
        columns = [[(name, item) for item in items] for name, items in value.items()]
        value = [dict(items) for items in zip(*columns, strict=True)]
    if not isinstance(value, Sequence):
        raise ValueError(f"the passages in {where} are no list: {value!r}")
    passages = []
    for item in value:
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, Mapping):
            raise ValueError(f"a passage in {where} is no text and no mapping: {item!r}")
        passages.append(
            Passage(
                text=text_of(field_of(item, "text", where), "text", where),
                id=str(item.get("id") or ""),
                title=str(item.get("title") or ""),
                gold=bool(item.get("gold", False)),
            )
        )
    return tuple(passages)
