"""Markdown that grows: what stands on the screen at the end is what stands there at once."""

import io
import re
import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from refrag_lightning.inference.chat import markdown
from refrag_lightning.inference.chat.markdown import MarkdownStream, blocks, rendered_lines
from tests.inference.chat.screens import screen

ANSWER = """# Rivers

The *Seine* flows through **Paris** [1]
#1 goes on with the paragraph.
## Further

- one [2]

- two <b>bold</b>

3. three
4. four

| a | b |
|---|---|
| 1 | two |

[1]: Rivers of France

```python
rows = states[1]
```
The end, with [a link](http://example.org).
"""

SHOWN = """Rivers

The Seine flows through Paris [1] #1 goes on with the
paragraph.

Further

 • one [2]
 • two <b>bold</b>

 3 three
 4 four

 a  b
 ──────
 1  two

[1]: Rivers of France

 rows = states[1]

The end, with a link (http://example.org)."""


@pytest.fixture
def every_piece(monkeypatch):
    """The screen is drawn at every piece, instead of some times a second."""
    monkeypatch.setattr(markdown, "_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "_SHARE", float("inf"))


def console(height=40, width=60, **options):
    return Console(
        **{"file": io.StringIO(), "force_terminal": True, "color_system": None} | options,
        width=width,
        height=height,
        legacy_windows=False,
    )


def written(pieces, **options):
    shown = console(**options)
    with MarkdownStream(shown, waiting="reading") as stream:
        for piece in pieces:
            stream.write(piece)
    return shown.file.getvalue()


def squeezed(lines):
    """Without the white space that tables and code are padded with, and blank lines at the ends."""
    return "\n".join(re.sub(r"─+", "──────", line.rstrip()) for line in lines).strip("\n")


def test_an_answer_at_once_is_as_written_by_hand():
    assert squeezed(screen(written([ANSWER]))) == SHOWN


@pytest.mark.parametrize("height", [40, 6])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, len(ANSWER) - 1), max_size=60))
def test_pieces_end_up_as_the_whole_does(every_piece, height, cuts):
    edges = [0, *sorted(set(cuts)), len(ANSWER)]
    pieces = [ANSWER[start:end] for start, end in pairwise(edges)]
    assert squeezed(screen(written(pieces, height=height))) == SHOWN


def test_a_block_taller_than_the_screen_is_there_as_a_whole(every_piece):
    items = [f"- item {number}\n" for number in range(50)]
    lines = [line for line in screen(written(items, height=10)) if line]
    assert lines == [f" • item {number}" for number in range(50)]


def test_text_is_shown_while_it_grows(every_piece):
    shown = console()
    with MarkdownStream(shown, waiting="reading") as stream:
        stream.write("The **Sei")
        assert screen(shown.file.getvalue())[0] == "The **Sei"
        stream.write("ne** flows")
    assert screen(shown.file.getvalue())[0] == "The Seine flows"


def test_no_text_leaves_no_line():
    assert "".join(screen(written([]))) == "".join(screen(written(["", "\n"]))) == ""


def test_what_came_stays_when_it_is_broken_off():
    shown = console()
    with pytest.raises(KeyboardInterrupt), MarkdownStream(shown) as stream:
        stream.write("The *Seine*")
        raise KeyboardInterrupt
    assert screen(shown.file.getvalue())[0] == "The Seine"


def test_escape_sequences_are_not_obeyed():
    # Clears the screen, sets the title, goes back to the line's start; C1's CSI.
    output = written(["a\x1b[2Jb \x1b]0;title\x07 c\rd \x9b2Je\n"])
    assert screen(output)[0] == "a[2Jb ]0;title cd 2Je"
    assert "\x1b[2J" not in output and "\x07" not in output and "\x9b" not in output


def test_citations_of_documents_are_set_off_but_not_in_code():
    shown = console(color_system="standard")

    def set_off(text, ids=("1", "2", "4")):
        return [
            line.plain[span.start : span.end]
            for line in rendered_lines(shown, text, ids)
            for span in sorted(line.spans)
            if span.style == "cyan"
        ]

    text = "[1, 2], [2][1], 【4】, [1-2]; [3], [1, 3], [12], [a], [1-4]"
    assert set_off(text) == ["[1, 2]", "[2]", "[1]", "【4】", "[1-2]"]
    assert set_off("    rows[1]") == set_off("Paris [1]", ids=()) == []


def test_blocks_are_those_of_commonmark():
    # By https://spec.commonmark.org: a heading breaks a paragraph, a fence holds blank lines, and
    # a list goes on over them.
    assert blocks("a\nb\n# c\n\n```\nd\n\ne\n```\n- f\n\n- g\n") == [
        (0, 2),
        (2, 3),
        (4, 9),
        (9, 12),
    ]


def test_a_long_answer_takes_time_in_proportion_to_its_length(every_piece):
    def seconds(count):
        start = time.process_time()
        written(["A sentence of a paragraph.\n\n"] * count)
        return time.process_time() - start

    seconds(20)
    assert seconds(400) < 6 * seconds(100) + 0.5
