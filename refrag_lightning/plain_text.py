"""Text of others, made fit for a terminal and for Markdown files.

A document's title, a model's answer or a file's name may hold escape sequences, which clear the
screen, set the window's title or fill the clipboard, and characters that nobody sees, which turn
text around or hide some of it. All that the package prints goes through `say` or, where rich draws
it, through `printable`; data for other programs is JSON by `as_json`, which loses nothing.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# All of C0 and C1 but the tab and the line feed (a carriage return writes over its line), and
# what Unicode calls default ignorable: marks of direction, zero widths, fillers, tags.
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u17b4\u17b5\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# Some that nobody sees belong to writing: joiners to Persian, Hindi and emoji, selectors of a
# variant to Mongolian, to emoji and to names in Japanese.
_JOINERS = "\u034f\u180e\u200c\u200d"
_SELECTORS = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
_JOINED = ("Lo", "Lm", "Mn", "Mc", "So", "Sk")  # Unicode's categories of what a joiner follows
_RUN = re.compile(f"[{_UNSEEN}{_JOINERS}{_SELECTORS}]+")
_SELECTOR, _JOINER = re.compile(f"[{_SELECTORS}]"), re.compile(f"[{_JOINERS}]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_JSON = re.compile(f"[{_UNSEEN}{_JOINERS}{_SELECTORS}\u2028\u2029\ud800-\udfff]")


def printable(text: str, *, after: str = "") -> str:
    """Returns `text` without control characters and others that nobody sees.

    Tabs and line feeds stay. So do a joiner after a letter without case, a mark or a symbol, and
    one selector of a variant after any character. Half a character, as of a file name that is not
    UTF-8, becomes U+FFFD.

    Args:
        text: The text.
        after: What was shown before it, where it is the next piece of a text; its end counts.
    """

    def kept(run: re.Match[str]) -> str:
        before = text[run.start() - 1] if run.start() else after[-1:]
        if not before.isprintable() or before in ("", " "):
            return ""
        # The piece before may have ended with a selector.
        found = None if _SELECTOR.match(before) else _SELECTOR.search(run[0])
        selector = found[0] if found else ""
        joins = before > "\x7f" and unicodedata.category(before) in _JOINED
        joiner = _JOINER.search(run[0]) if joins and not _JOINER.match(before) else None
        return selector + (joiner[0] if joiner else "")

    return _SURROGATE.sub("\ufffd", _RUN.sub(kept, text))


def one_line(text: str, limit: int | None = None, *, keep_end: bool = False) -> str:
    """Returns `text` on one line, white space made single.

    Of one that is longer than `limit` characters the start is kept, or the end, which says more of
    a path.
    """
    line = " ".join(printable(" ".join(text.split())).split())
    if limit is None or len(line) <= limit:
        return line
    return "…" + line[1 - limit :].lstrip() if keep_end else line[: limit - 1].rstrip() + "…"


def say(
    text: object = "",
    *,
    file: TextIO | None = None,
    end: str = "\n",
    flush: bool = False,
    after: str = "",
) -> None:
    """Prints what is `printable` of a text; the arguments are those of `print` and `printable`."""
    print(printable(str(text), after=after), file=file, end=end, flush=flush)


def as_json(value: Any, **options: Any) -> str:
    """Writes a value as JSON that a terminal can show: what `printable` may leave out is escaped.

    Args:
        value: The value.
        **options: Of `json.dumps`, such as `indent`.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return _NOT_IN_JSON.sub(lambda found: json.dumps(found[0])[1:-1], text)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Has warnings and log records, also those of other packages, be `printable` meanwhile."""
    show, make = warnings.showwarning, logging.getLogRecordFactory()

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        plain = printable(str(message))
        show(message if plain == str(message) else plain, category, filename, lineno, file, line)

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # the handler tells whose call it was
            return record
        if (plain := printable(message)) != message:
            record.msg, record.args = plain, None
        return record

    warnings.showwarning = shown
    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        if warnings.showwarning is shown:
            warnings.showwarning = show


# ---- Markdown --------------------------------------------------------------------------------

# What begins something in Markdown or HTML wherever it stands; an underscore within a word and an
# ampersand or `<` on its own do not.
_INLINE = re.compile(
    r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|<(?=[a-zA-Z/!?])|&(?=#?\w+;)", re.ASCII
)
_BLOCK = re.compile(r"[#>=]|[+-](?!\d)|\d{1,9}(?=[.)])")


def literal_markdown(text: str) -> str:
    """Returns Markdown that shows `text` as it is, on one line: for headings, cells and items."""
    line = _INLINE.sub(lambda found: "\\" + found[0], one_line(text))
    if begins := _BLOCK.match(line):
        place = begins.end() if line[0].isdigit() else 0
        line = f"{line[:place]}\\{line[place:]}"
    return line


def code_markdown(text: str) -> str:
    """Returns Markdown that shows `text` as code, on one line; a table needs its `|` escaped."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    marks = "`" * (longest + 1)
    pad = " " if longest and (line[0] == "`" or line[-1] == "`") else ""
    return f"{marks}{pad}{line}{pad}{marks}"
