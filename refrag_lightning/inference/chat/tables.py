"""Tables and lists of documents, citations and rows, as the chat shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from refrag_lightning.inference.chat.session import Turn
from refrag_lightning.inference.trace import Trace, TracedDocument
from refrag_lightning.plain_text import one_line, printable
from refrag_lightning.text.documents import Document

_TITLE, _SOURCE = 48, 60
_ORIGINS = {"store": "stored", "memory": "read before", "encoded": "encoded now", "text": "text"}
_STATES = {"vector": "cyan", "tokens": "green", "empty": "dim"}


def citations(turn: Turn) -> Group:
    """The cited documents with their titles and sources, and the ids that no document has."""
    lines = [source_line(c.id, c.title or c.document_id, c.source) for c in turn.citations]
    if turn.unknown_ids:
        ids = ", ".join(f"[{one_line(name, 20)}]" for name in turn.unknown_ids)
        lines.append(Text(f"  {ids} is no document", style="yellow"))
    return Group(*lines)


def source_line(name: str, title: str, source: str) -> Text:
    """A document on one line: its number, its title, where it was read."""
    line = Text("  ").append(f"[{printable(name)}]", style="cyan").append(" ")
    line.append(one_line(title, _TITLE))
    if source and source != title:
        line.append("  " + one_line(source, _SOURCE, keep_end=True), style="dim")
    return line


def _table(*columns: str, title: str | None = None, numeric: Sequence[str] = ()) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        title=title and Text(title, style="bold"),
        title_justify="left",
        header_style="dim",
        border_style="dim",
        show_edge=False,
    )
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in numeric else "left",
            overflow="ellipsis",
            no_wrap=True,
            style="cyan" if name == "id" else "",
        )
    return table


def listed(name: str, documents: Sequence[Document]) -> Table:
    """Documents under a name."""
    table = _table("id", "title", "source", "characters", title=name, numeric=("characters",))
    for document in documents:
        table.add_row(
            Text(printable(document.id)),
            Text(one_line(document.title, _TITLE)),
            Text(one_line(document.attributes.get("source", ""), _SOURCE, keep_end=True), "dim"),
            f"{len(document.text):,}",
        )
    return table


def documents_table(trace: Trace) -> Table:
    """What became of each document of a prompt."""
    numeric = ("characters", "as vectors", "as tokens")
    table = _table("id", "title", *numeric, "rows", numeric=numeric)
    for document in trace.documents:
        placed, states = document.placed, document.states
        table.add_row(
            Text(printable(placed.document.id)),
            Text(one_line(placed.document.title or placed.document_id, _TITLE)),
            f"{len(placed.document.text):,}",
            _number(states["vector"]),
            Text("all") if document.origin == "text" else _number(states["tokens"]),
            Text(_ORIGINS[document.origin], style="dim"),
        )
    return table


def rows_table(document: TracedDocument) -> Table:
    """What became of each row of a document."""
    title = f"[{document.placed.document.id}] {document.placed.document.title}"
    table = _table("row", "characters", "stands as", "why", "text", title=one_line(title, 80))
    for number, row in enumerate(document.rows):
        lost = f", {row.lost} characters lost" if row.lost else ""
        table.add_row(
            str(number),
            f"{row.start:,}-{row.end:,}",
            Text(row.state, style=_STATES[row.state]),
            Text(row.why + lost, style="dim"),
            Text(one_line(row.text, 120)),
        )
    return table


def _number(value: int) -> Text:
    return Text(f"{value:,}" if value else "-", style="" if value else "dim")
