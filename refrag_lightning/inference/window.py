"""Prompts that are too long for the decoder: refused, or shortened by a rule that the trace tells.

Texts between documents, headers and documents are tokenized apart from each other, so what a
document costs is known without building the prompt again. The last document goes first; `truncate`
keeps of the last one that still fits the rows from its beginning, or its first tokens where it
stands as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from refrag_lightning.inference.prompt import Conversation, PlacedDocument
from refrag_lightning.inference.request import TooLong
from refrag_lightning.inference.rows import DocumentRows
from refrag_lightning.text.packing import rows_of_tokens
from refrag_lightning.text.segments import render
from refrag_lightning.text.tokenizer import RefragTokenizer


@dataclass(frozen=True)
class Shortened:
    """A conversation after the rule.

    Attributes:
        conversation: The conversation with fewer or shorter documents.
        actions: What was done, a line each.
        rows: Rows of documents that were cut, by their new text.
        cut: The text that each of them had before.
    """

    conversation: Conversation
    actions: list[str]
    rows: dict[str, DocumentRows]
    cut: dict[str, str]


def shorten(
    conversation: Conversation,
    excess: int,
    rule: TooLong,
    tokenizer: RefragTokenizer,
    rows: Mapping[str, DocumentRows],
) -> Shortened:
    """Takes at least so many positions out of a prompt, as far as there are documents to take.

    Args:
        conversation: The conversation.
        excess: Positions that it is too long.
        rule: `drop` or `truncate`.
        tokenizer: The model's tokenizer, at the request's rate.
        rows: Rows of the documents that do not stand wholly as text.

    Returns:
        The shorter conversation; without actions where no document may go.
    """
    changed: dict[int, PlacedDocument | None] = {}
    result = Shortened(conversation, [], {}, {})
    documents = conversation.documents
    for place in reversed(range(len(documents))):
        placed = documents[place]
        if excess <= 0 or not placed.may_go:
            continue
        whole = rows.get(placed.document.text)
        ends, costs = _costs(placed, tokenizer, whole)
        room = int(costs.sum()) - excess
        length = 0
        if rule == "truncate" and room > 0:
            length, freed = _cut(placed, room, ends, costs, tokenizer, whole)
        if length == 0:
            changed[place] = None
            freed = int(costs.sum()) + _frame(placed, tokenizer)
            result.actions.append(f"document {placed.document.id} was left out")
        else:
            text = placed.document.text
            changed[place] = placed.cut(length)
            if whole is not None:
                kept = int(np.searchsorted(whole.packed.bounds, length))
                result.rows[text[:length]] = whole.head(kept)
                changed[place] = _without_rows_from(placed.cut(length), kept)
            result.cut[text[:length]] = text
            result.actions.append(
                f"document {placed.document.id} was cut to its first {length} of {len(text)} "
                "characters"
            )
        excess -= freed
    return replace(result, conversation=conversation.map(changed))


def _costs(
    placed: PlacedDocument, tokenizer: RefragTokenizer, rows: DocumentRows | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where a document's pieces end, and the positions that each takes: rows, or tokens of text."""
    text = placed.document.text
    if rows is None:
        ends = tokenizer.plain_decoder([text])[0].ends
        return ends, np.ones(len(ends), dtype=np.int64)
    costs = tokenizer.assembler.slots_of_rows(rows.packed.row_sizes)
    if placed.expand != "none":
        ends = tokenizer.plain_decoder([text])[0].ends
        tokens = np.bincount(rows_of_tokens(rows.packed.bounds, ends), minlength=len(costs))
        everything = np.arange(len(costs))
        chosen = everything if placed.expand == "all" else np.array([*placed.expand], int)
        costs[chosen] = tokens[chosen]
    return rows.packed.bounds[1:], costs


def _cut(
    placed: PlacedDocument,
    room: int,
    ends: np.ndarray,
    costs: np.ndarray,
    tokenizer: RefragTokenizer,
    rows: DocumentRows | None,
) -> tuple[int, int]:
    """Characters of a document's beginning that fit into `room` positions, and what that frees."""
    totals = np.cumsum(costs)
    kept = int(np.searchsorted(totals, room, side="right"))
    while kept > 0:
        length = int(ends[kept - 1])
        shorter = placed.cut(length)
        head = None
        if rows is not None:
            head = rows.head(kept)
            shorter = _without_rows_from(shorter, kept)
        # Cut inside a word, the beginning may be tokenized in another way, into more tokens.
        used = int(_costs(shorter, tokenizer, head)[1].sum())
        if length > 0 and used <= room:
            return length, int(totals[-1]) - used
        kept -= 1
    return 0, 0


def _frame(placed: PlacedDocument, tokenizer: RefragTokenizer) -> int:
    """Positions of a document's header and footer."""
    segments = render([placed.document], header=tokenizer.header, footer=tokenizer.footer)
    texts = [segment.text for segment in segments if segment.document is None]
    return sum(len(read.ids) for read in tokenizer.plain_decoder(texts))


def _without_rows_from(placed: PlacedDocument, num_rows: int) -> PlacedDocument:
    if isinstance(placed.expand, str):
        return placed
    return replace(placed, expand=[row for row in placed.expand if row < num_rows])
