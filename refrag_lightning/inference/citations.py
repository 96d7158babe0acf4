"""Citations in an answer, resolved to the documents of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refrag_lightning.inference.prompt import PlacedDocument
from refrag_lightning.text.documents import find_citations


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
    """Finds an answer's citations; see `find_citations` for their forms.

    Of two documents with the same id the later one is meant.

    Args:
        answer: The answer.
        documents: The documents of its prompt.

    Returns:
        The cited documents in the order of their first mention, and the ids that no document has,
        each once.
    """
    known = {placed.document.id: placed for placed in documents}
    mentions: dict[str, list[tuple[int, int]]] = {}
    for start, end, ids in find_citations(answer, known):
        for cited in ids:
            mentions.setdefault(cited, []).append((start, end))
    citations = [_citation(name, known[name], at) for name, at in mentions.items() if name in known]
    return citations, tuple(name for name in mentions if name not in known)


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
