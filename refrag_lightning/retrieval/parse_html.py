"""HTML to plain text: blocks parted by blank lines, what is no content left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

_NO_CONTENT = {"script", "style", "nav", "noscript", "template", "svg", "head", "button"}
_BLOCKS = [
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div"),
    *("dl", "dt", "fieldset", "figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5"),
    *("h6", "header", "hr", "main", "ol", "p", "pre", "section", "summary", "table", "ul"),
]
_LINES = ("li", "tr")
_CELLS = ("td", "th")
# Code points that Unicode keeps for such use inside a program stand for breaks for a while.
_BLOCK, _LINE, _CELL, _SPACE = _MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
_NO_MARKS = dict.fromkeys(map(ord, _MARKS))
# What stands before and behind an element.
_AROUND = dict.fromkeys(_BLOCKS, _BLOCK) | dict.fromkeys(_LINES, _LINE)
# Elements within another up to which a page keeps its structure; browsers stop at 512.
_DEPTH, _PIECE = 128, 1024


class Parsed(NamedTuple):
    """A document's title, or "", and its plain text."""

    title: str
    text: str


def parse_html(html: str) -> Parsed:
    """Reads an HTML page or a piece of one, in time linear in its length whatever it holds.

    Scripts, styles, navigation, buttons and comments are left out. Headings and paragraphs become
    paragraphs, items of lists and rows of tables lines, and preformatted text keeps its own lines.

    Args:
        html: The page.

    Returns:
        The title is that of `<title>`, else of the first `<h1>`, else "".
    """
    from lxml.etree import HTMLParser

    reader = _Reader()
    # No tree: libxml2 calls the reader as it goes. In a tree each tag would be looked up among its
    # siblings whenever something is put beside it.
    parser = HTMLParser(target=reader)
    for piece in _pieces(html.translate(_NO_MARKS) or " "):
        parser.feed(piece)
        if len(reader.open) > _DEPTH and reader.open[-1] not in ("script", "style"):
            # libxml2 looks through all open elements at every end tag that has no start.
            kept = [tag for tag in dict.fromkeys(reader.open) if tag in _NO_CONTENT or tag == "pre"]
            parser.close()
            parser = HTMLParser(target=reader)
            parser.feed(" " + "".join(f"<{tag}>" for tag in kept))
    parser.close()
    heading = reader.headings.get("title", reader.headings.get("h1", []))
    return Parsed(" ".join("".join(heading).split()), _put_together("".join(reader.pieces)))


def _pieces(html: str) -> Iterator[str]:
    """Cuts a page before tags, every so many characters."""
    start = 0
    while start < len(html):
        end = html.find("<", start + _PIECE)
        yield html[start : end if end > 0 else len(html)]
        start = end if end > 0 else len(html)


class _Reader:
    """Collects a page's text with marks, its first title and its first `<h1>`.

    `start`, `end`, `data` and `close` are what lxml calls; every start has its end.
    """

    def __init__(self) -> None:
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.headings: dict[str, list[str]] = {}
        self._heading = ""  # the one that is open
        self._within = 0  # elements without content that were open when it began
        self._left_out = 0  # those that are open now
        self._preformatted = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """An element begins."""
        self.open.append(tag)
        if tag in _NO_CONTENT:
            self._left_out += 1
        elif tag in ("title", "h1") and tag not in self.headings:
            self._heading, self._within = tag, self._left_out
            self.headings[tag] = []
        elif tag == "pre":
            self._preformatted += 1
        self._mark(_LINE if tag == "br" else _AROUND.get(tag, ""))

    def end(self, tag: str) -> None:
        """An element ends."""
        self.open.pop()
        self._mark(_CELL if tag in _CELLS else _AROUND.get(tag, ""))
        if tag in _NO_CONTENT:
            self._left_out -= 1
        elif tag == self._heading:
            self._heading = ""
        elif tag == "pre":
            self._preformatted -= 1

    def data(self, text: str) -> None:
        """A piece of text, its entities replaced."""
        if self._heading and self._left_out == self._within:
            self.headings[self._heading].append(text)
        if self._preformatted:
            # Its lines and spaces stay, whatever is done to white space elsewhere.
            text = text.replace("\n", _LINE).replace(" ", _SPACE)
        self._mark(text)

    def close(self) -> None:
        """The page ends."""

    def _mark(self, piece: str) -> None:
        if piece and not self._left_out:
            self.pieces.append(piece)


def _put_together(text: str) -> str:
    """Turns marks into line breaks; all other white space is one space."""
    blocks = []
    for block in text.split(_BLOCK):
        if not block:
            continue
        lines = [_line(line) for line in block.split(_LINE)]
        kept = "\n".join(line for line in lines if line.strip())
        if kept:
            blocks.append(kept)
    return "\n\n".join(blocks)


def _line(line: str) -> str:
    cells = [" ".join(cell.split()) for cell in line.split(_CELL)]
    return " | ".join(cell for cell in cells if cell).replace(_SPACE, " ").rstrip()
