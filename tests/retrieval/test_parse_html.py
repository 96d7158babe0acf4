import sys

from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.retrieval.parse_html import parse_html
from tests.strategies import PIECES

PAGE = """<!doctype html>
<html><head><title> The
  Seine </title><style>p { color: red }</style><script>let x = "<p>no</p>";</script></head>
<body><nav><a href="/">menu</a></nav>
<h1>Seine</h1><p>It flows   through <b>Paris</b>,
and <a href="x">on</a>.</p><!-- no -->
<ul><li>one</li><li>two <em>words</em></li></ul>
<table><tr><th>river</th><th>km</th></tr><tr><td>Seine</td><td>777</td></tr></table>
<pre>def f():
    return 1<!-- no --></pre>
first<br>second &amp; last</body></html>"""


def test_a_page_becomes_paragraphs():
    parsed = parse_html(PAGE)
    assert parsed.title == "The Seine"
    assert parsed.text.split("\n\n") == [
        "Seine",
        "It flows through Paris, and on.",
        "one\ntwo words",
        "river | km\nSeine | 777",
        "def f():\n    return 1",
        "first\nsecond & last",
    ]


def test_without_a_title_the_first_heading_is_it():
    assert parse_html("<h2>No</h2><h1>Yes <i>it</i> is</h1><h1>Late</h1>").title == "Yes it is"
    assert parse_html("<p>none</p>").title == ""


def test_what_is_no_page_is_read_as_text():
    assert parse_html("just words").text == "just words"
    assert parse_html("") == ("", "")


def test_deep_nesting_is_read():
    depth = 3 * sys.getrecursionlimit()
    assert "deep" in parse_html("<div>" * 200 + "deep").text
    parse_html("<b>" * depth + "deep" + "</b>" * depth)


@given(st.lists(st.sampled_from([*PIECES, "<p>", "</p>", "<pre>", "<li>", "word"]), max_size=30))
def test_no_mark_of_the_parser_is_left(pieces):
    text = parse_html("".join(pieces) + "\ufdd0\ufdd3").text
    assert not set(text) & set("\ufdd0\ufdd1\ufdd2\ufdd3")
    assert text == text.strip("\n")
