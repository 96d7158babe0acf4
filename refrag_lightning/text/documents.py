"""Documents in a prompt: `<doc id="7" title="Rivers">…</doc>` to and from `Document`.

`parse` walks once over the tags of a text, so its time is linear in the text's length whatever the
text is. `format` is its inverse: `parse(format(parts)) == parts`. Only what could be read as a tag
is escaped (`<doc` becomes `&lt;doc`, a literal `&lt;doc` becomes `&amp;lt;doc`), so ordinary text,
HTML and ampersands pass through as they are. `find_citations` finds where an answer cites them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

# `<doc` and `</doc` count as tags only where white space, `>` or the end follows: `<docs>` is text.
_TAG = re.compile(r"<(/?)doc(?=[\s>]|\Z)")
_ATTRIBUTE = re.compile(
    r"""\s+([A-Za-z_][\w.:-]*)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'=<>`]+)))?"""
)
_TAG_END = re.compile(r"\s*>")
_NAME = re.compile(r"[A-Za-z_][\w.:-]*\Z")

_TAG_LIKE = re.compile(r"<(?=/?doc)")
_ESCAPED_TAG = re.compile(r"&lt;(?=/?doc)")
_ESCAPE_LIKE = re.compile(r"&(?=(?:amp;)*lt;/?doc)")
_ESCAPED_ESCAPE = re.compile(r"&amp;(?=(?:amp;)*lt;/?doc)")
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))

# What stands in code is no citation: `x[1]` is an index there.
_CODE = re.compile(r"(`{3,}|~{3,})[\s\S]*?(?:\1|\Z)|(`+)[^\n]*?\2")
# The CJK brackets are what models write that were trained to cite web pages: 【1†source】.
_CLOSING = {"[": "]", "【": "】", "［": "］"}
_OPENING = re.compile(r"[\[【［]")
_ITEM = re.compile(r"[^\[\]【】［］,;，；、†\n]*")
_ITEM_END = re.compile(r"[^\S\n]*(?:†[^\[\]【】［］,;，；、\n]*)?([\]】］,;，；、])")
_SPACES = re.compile(r"[^\S\n]*")
_NUMBER_RANGE = re.compile(r"(\d{1,6})\s*[-\u2010-\u2015\u2212~～]\s*(\d{1,6})")
_LONGEST_RANGE = 1000


