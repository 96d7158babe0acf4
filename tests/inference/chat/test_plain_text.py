"""Nothing that a terminal would obey is left in a text."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.inference.chat.plain_text import one_line, printable


@given(st.text())
def test_no_control_character_is_left_and_nothing_else_is_lost(text):
    # Unicode's own category of control characters is the reference.
    kept = [c for c in text if unicodedata.category(c) != "Cc" or c in "\t\n"]
    assert printable(text) == "".join(kept)


@given(st.text(), st.integers(2, 30), st.booleans())
def test_one_line_is_short_and_one_line(text, limit, keep_end):
    line = one_line(text, limit, keep_end=keep_end)
    assert len(line) <= limit and line.splitlines() in ([], [line])


def test_what_does_not_fit_is_marked():
    assert one_line("a  river\nof France", 40) == "a river of France"
    assert one_line("a river of France", 9) == "a river…"
    assert one_line("/data/rivers.md", 10, keep_end=True) == "…rivers.md"
