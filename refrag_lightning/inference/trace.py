"""Trace: what became of each document and row of a prompt, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from refrag_lightning.inference.prompt import PlacedDocument
from refrag_lightning.plain_text import one_line, printable
from refrag_lightning.text.batch import RowState, RowTrace
from refrag_lightning.text.segments import Segment

if TYPE_CHECKING:
    from rich.table import Table

    from refrag_lightning.text.tokenizer import RefragTokenizer

RowOrigin = Literal["store", "memory", "encoded", "text"]
"""Where a document's rows come from: the index, the pipeline's memory, the encoder just now; or the
document is read as text and needs none."""

_ORIGINS: dict[RowOrigin, str] = {
    "store": "from the index",
    "memory": "read before",
    "encoded": "encoded now",
    "text": "as text",
}


@dataclass
class Seconds:
    """How long the parts of a request took; those of a batch count for each of its requests.

    Attributes:
        queued: From its arrival until work on it began.
        search: Searching for passages.
        lookup: Getting row states from memory and the index.
        encoding: Encoding documents whose states were not there.
        building: Writing the prompt and building its tensors, tokenizing included.
        prefill: Projecting rows and reading the prompt, up to the first token's logits.
        first_token: From its arrival until the first token was there.
        total: From its arrival until the answer was complete.
    """

    queued: float = 0.0
    search: float = 0.0
    lookup: float = 0.0
    encoding: float = 0.0
    building: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class TracedRow:
    """A row of a document.

    Attributes:
        document_id: The document's id, as the decoder reads it.
        start: First character in the document's text.
        end: One past the last one.
        text: Its characters.
        state: `vector`, `tokens` or `empty`, as in `text.batch.RowTrace`.
        why: Why it stands as that.
        lost: Characters that the encoder could not read.
    """

    document_id: str
    start: int
    end: int
    text: str
    state: RowState
    why: str
    lost: int


@dataclass(frozen=True)
class TracedDocument:
    """A document of a prompt.

    Attributes:
        placed: The document and where it comes from.
        origin: Where its rows come from.
        rows: Its rows, in order.
    """

    placed: PlacedDocument
    origin: RowOrigin
    rows: tuple[TracedRow, ...]

    @property
    def states(self) -> Counter[RowState]:
        """How many of its rows are in each state."""
        return Counter(row.state for row in self.rows)


@dataclass
class Trace:
    """What became of a request. Rows and counts are worked out when they are looked at.

    Attributes:
        placed: The documents of the prompt, in order.
        origins: Where the rows of each come from.
        row_traces: The rows of the prompt, as the batch has them.
        segments: What the decoder read.
        tokenizer: The model's tokenizer, at the rate of the request.
        rate: Tokens a row; None for a model without an encoder.
        positions: Positions of the prompt as the decoder read it.
        window: Positions that the decoder has; None if that is unknown.
        actions: What was left out or cut because the prompt was too long.
        seed: Of what was drawn; None for a greedy answer.
        batch_size: Requests that were answered together.
        seconds: Where the time went; complete when the answer is.
        new_tokens: Tokens of the answer so far.
    """

    placed: Sequence[PlacedDocument]
    origins: Sequence[RowOrigin]
    row_traces: Sequence[RowTrace]
    segments: Sequence[Segment]
    tokenizer: RefragTokenizer
    rate: int | None
    positions: int
    window: int | None = None
    actions: tuple[str, ...] = ()
    seed: int | None = None
    batch_size: int = 1
    seconds: Seconds = field(default_factory=Seconds)
    new_tokens: int = 0

    @cached_property
    def documents(self) -> list[TracedDocument]:
        """The documents with their rows."""
        rows: list[list[TracedRow]] = [[] for _ in self.placed]
        for row in self.row_traces:
            placed, origin = self.placed[row.document], self.origins[row.document]
            rows[row.document].append(
                TracedRow(
                    document_id=row.document_id,
                    start=row.start,
                    end=row.end,
                    text=placed.document.text[row.start : row.end],
                    state=row.state,
                    why=self._why(row.state, origin),
                    lost=row.lost,
                )
            )
        return [
            TracedDocument(placed, origin, tuple(own))
            for placed, origin, own in zip(self.placed, self.origins, rows, strict=True)
        ]

    @cached_property
    def positions_as_text(self) -> int:
        """Positions that the same prompt takes with every document as text."""
        has_template = any(segment.kind == "template" for segment in self.segments)
        (tokens,) = self.tokenizer.decoder_tokens([self.segments])
        opening = 0 if has_template else len(self.tokenizer.opening_ids)
        return opening + sum(len(read.ids) for read in tokens)

    @property
    def tokens_a_second(self) -> float:
        """Tokens of the answer a second, from the second one on; 0 before there are two."""
        writing = self.seconds.total - self.seconds.first_token
        return (self.new_tokens - 1) / writing if self.new_tokens > 1 and writing > 0 else 0.0

    def as_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Plain data, for JSON.

        Args:
            rows: Whether each row is listed.
        """
        return {
            "rate": self.rate,
            "positions": self.positions,
            "positions_as_text": self.positions_as_text,
            "window": self.window,
            "actions": list(self.actions),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "new_tokens": self.new_tokens,
            "tokens_a_second": self.tokens_a_second,
            "seconds": asdict(self.seconds),
            "documents": [
                {
                    "id": document.placed.document.id,
                    "title": document.placed.document.title,
                    "kind": document.placed.kind,
                    "document_id": document.placed.document_id,
                    "passage_id": document.placed.passage_id,
                    "source": document.placed.source,
                    "start": document.placed.start,
                    "characters": len(document.placed.document.text),
                    "score": document.placed.score,
                    "origin": document.origin,
                    "states": dict(document.states),
                    **({"rows": [asdict(row) for row in document.rows]} if rows else {}),
                }
                for document in self.documents
            ],
        }

    def table(self) -> Table:
        """The documents as a table for a terminal, positions and times below it."""
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=Text(printable("\n".join(self.summary()))), caption_justify="left")
        for name in ("id", "title", "vectors", "text rows", "rows"):
            numeric = name in ("vectors", "text rows")
            table.add_column(name, justify="right" if numeric else "left")
        for document in self.documents:
            states = document.states
            table.add_row(
                # As Text: a title may hold what rich reads as markup.
                Text(one_line(document.placed.document.id)),
                Text(one_line(document.placed.document.title or document.placed.document_id)),
                str(states["vector"]),
                str(states["tokens"]),
                _ORIGINS[document.origin],
            )
        return table

    def rows_table(self) -> Table:
        """Every row as a table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table("id", "characters", "stands as", "why", "text")
        for document in self.documents:
            for row in document.rows:
                table.add_row(
                    Text(one_line(row.document_id)),
                    f"{row.start}-{row.end}",
                    row.state,
                    row.why,
                    Text(one_line(row.text)),
                )
        return table

    def summary(self) -> list[str]:
        """Positions, times and what was shortened, in a few lines."""
        seconds = self.seconds
        parts = {name: value for name, value in asdict(seconds).items() if value}
        lines = [
            f"{self.positions} positions of the prompt, {self.positions_as_text} with all as text"
            + (f"; {self.rate} tokens a row" if self.rate is not None else ""),
            "seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in parts.items()),
            f"{self.new_tokens} tokens, {self.tokens_a_second:.1f} a second"
            + (f"; seed {self.seed}" if self.seed is not None else ""),
        ]
        return [*lines, *self.actions]

    def _why(self, state: RowState, origin: RowOrigin) -> str:
        if state == "empty":
            return "the encoder reads no token of it"
        if state == "vector":
            return f"compressed: {_ORIGINS[origin]}"
        return "expanded: asked for" if self.rate is not None else "text: there is no encoder"
