"""What the chat looks like: answers, their sources and figures, traces, documents."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from refrag_lightning.inference.chat import figures
from refrag_lightning.inference.chat.commands import COMMANDS
from refrag_lightning.inference.chat.markdown import AnswerMarkdown, MarkdownStream
from refrag_lightning.inference.chat.session import Reply, Session, Turn
from refrag_lightning.inference.chat.tables import (
    citations,
    documents_table,
    listed,
    rows_table,
    source_line,
)
from refrag_lightning.inference.trace import Trace, TracedDocument
from refrag_lightning.plain_text import one_line, printable
from refrag_lightning.text.documents import Document

_KEYS = "Alt-Enter begins a line · Ctrl-C stops an answer · Ctrl-D leaves"
# Below this two answers beside each other are too narrow to read.
_WIDE = 72


class Screen:
    """Shows a session on a console.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    # ---- around the conversation -------------------------------------------------------------

    def greet(self, session: Session, facts: Sequence[tuple[str, str]]) -> None:
        """Says what is loaded.

        Args:
            session: The session.
            facts: Lines of a name and what is to say of it.
        """
        self._print(Text("refrag", style="bold cyan"))
        self._grid([*facts, ("documents", str(len(session.documents)))])
        self._print(Text("  /help lists what can be typed · " + _KEYS, style="dim"), Text())

    def state(self, session: Session) -> str:
        """The line under the prompt."""
        return " · ".join(
            [
                one_line(session.model_name, 40, keep_end=True),
                figures.count(len(session.documents), "document"),
                figures.count(len(session.turns), "question"),
                "/help",
            ]
        )

    def help(self) -> None:
        """Lists the commands."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for command in COMMANDS:
            table.add_row(
                Text("  " + command.name, style="cyan"),
                Text(command.argument, style="dim"),
                command.summary,
            )
        self._print(table, Text("  " + _KEYS, style="dim"), Text())

    def note(self, text: str) -> None:
        """Says that something was done."""
        self._print(Text("  " + printable(text), style="dim"), Text())

    def error(self, error: BaseException) -> None:
        """Says in one line what went wrong."""
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.strerror}: {error.filename}"
        text = one_line(text, 1000) or type(error).__name__
        self._print(
            Text("error: ", style="bold red").append(text, style="not bold default"), Text()
        )

    # ---- answers -----------------------------------------------------------------------------

    def stream(self, reply: Reply) -> None:
        """Shows an answer while it comes.

        Raises:
            ValueError: As the reply.
        """
        self._print(Text())
        with MarkdownStream(self.console, waiting=_waiting()) as answer:
            for piece in reply:
                if not answer.ids and reply.turn.trace is not None:
                    answer.ids = [placed.document.id for placed in reply.turn.trace.placed]
                answer.write(piece)

    def summary(self, turn: Turn) -> None:
        """Shows what stands under an answer: sources, figures, and whether it was stopped."""
        if turn.stopped:
            self._print(Text("  stopped", style="yellow"))
        if turn.text:
            self._print(Text())
        if turn.citations or turn.unknown_ids:
            self._print(citations(turn))
        if turn.trace is not None:
            for action in turn.trace.actions:
                self._print(Text("  " + printable(action), style="yellow"))
            lines = _packed(figures.summary(turn.trace).split(" · "), self.console.width - 2)
            self._print(_set_in(Text("\n".join(lines), style="dim")))
        self._print(Text())

    def beside(self, turn: Turn, reply: Reply) -> None:
        """Shows an answer, and beside it the one to full text while that comes.

        Raises:
            ValueError: As the reply.
        """
        self._print(Text())
        spinner = _waiting()
        with Live(
            # Made anew whenever it is drawn, not with every piece.
            get_renderable=lambda: self._columns(turn, reply.turn, spinner),
            console=self.console,
            transient=True,
            refresh_per_second=12,
        ):
            for _ in reply:
                pass
        self._print(self._columns(turn, reply.turn), Text())

    def _columns(
        self, turn: Turn, full: Turn, waiting: RenderableType | None = None
    ) -> RenderableType:
        halves = [
            _half("as it was answered", turn),
            _half("with full text", full, None if full.text else waiting),
        ]
        if self.console.width < _WIDE:
            return Group(*halves)
        table = Table.grid(expand=True, padding=(0, 2))
        for _ in halves:
            table.add_column(ratio=1)
        table.add_row(*halves)
        return table

    # ---- what was read -----------------------------------------------------------------------

    def trace(self, turn: Turn, document_id: str | None = None) -> None:
        """Shows what became of the documents of a question, or of the rows of one.

        Raises:
            ValueError: There is no trace, or no such document in it.
        """
        trace = _trace_of(turn)
        if document_id is not None:
            self._print(_set_in(rows_table(_document(trace, document_id))), Text())
            return
        if trace.documents:
            self._print(_set_in(documents_table(trace)), Text())
        lines = [("prompt", figures.positions(trace)), ("first token", figures.times(trace))]
        if trace.rate is not None:
            lines.insert(1, ("rate", f"{trace.rate} tokens a row"))
        speed = f", {trace.tokens_a_second:.1f} a second" if trace.tokens_a_second else ""
        lines.append(("answer", figures.count(trace.new_tokens, "token") + speed))
        lines += [("shortened", action) for action in trace.actions]
        if trace.seed is not None:
            lines.append(("seed", str(trace.seed)))
        self._grid(lines)
        self._print(Text())

    def documents(self, session: Session, document_id: str | None = None) -> None:
        """Lists the documents at hand and those of the last answer, or shows the text of one.

        Raises:
            ValueError: There is no such document.
        """
        trace = session.turns[-1].trace if session.turns else None
        placed = [p for p in trace.placed if p.kind != "given"] if trace is not None else []
        if document_id is not None:
            known = {p.document.id: p.document for p in placed}
            known |= {document.id: document for document in session.documents}
            if document_id not in known:
                raise ValueError(f"there is no document {document_id!r}; /docs lists them")
            document = known[document_id]
            self._print(Text(f"  [{document_id}] {printable(document.title)}", style="bold"))
            self._print(Text(printable(document.text)), Text())
            return
        if not session.documents and not placed:
            self.note("there are no documents; /add FILE gives some")
            return
        if session.documents:
            self._print(_set_in(listed("given to every question", session.documents)), Text())
        if placed:
            name = {"searched": "found for the last question", "message": "typed with a question"}
            for kind in ("message", "searched"):
                documents = [
                    Document(p.document.text, p.document.id, p.document.title, {"source": p.source})
                    for p in placed
                    if p.kind == kind
                ]
                if documents:
                    self._print(_set_in(listed(name[kind], documents)), Text())

    def added(self, documents: Sequence[Document]) -> None:
        """Says which documents were added."""
        for document in documents[:10]:
            self._print(source_line(document.id, document.title, ""))
        if len(documents) > 10:
            self._print(Text(f"  and {len(documents) - 10:,} more", style="dim"))
        characters = sum(len(document.text) for document in documents)
        self.note(f"{figures.count(len(documents), 'document')}, {characters:,} characters")

    def _grid(self, lines: Sequence[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in lines:
            table.add_row(Text("  " + name, style="dim"), Text(printable(text)))
        self._print(table)

    def _print(self, *renderables: RenderableType) -> None:
        self.console.print(*renderables, sep="\n")


def _set_in(renderable: RenderableType) -> Padding:
    return Padding(renderable, (0, 0, 0, 2), expand=False)


def _packed(parts: Sequence[str], width: int) -> list[str]:
    """As many parts on a line as fit, with dots between them."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _waiting() -> RenderableType:
    return Spinner("dots", Text("reading", style="dim"), style="cyan")


def _half(name: str, turn: Turn, instead: RenderableType | None = None) -> RenderableType:
    """One of two answers: its heading, its text, and its figures."""
    parts: list[RenderableType] = [Text(name, style="bold cyan"), Text()]
    parts.append(instead if instead is not None else AnswerMarkdown(turn.text))
    parts.append(Text("stopped" if turn.stopped else "", style="yellow"))
    if turn.trace is not None:
        parts += [Text(printable(action), style="yellow") for action in turn.trace.actions]
        # One figure a line: the columns are narrow.
        parts.append(Text(figures.summary(turn.trace).replace(" · ", "\n"), style="dim"))
    return Group(*parts, Text())


def _trace_of(turn: Turn) -> Trace:
    if turn.trace is None:
        raise ValueError("the last answer was stopped before its documents were read")
    return turn.trace


def _document(trace: Trace, document_id: str) -> TracedDocument:
    for document in trace.documents:
        if document.placed.document.id == document_id:
            return document
    ids = ", ".join(document.placed.document.id for document in trace.documents) or "none"
    raise ValueError(f"the last answer read no document {document_id!r}; it read: {ids}")
