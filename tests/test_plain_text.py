"""What of a text goes to a terminal, into JSON and into Markdown."""

import ast
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from refrag_lightning.plain_text import (
    as_json,
    code_markdown,
    literal_markdown,
    one_line,
    printable,
)
from tests.untrusted import PROBES, harmful

PACKAGE = Path(__file__).parents[1] / "refrag_lightning"


@given(st.text())
def test_what_is_seen_stays_and_controls_go(text):
    # Unicode's own categories are the reference: letters, numbers, punctuation, symbols, spaces.
    # Of the letters, two fillers of Korean show nothing.
    def seen(characters):
        kinds = ((c, unicodedata.category(c)[0]) for c in characters)
        return [c for c, kind in kinds if kind in "LNPSZ" and c not in "\u3164\uffa0\ufffd"]

    kept = printable(text)
    assert seen(kept) == seen(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n" for c in kept)


@pytest.mark.parametrize("probe", PROBES.values(), ids=list(PROBES))
def test_no_probe_is_left(probe):
    for text in (probe, f"a{probe}b", f"\u05d0{probe}\u05d0"):
        assert not harmful(printable(text)) and not harmful(one_line(text))
        assert not harmful(as_json({"x": text})) and json.loads(as_json({"x": text}))["x"] == text
        assert not harmful(literal_markdown(text)) and not harmful(code_markdown(text))


@pytest.mark.parametrize(
    "text",
    [
        "Ünïcödé, naïve, Ελληνικά, русский",
        "مرحبا بالعالم",
        "می\u200cخواهم",
        "שלום עולם",
        "क\u094d\u200dष",
        "日本語 葛\U000e0100城",
        "한국어",
        "ภาษาไทย",
        "👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 1\ufe0f⃣ 👍🏽",
        "e\u0301 \t x\n",
    ],
)
def test_text_of_every_language_stays_also_in_pieces(text):
    assert printable(text) == text
    pieces = [printable(c, after=text[:place]) for place, c in enumerate(text)]
    assert "".join(pieces) == text


def test_what_hides_in_text_goes():
    assert printable("pay\u200dpal") == "paypal"
    assert printable("a\ufe01\ufe02\ufe03") == "a\ufe01"
    assert printable("क\u200d\u200d\u200d") == "क\u200d"
    assert printable("caf\udce9.txt") == "caf\ufffd.txt"


@given(st.text(), st.integers(2, 30), st.booleans())
def test_one_line_is_short_and_one_line(text, limit, keep_end):
    line = one_line(text, limit, keep_end=keep_end)
    assert len(line) <= limit and line.splitlines() in ([], [line])


def test_what_does_not_fit_is_marked():
    assert one_line("a  river\nof France", 40) == "a river of France"
    assert one_line("a river of France", 9) == "a river…"
    assert one_line("/data/rivers.md", 10, keep_end=True) == "…rivers.md"


MARKDOWN = [
    "<script>alert(1)</script>", "![x](http://evil/?a)", "[x](javascript:a)", "`code`", "*b* _i_",
    "# h", "- x", "1. x", "> q", "| a | b |", "a\\", "&lt;b&gt;", "x\n\n# y", "~~s~~", "``` ``",
    "a_b * c < d & e", "[1]: http://x", "===", "-1", "<!-- x", "http://x_y_z",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKDOWN)
@pytest.mark.parametrize("place", ["# {}", "- {}", "| a | b |\n|---|---|\n| {} | c |", "x\n{}"])
def test_markdown_shows_a_text_as_it_is(text, place):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    literal = parser.parse(place.format(literal_markdown(text)))
    inner = [child for token in literal for child in token.children or ()]
    assert {token.type for token in inner} <= {"text", "softbreak", "text_special"}
    shown = "".join(token.content or " " for token in inner)
    assert " ".join(text.split()) in " ".join(shown.split())
    if "|" not in place:
        code = parser.parse("- " + code_markdown(text))
        inner = [child for token in code for child in token.children or ()]
        assert [token.content for token in inner] == [" ".join(text.split())]


def test_everything_printed_goes_through_the_filter():
    allowed = {"plain_text.py", "launch/bootstrap.py"}  # the latter runs without the package
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]:
        if str(path.relative_to(PACKAGE.parent)).removeprefix("refrag_lightning/") in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_print = isinstance(node, ast.Name) and node.id == "print"
            assert not is_print, f"{path}:{node.lineno} prints without the filter"
