"""Markdown that appears while it is being written.

A terminal can redraw its last lines, but not what has scrolled away. So the text is cut into
Markdown's top-level blocks: a block that is complete is printed once and stays, the last one is
redrawn as it grows, and where that one alone is taller than the screen its upper lines stay, too.

What rich's own renderer would drop stands as it was written here: HTML tags, and lines such as
`[1]: Rivers`, which CommonMark takes for the target of a link.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.text import Text

from refrag_lightning.plain_text import printable
from refrag_lightning.text.documents import find_citations

_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable("reference")
)
_CODE = ("fence", "code_block")
# Redrawing more often than this shows nothing more, and takes time from the model's thread; so a
# long block, which takes long to draw, is drawn less often.
_SECONDS = 1 / 15
_SHARE = 0.1


class _PlainHeading(Heading):
    """A heading on the left; rich puts the largest into a box."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text
        text.justify = "left"
        yield text


class AnswerMarkdown(Markdown):
    """Markdown as a model writes it: no HTML, no link targets, headings on the left.

    Args:
        text: The text; control characters are left out.
    """

    elements: ClassVar[dict] = {**Markdown.elements, "heading_open": _PlainHeading}

    def __init__(self, text: str) -> None:
        # Addresses stand beside what links to them: a link's text may claim another one.
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup = printable(text)
        self.parsed = _PARSER.parse(self.markup)


def blocks(text: str) -> list[tuple[int, int]]:
    """The top-level blocks of a Markdown text.

    Returns:
        For each block its first line and one past its last, in order; blank lines are in none.
    """
    return [
        (token.map[0], token.map[1])
        for token in _PARSER.parse(text)
        if token.level == 0 and token.nesting >= 0 and token.map
    ]


class MarkdownStream:
    """Shows a growing Markdown text at the end of a console; used in a `with` statement.

    Args:
        console: Where to.
        waiting: Stands there until the first text comes.
        ids: Ids of the documents whose citations are set off.
    """

    def __init__(
        self,
        console: Console,
        *,
        waiting: RenderableType = "",
        ids: Collection[str] = (),
    ) -> None:
        self.console = console
        self.ids = ids
        self._text = ""
        self._done = 0  # characters of the text in blocks that are printed
        self._kept = 0  # lines of the last block that are printed already
        self._any = False
        self._next = 0.0  # when it is drawn again
        self._waiting = Live(waiting, console=console, transient=True, refresh_per_second=12)
        # Drawn by hand: a thread that draws while something is printed above writes over it.
        self._growing = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> MarkdownStream:
        self._waiting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._show(final=True)
        self._waiting.stop()
        if self._growing.is_started:
            self._growing.update("", refresh=True)
            self._growing.stop()

    def write(self, piece: str) -> None:
        """Adds a piece to the text; it is drawn now, or with the next if too little time passed."""
        self._text += printable(piece, after=self._text[-1:])
        started = time.monotonic()
        if started >= self._next:
            self._show(final=False)
            drawing = time.monotonic() - started
            self._next = started + max(_SECONDS, drawing / _SHARE)

    def _show(self, *, final: bool) -> None:
        tail = self._text[self._done :]
        if not tail.strip():
            return
        if not self._growing.is_started:
            self._waiting.stop()
            self._growing.start()
        # As markdown-it counts lines; `str.splitlines` knows further line ends.
        lines = re.findall(r"[^\n]*\n|[^\n]+", tail)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        # The next character can still change what a line begins that has no line feed yet: `#` is
        # a heading, `#1` goes on with the paragraph above.
        num_whole = len(lines) - (not lines[-1].endswith("\n"))
        spans = blocks(tail)
        ended = len(spans) if final else sum(first < num_whole for first, _ in spans[1:])
        for first, end in spans[:ended]:
            self._print(tail[starts[first] : starts[end]], keep=0)
            self._kept, self._any = 0, True
        if final:
            self._done = len(self._text)
            return
        if ended:
            self._done += starts[spans[ended][0]]
        rest = self._print(tail[starts[spans[ended][0]] :], keep=max(1, self.console.height - 3))
        self._growing.update(Group(*rest), refresh=True)

    def _print(self, block: str, *, keep: int) -> list[Text]:
        """Prints a block's lines for good but for the last `keep`, which it returns."""
        lines = [*([Text()] if self._any else []), *self._rendered(block)]
        fixed = max(self._kept, len(lines) - keep)
        for line in lines[self._kept : fixed]:
            self.console.print(line, no_wrap=True, overflow="ignore", crop=False)
        self._kept = fixed
        return lines[fixed:]

    def _rendered(self, block: str) -> list[Text]:
        return [*rendered_lines(self.console, block, self.ids)]


def rendered_lines(console: Console, text: str, ids: Collection[str] = ()) -> Iterator[Text]:
    """The lines of a Markdown text as they stand on a console, blank ones at the ends left out."""
    markdown = AnswerMarkdown(text)
    is_code = bool(markdown.parsed) and markdown.parsed[0].type in _CODE
    lines = []
    for segments in console.render_lines(markdown, pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        for start, end, cited in find_citations(line.plain, ids) if ids and not is_code else ():
            if all(name in ids for name in cited):
                line.stylize("cyan", start, end)
        lines.append(line)
    while lines and not lines[0].plain.strip():
        lines.pop(0)
    while lines and not lines[-1].plain.strip():
        lines.pop()
    yield from lines