class DocumentSyntaxError(ValueError):
    """A `<doc>` tag that is unclosed, nested, stray or malformed.

    Attributes:
        line: Line of the tag in the text, from 1.
        column: Column of the tag in its line, from 1.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        self.line = text.count("\n", 0, position) + 1
        self.column = position - (text.rfind("\n", 0, position) + 1) + 1
        super().__init__(f"{message} at line {self.line}, column {self.column}")


@dataclass(frozen=True)
class Document:
    """A document that stands in a prompt.

    Attributes:
        text: The document's text, white space kept.
        id: What an answer cites. Where it is empty, the document's position in its text (from 1)
            takes its place, in `parse` as in `format`.
        title: The document's title, or "".
        attributes: Every other attribute of the tag.
    """

    text: str
    id: str = ""
    title: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)


Part = str | Document


def escape(text: str) -> str:
    """Returns `text` with everything that could be read as a `<doc>` or `</doc>` tag escaped."""
    return _TAG_LIKE.sub("&lt;", _ESCAPE_LIKE.sub("&amp;", text))


def unescape(text: str) -> str:
    """Returns the text that `escape` was given."""
    return _ESCAPED_ESCAPE.sub("&", _ESCAPED_TAG.sub("<", text))


def parse(text: str, *, strict: bool = True, first_number: int = 1) -> list[Part]:
    """Splits a text into plain strings and documents, in order.

    Attributes may come in any order with double, single or no quotes. A document without an id
    gets its position among the text's documents, from 1.

    Args:
        text: The text; white space inside and outside documents is kept.
        strict: Whether a broken tag is an error. Otherwise it is kept as text: of nested opening
            tags the innermost one opens the document.
        first_number: The number that stands for the first document's id, if it has none.

    Returns:
        Strings (never empty, never two in a row) and documents.

    Raises:
        DocumentSyntaxError: If `strict` and a tag is unclosed, nested, stray or malformed.
    """
    parts: list[Part] = []
    done = 0  # everything before this position is in `parts`
    opening: tuple[int, int, dict[str, str]] | None = None
    number = first_number
    for tag, following in pairwise(chain(_TAG.finditer(text), [None])):
        assert tag is not None
        read = _read_tag(text, tag, following.start() if following else len(text))
        if isinstance(read, str):
            if strict:
                raise DocumentSyntaxError(read, text, tag.start())
            continue
        end, attributes = read
        if not tag[1]:
            if opening is not None and strict:
                message = "<doc> inside a document that is not closed"
                raise DocumentSyntaxError(message, text, tag.start())
            opening = (tag.start(), end, attributes)
            continue
        if opening is None:
            if strict:
                raise DocumentSyntaxError("stray </doc>", text, tag.start())
            continue
        start, body, attributes = opening
        opening = None
        if start > done:
            parts.append(unescape(text[done:start]))
        name = attributes.pop("id", "") or str(number)
        number += 1
        title = attributes.pop("title", "")
        parts.append(Document(unescape(text[body : tag.start()]), name, title, attributes))
        done = end
    if opening is not None and strict:
        raise DocumentSyntaxError("<doc> is never closed", text, opening[0])
    if done < len(text):
        parts.append(unescape(text[done:]))
    return parts


def format(parts: Iterable[Part]) -> str:
    """Writes strings and documents as one text, such that `parse` gives them back.

    Raises:
        ValueError: If an attribute's name is not a name, or is `id` or `title`.
    """
    pieces = []
    num_documents = 0
    for part in parts:
        if isinstance(part, str):
            pieces.append(escape(part))
            continue
        num_documents += 1
        attributes = {"id": part.id or str(num_documents)}
        if part.title:
            attributes["title"] = part.title
        for name in part.attributes:
            if not _NAME.match(name) or name in ("id", "title"):
                raise ValueError(f"{name!r} cannot be the name of a document's extra attribute")
        attributes.update(part.attributes)
        tag = "".join(f' {name}="{_quote(value)}"' for name, value in attributes.items())
        pieces.append(f"<doc{tag}>{escape(part.text)}</doc>")
    return "".join(pieces)


class Mention(NamedTuple):
    """Brackets in an answer that cite documents.

    Attributes:
        start: First character of the brackets.
        end: One past their last character.
        ids: What they cite, each once, in order: ids of documents, and numbers that no document
            has.
    """

    start: int
    end: int
    ids: tuple[str, ...]


def find_citations(answer: str, ids: Collection[str]) -> list[Mention]:
    """Finds where an answer cites documents.

    Citations are `[7]`, `[1, 3]`, `[1; 3]`, `[1][2]`, a range of numbers such as `[1-3]`, and the
    same in CJK brackets (`【1】`, `【1†source】`). Ids may hold anything, brackets and commas too;
    the longest id that fits is meant. Brackets hold citations if one of their ids is a document's,
    or if all of them are numbers. Brackets in code hold none.

    Args:
        answer: What the model wrote.
        ids: Ids of the documents that it was shown.
    """
    known = {name.strip(): name for name in ids if name.strip()}
    longest_first = sorted(known, key=len, reverse=True)
    # Code becomes as many spaces, so that places stay.
    text = _CODE.sub(lambda code: " " * len(code[0]), answer)
    mentions: list[Mention] = []
    done = 0
    for opening in _OPENING.finditer(text):
        start = opening.start()
        read = _read_brackets(text, opening, longest_first) if start >= done else None
        if read is None:
            continue
        end, items = read
        meant = [[known[item]] if item in known else _numbers(item) for item in items]
        if not items or (None in meant and not any(item in known for item in items)):
            continue
        done = end
        if text[start - 1 : start] == "[" and text[end : end + 1] == "]":
            start, end = start - 1, end + 1  # [[1]]
        cited = [
            name
            for item, names in zip(items, meant, strict=True)
            for name in ([item] if names is None else names)
        ]
        mentions.append(Mention(start, end, tuple(dict.fromkeys(cited))))
    return mentions


def _read_brackets(
    text: str, opening: re.Match[str], longest_first: Sequence[str]
) -> tuple[int, list[str]] | None:
    """Where brackets end and the items in them; None where they do not close on their line."""
    items: list[str] = []
    place = opening.end()
    while True:
        place = _SPACES.match(text, place).end()  # type: ignore[union-attr]
        end = None
        for item in longest_first:
            if text.startswith(item, place):
                end = _ITEM_END.match(text, place + len(item))
                if end is not None:
                    break
        else:
            plain = _ITEM.match(text, place)
            assert plain is not None  # an empty one fits anywhere
            item = plain[0].rstrip()
            end = _ITEM_END.match(text, plain.end())
        if end is None:
            return None
        if item:
            items.append(item)
        place = end.end()
        if end[1] == _CLOSING[opening[0]]:
            return place, items
        if end[1] in _CLOSING.values():
            return None


def _numbers(item: str) -> list[str] | None:
    """The numbers that a number or a range of numbers stands for; None for anything else."""
    if item.isdecimal():
        # Full-width digits, as they stand in Chinese and Japanese text, name the same documents.
        return ["".join(str(int(digit)) for digit in item)]
    found = _NUMBER_RANGE.fullmatch(item)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _LONGEST_RANGE:
        return None
    # [01-03] names the documents 01, 02 and 03, as [01] does.
    return [str(number).zfill(len(found[1])) for number in range(first, last + 1)]


def _quote(value: str) -> str:
    for entity in ("&amp;", "&lt;", "&gt;", "&quot;"):
        value = value.replace(_ENTITIES[entity], entity)
    return value


def _read_tag(text: str, tag: re.Match[str], limit: int) -> tuple[int, dict[str, str]] | str:
    """Reads a tag's attributes up to its `>`, and no further than the next tag at `limit`.

    Returns:
        The position after the tag and its attributes, or what is wrong with it. Not an exception:
        finding a line number takes linear time, which a text of broken tags would take for each.
    """
    position = tag.end()
    attributes: dict[str, str] = {}
    while not tag[1] and (match := _ATTRIBUTE.match(text, position, limit)):
        name = match[1]
        if name in attributes:
            return f"<doc> has {name!r} twice"
        value = next((group for group in match.groups()[1:] if group is not None), "")
        attributes[name] = _ENTITY.sub(lambda entity: _ENTITIES[entity[0]], value)
        position = match.end()
    close = _TAG_END.match(text, position, limit)
    if close is None:
        return f"malformed <{tag[1]}doc> tag"
    return close.end(), attributes
