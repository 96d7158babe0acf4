"""HTML to plain text: blocks parted by blank lines, what is no content left out."""

from __future__ import annotations

import warnings
from typing import NamedTuple

_NO_CONTENT = ["script", "style", "nav", "noscript", "template", "svg", "head", "button"]
_BLOCKS = [
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div"),
    *("dl", "dt", "fieldset", "figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5"),
    *("h6", "header", "hr", "main", "ol", "p", "pre", "section", "summary", "table", "ul"),
]
_LINES = ["li", "tr"]
_CELLS = ["td", "th"]
# Code points that Unicode keeps for such use inside a program stand for breaks for a while.
_BLOCK, _LINE, _CELL, _SPACE = _MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
_NO_MARKS = dict.fromkeys(map(ord, _MARKS))


class Parsed(NamedTuple):
    """A document's title, or "", and its plain text."""

    title: str
    text: str


def parse_html(html: str) -> Parsed:
    """Reads an HTML page or a piece of one.

    Scripts, styles, navigation, buttons and comments are left out. Headings and paragraphs become
    paragraphs, items of lists and rows of tables lines, and preformatted text keeps its own lines.

    Args:
        html: The page.

    Returns:
        The title is that of `<title>`, else of the first `<h1>`, else "".
    """
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, NavigableString

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(html.translate(_NO_MARKS), "lxml")
    heading = soup.find("title") or soup.find("h1")
    title = " ".join(heading.get_text().split()) if heading else ""
    for tag in soup.find_all(_NO_CONTENT):
        tag.decompose()
    for tag in soup.find_all("pre"):
        for text in tag.find_all(string=True):
            if type(text) is NavigableString:  # a comment is another kind
                # Its lines and spaces stay, whatever is done to white space elsewhere.
                text.replace_with(text.replace("\n", _LINE).replace(" ", _SPACE))
    for tag in soup.find_all("br"):
        tag.replace_with(_LINE)
    for names, mark in ((_BLOCKS, _BLOCK), (_LINES, _LINE)):
        for tag in soup.find_all(names):
            tag.insert_before(mark)
            tag.insert_after(mark)
    for tag in soup.find_all(_CELLS):
        tag.insert_after(_CELL)
    return Parsed(title, _put_together(soup.get_text()))


def _put_together(text: str) -> str:
    """Turns marks into line breaks; all other white space is one space."""
    blocks = []
    for block in text.split(_BLOCK):
        lines = [_line(line) for line in block.split(_LINE)]
        kept = "\n".join(line for line in lines if line.strip())
        if kept:
            blocks.append(kept)
    return "\n\n".join(blocks)


def _line(line: str) -> str:
    cells = [" ".join(cell.split()) for cell in line.split(_CELL)]
    return " | ".join(cell for cell in cells if cell).replace(_SPACE, " ").rstrip()
