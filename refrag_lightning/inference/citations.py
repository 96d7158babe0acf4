"""Citations: `[7]`, `[1, 3]` or `[1][2]` in an answer, resolved to the documents of its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refrag_lightning.inference.prompt import PlacedDocument

# What stands in code is no citation: `x[1]` is an index there.
_CODE = re.compile(r"(`{3,}|~{3,})[\s\S]*?(?:\1|\Z)|(`+)[^\n]*?\2")
_BRACKETS = re.compile(r"\[([^\[\]\n]+)\]")
_SEPARATOR = re.compile(r"[,;]")


@dataclass(frozen=True)
class Citation:
    """A document that an answer cites.

    Attributes:
        id: The id as it is cited.
        mentions: First and past-last character, in the answer, of each pair of brackets with it.
        document_id: The document's id in the index, or the id that it was given with.
        passage_id: The passage's id in the index; "" for a document that was given.
        title: Its title.
        source: Where it was read: a file, a line of one, a data set; "" where that is unknown.
        start: First character of the cited text in its document.
        end: One past its last character.
        text: The cited text: what the decoder was given.
    """

    id: str
    mentions: tuple[tuple[int, int], ...]
    document_id: str
    passage_id: str
    title: str
    source: str
    start: int
    end: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "mentions": [list(span) for span in self.mentions]}


def resolve(
    answer: str, documents: Sequence[PlacedDocument]
) -> tuple[list[Citation], tuple[str, ...]]:
    """Finds an answer's citations.

    Brackets hold citations if one of their ids is a document's, or all of them are numbers; ids
    are parted by commas or semicolons. Of two documents with the same id the later one is meant.

    Args:
        answer: The answer.
        documents: The documents of its prompt.

    Returns:
        The cited documents in the order of their first mention, and the ids that no document has,
        each once.
    """
    known = {placed.document.id: placed for placed in documents}
    # Code becomes as many spaces, so that places stay.
    plain = _CODE.sub(lambda code: " " * len(code[0]), answer)
    mentions: dict[str, list[tuple[int, int]]] = {}
    for match in _BRACKETS.finditer(plain):
        for cited in dict.fromkeys(_ids(match[1], known)):
            mentions.setdefault(cited, []).append(match.span())
    citations = [_citation(name, known[name], at) for name, at in mentions.items() if name in known]
    return citations, tuple(name for name in mentions if name not in known)


def _ids(content: str, known: Mapping[str, PlacedDocument]) -> list[str]:
    """The ids that a pair of brackets holds; none where it is no citation."""
    if content in known:  # an id may hold a comma itself
        return [content]
    ids = [part.strip() for part in _SEPARATOR.split(content)]
    if any(part in known for part in ids):
        return [part for part in ids if part]
    return ids if all(part.isascii() and part.isdigit() for part in ids) else []


def _citation(name: str, placed: PlacedDocument, mentions: list[tuple[int, int]]) -> Citation:
    return Citation(
        id=name,
        mentions=tuple(mentions),
        document_id=placed.document_id,
        passage_id=placed.passage_id,
        title=placed.document.title,
        source=placed.source,
        start=placed.start,
        end=placed.start + len(placed.document.text),
        text=placed.document.text,
    )
