"""Passages: documents cut into pieces of about so many words, at the ends of sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from refrag_lightning.retrieval.sources import SourceDocument
from refrag_lightning.text.sentences import sentence_ends

# A long run without white space counts as several words, so that no passage grows without bound;
# Chinese and Japanese have about two characters a word.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]{1,2}|[^\\s\u3040-\u30ff\u3400-\u9fff]{1,24}")


@dataclass(frozen=True)
class Passage:
    """A piece of a document, as it is searched for and given to the decoder.

    Attributes:
        id: The document's id where the document is one passage, else `{document id}#{number}`,
            numbered from 1.
        document_id: The document's id.
        title: The document's title, or "".
        text: The passage, without white space at its edges.
        start: First character in the document.
        end: One past its last character.
        source: Where the document was read; see `SourceDocument`.
    """

    id: str
    document_id: str
    title: str
    text: str
    start: int
    end: int
    source: str = ""


class PassageSplitter:
    """Cuts documents into passages.

    A passage is as many whole sentences as `words` allows; a sentence that is longer is cut
    between words. Without overlap, what lies between two passages is white space alone.

    Args:
        words: Most words of a passage. 0 keeps documents whole, white space at their edges too.
        overlap: Words of a passage that the next one repeats. It begins with a sentence where one
            begins among them.

    Raises:
        ValueError: If `words` is negative, or `overlap` is not from 0 to below `words`.
    """

    def __init__(self, words: int = 100, overlap: int = 0) -> None:
        if words < 0:
            raise ValueError(f"words ({words}) must be 0 (documents stay whole) or more")
        if not 0 <= overlap < max(words, 1):
            raise ValueError(f"overlap ({overlap}) must be from 0 to below words ({words})")
        self.words = words
        self.overlap = overlap

    def split(self, document: SourceDocument) -> list[Passage]:
        """Cuts a document; of one that is white space alone nothing comes."""
        spans = self._spans(document.text)
        numbered = len(spans) > 1
        return [
            Passage(
                id=f"{document.id}#{number}" if numbered else document.id,
                document_id=document.id,
                title=document.title,
                text=document.text[start:end],
                start=start,
                end=end,
                source=document.source,
            )
            for number, (start, end) in enumerate(spans, start=1)
        ]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """First and past-last characters of the passages."""
        if not text.strip():
            return []
        if self.words == 0:
            return [(0, len(text))]
        found = np.array([word.span() for word in _WORD.finditer(text)], dtype=np.int64)
        starts, ends = found[:, 0], found[:, 1]
        # Sentences end after so many words.
        cuts = np.unique(np.searchsorted(ends, sentence_ends(text), side="right"))
        spans = []
        first, last, total = 0, 0, len(found)
        while True:
            before, last = last, min(first + self.words, total)
            if last < total:
                place = int(np.searchsorted(cuts, last, side="right")) - 1
                # With overlap a sentence may end within what was there before.
                if place >= 0 and cuts[place] > before:
                    last = int(cuts[place])
            spans.append((int(starts[first]), int(ends[last - 1])))
            if last == total:
                return spans
            first = max(self._next(last, cuts), first + 1)

    def _next(self, last: int, cuts: np.ndarray) -> int:
        """The word that the passage after the one with past-last word `last` begins with."""
        earliest = last - self.overlap
        place = int(np.searchsorted(cuts, earliest, side="left"))
        begins = int(cuts[place]) if place < len(cuts) else last
        return begins if begins < last else earliest
