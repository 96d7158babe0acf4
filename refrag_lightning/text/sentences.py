"""Sentences by a simple rule, for rows that are one sentence each.

A sentence ends with `.`, `!` or `?` and up to three closing quotes or brackets behind it, if white
space follows; and at the end of a line. So "Dr. Smith" is two sentences and "3.5" is none. White
space belongs to the sentence that follows it.
"""

from __future__ import annotations

import re

import numpy as np

# The bounds on what is looked at behind a mark keep the time linear in the text.
_END = re.compile(r"""[.!?]["'”’»)\]]{0,3}(?=\s)|\S(?=[^\S\n]*\n)""")


def sentence_ends(text: str) -> np.ndarray:
    """Past-last characters (N,) of a text's sentences, rising; the last is the text's end."""
    ends = [found.end() for found in _END.finditer(text)]
    if ends and not text[ends[-1] :].strip():
        ends.pop()  # white space at the end is no sentence
    return np.asarray([*ends, len(text)], dtype=np.int64)
