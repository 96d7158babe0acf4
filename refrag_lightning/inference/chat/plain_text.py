"""Text that a terminal shows and does not obey.

A document's title or a model's answer may hold escape sequences, which would clear the screen, set
the window's title or write over what stands there.
"""

from __future__ import annotations

import re

# Everything of C0 and C1 but the tab and the line feed; ESC and CSI are among them. A carriage
# return goes with its line feed, and would write over the line without one.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Returns `text` without control characters; tabs and line feeds stay."""
    return _CONTROL.sub("", text)


def one_line(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Returns `text` on one line of at most `limit` characters, white space made single.

    Of a longer one the start is kept, or the end, which says more of a path.
    """
    line = " ".join(printable(text).split())
    if len(line) <= limit:
        return line
    return "…" + line[1 - limit :].lstrip() if keep_end else line[: limit - 1].rstrip() + "…"
