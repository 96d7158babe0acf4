"""Markdown to plain text: what a reader sees, with headings, lists and code in their places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from refrag_lightning.retrieval.parse_html import Parsed, parse_html

if TYPE_CHECKING:
    from markdown_it.token import Token

_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE = re.compile(r"^title:(.*)$", re.MULTILINE)


def parse_markdown(text: str) -> Parsed:
    """Reads CommonMark with tables.

    Headings become paragraphs, links their words and images their descriptions. HTML inside is read
    as such, and front matter is left out.

    Args:
        text: The Markdown.

    Returns:
        The title is the front matter's, else the first heading of the first level, else "".
    """
    from markdown_it import MarkdownIt

    title = ""
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if named := _TITLE.search(front[1]):
            title = named[1].strip().strip("'\"")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    if not title:
        title = next(
            (
                " ".join(_inline(tokens[place + 1]).split())
                for place, token in enumerate(tokens)
                if token.type == "heading_open" and token.tag == "h1"
            ),
            "",
        )
    return Parsed(title, "\n\n".join(_blocks(tokens)))


def _blocks(tokens: Sequence[Token]) -> Iterator[str]:
    """Paragraphs, and lists and tables as one paragraph each."""
    lines: list[str] = []  # of the list or table that is open
    cells: list[str] = []
    numbers: list[int | None] = []  # of each list within another, the next item's; None for bullets
    mark, in_table = "", False
    for token in tokens:
        text = ""
        if token.type in ("bullet_list_open", "ordered_list_open"):
            ordered = token.type == "ordered_list_open"
            numbers.append(int(token.attrs.get("start", 1)) if ordered else None)
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            numbers.pop()
            mark = ""
        elif token.type == "list_item_open":
            number = numbers[-1]
            mark = "- " if number is None else f"{number}. "
            if number is not None:
                numbers[-1] = number + 1
        elif token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
        elif token.type == "tr_close":
            lines.append(" | ".join(cells))
            cells = []
        elif token.type == "inline":
            text = _inline(token)
        elif token.type in ("fence", "code_block"):
            text = token.content.strip("\n")
        elif token.type == "html_block":
            text = parse_html(token.content).text

        if in_table:
            if token.type == "inline":
                cells.append(text)
        elif numbers:
            if text:
                indent = "  " * (len(numbers) - 1)
                # What follows an item's first paragraph stands under it.
                first, rest = indent + mark, indent + " " * max(2, len(mark))
                lines += [
                    (rest if place or not mark else first) + line
                    for place, line in enumerate(text.split("\n"))
                ]
                mark = ""
        elif text.strip() or lines:
            if lines:
                yield "\n".join(lines)
                lines = []
            if text.strip():
                yield text
    if lines:
        yield "\n".join(lines)


def _inline(token: Token) -> str:
    """The words of a paragraph or heading."""
    words = []
    for child in token.children or ():
        if child.type in ("text", "code_inline"):
            words.append(child.content)
        elif child.type == "softbreak":
            words.append(" ")
        elif child.type == "hardbreak":
            words.append("\n")
        elif child.type == "image":
            words.append(child.content)
    return "".join(words).strip()
