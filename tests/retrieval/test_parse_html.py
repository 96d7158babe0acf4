import sys
import time

import pytest
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


def test_a_deep_page_keeps_its_words_and_what_is_left_out():
    left_out = f"<nav>{'<b>' * 2000}menu</nav><script>{'x < y;' * 999}</script>"
    page = f"{'<div>' * 2000}<p>one</p>{left_out}<pre>a  b\n c</pre>"
    assert parse_html(page).text.split("\n\n") == ["one", "a  b\n c"]
    words = " ".join(f"w{number}" for number in range(5000))
    assert parse_html("<b>" * 5000 + words.replace(" ", " <i>")).text.split() == words.split()


HOSTILE = {
    "unclosed": "<p>", "deep": "<div>", "inline": "<b>", "items": "<li>", "breaks": "<br>",
    "cells": "<table><tr><td>", "tables": "<table>", "preformatted": "<pre>a b\n", "head": "<h1>a",
    "left out": "<nav>a", "less": "<", "entities": "&amp;&#x41;", "ampersands": "&",
    "comments": "<!--x-->", "half comments": "<!--", "ends": "</b>",
    "scripts": "<script>x</script>", "choices": "<select><option>", "both": "<div></b>",
    "body": "<div><body>", "p": "<b></p>",
}  # fmt: skip


def cost(page):
    """The least processor time of three readings, in seconds."""
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        parse_html(page)
        seconds.append(time.process_time() - begun)
    return min(seconds)


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=list(HOSTILE))
def test_time_is_linear_whatever_the_page(unit):
    # Four times the page takes four times as long; sixteen times where it is quadratic.
    short, long = (unit * (size // len(unit)) for size in (25_000, 100_000))
    assert cost(long) < 8 * cost(short) + 0.02


@pytest.mark.parametrize("first, then", [("<div>", "</b>"), ("<b>", "</p>"), ("<div>", "<body>")])
def test_ends_without_a_start_in_a_deep_page(first, then):
    pages = [first * (size // 10) + then * (size // 10) for size in (25_000, 100_000)]
    assert cost(pages[1]) < 8 * cost(pages[0]) + 0.02


def test_a_giant_attribute_and_many_attributes():
    def page(size):
        many = " ".join(f"a{number}=1" for number in range(size // 9))
        return f'<p a="{"x" * size}" {many}>hi</p><script>{"<" * size}'

    assert parse_html(page(100_000)).text == "hi"
    assert cost(page(100_000)) < 8 * cost(page(25_000)) + 0.02
