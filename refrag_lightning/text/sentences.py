"""Sentences by a simple rule, for rows that are one sentence each.

A sentence ends

- with a mark such as `.`, `!` or `?` and up to three closing quotes or brackets behind it, if white
  space follows;
- with `。`, `！` or `？` and what closes behind it, since Chinese and Japanese have no white space;
- at the end of a line.

A full stop ends none behind a title or an abbreviation that stands before something (`Dr.`,
`e.g.`, `Fig.`), or behind the number of a list's item (`1.`). Behind an initial (`J. K. Rowling`),
a month, a day, or an abbreviation that may stand last (`etc.`, `p.m.`, `U.S.`) it ends one where
the next word is one that begins sentences (`The`). An ellipsis or a quotation's end is none before
a small letter. White space belongs to the sentence that follows it.
"""

from __future__ import annotations

import re

import numpy as np

VERSION = 2
"""Raised when a text gets other sentences; states that are stored for sentences depend on it."""

# The bounds on what is looked at before and behind a mark keep the time linear in the text.
_CLOSING = r"""["'”’»)\]」』】）〕》〉]"""
_END = re.compile(
    rf"""(?P<mark>[.!?…।؟۔]){_CLOSING}{{0,3}}(?=\s)"""
    rf"""|[。！？｡]{_CLOSING}{{0,3}}(?![。！？｡]|{_CLOSING})"""
    r"""|\S(?=[^\S\n]*\n)"""
)
_LINE_ENDS = re.compile(r"[^\S\n]*\n")
_WORD_BEFORE = re.compile(r"[^\W_](?:[^\W_]|[.’'-]){0,19}$")
_WORD_AFTER = re.compile(r"""\s{1,8}["'“‘«(\[]{0,2}(\w{0,20})(\.?)""")
_INITIALS = re.compile(r"(?:[^\W\d_]\.){1,5}[^\W\d_]")
_ITEM = re.compile(r"\s*\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What stands before something else: no sentence ends with it.
_LEADING = _words(
    """
    mr mrs ms mx messrs mme mlle dr drs prof rev fr hon pres gov sen rep gen col lt maj capt cmdr
    sgt cpl adm brig supt det insp mt e.g i.e cf viz vs v fig figs eq eqs secs ch chap vol vols ed
    eds arts ca approx resp incl esp
    """
)
# The same where a number or a small letter follows.
_BEFORE_NUMBERS = _words("no nos p pp art sec c")
# What stands within a sentence or at its end: it ends before a word that begins one.
_EITHER = _words(
    """
    etc al jr sr ph.d b.sc m.sc inc ltd co corp bros dept univ est st ste ave blvd rd hwy ft
    """
)
_DATES = _words(
    """
    Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun
    """
)
# Words that begin sentences, and are no names.
_BEGINNINGS = _words(
    """
    A After All Also Although An And Another Any As At Because Before Both But By During Each Even
    Every For From He Her Here His How However I If In It Its Later Many Most My No Now On One Or
    Our She Since So Some Such That The Their Then There These They This Those Though To Under Until
    We What When Where Which While Who Why With You Your
    """
)


def sentence_ends(text: str) -> np.ndarray:
    """Past-last characters (N,) of a text's sentences, rising; the last is the text's end."""
    ends: list[int] = []
    start = 0
    for found in _END.finditer(text):
        if _is_end(text, start, found):
            start = found.end()
            ends.append(start)
    if ends and not text[start:].strip():
        ends.pop()  # white space at the end is no sentence
    return np.asarray([*ends, len(text)], dtype=np.int64)


def _is_end(text: str, start: int, found: re.Match[str]) -> bool:
    """Whether a sentence that began at `start` ends with what `_END` found."""
    if found["mark"] is None or _LINE_ENDS.match(text, found.end()):
        return True
    place = found.start()
    after = _WORD_AFTER.match(text, found.end())
    following, dotted = after.groups() if after else ("", "")
    continues = following[:1].islower()
    is_closed = found.end() > place + 1
    if found["mark"] != "." or text[place - 1 : place] == ".":
        # '"What?" he asked', "Wait... what".
        is_ellipsis = found["mark"] in ".…"
        return not (continues and (is_closed or is_ellipsis))
    if place - start < 16 and _ITEM.fullmatch(text, start, place):
        return False
    before = _WORD_BEFORE.search(text, max(0, place - 24), place)
    if before is None:
        return True
    word = before[0]
    # "c." is circa and "v." versus, but "C." an initial.
    name = word.lower() if len(word) > 1 else word
    if name in _LEADING:
        return False
    if name in _BEFORE_NUMBERS:
        return following[:1].isupper()
    is_initial = len(word) == 1 and word.isupper()
    if is_initial or name in _EITHER or word in _DATES or _INITIALS.fullmatch(word):
        # "J. A. Smith": an initial begins no sentence.
        return following in _BEGINNINGS and not (dotted and len(following) == 1)
    return True
