import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.retrieval.parse_markdown import parse_markdown
from tests.strategies import PIECES

PAGE = """---
title: "Rivers: a list"
tags: [x]
---
# The *Seine*

It flows through [Paris](https://x.org) and `on`,
softly. ![A map](map.png)

- one
  more

  second paragraph
- two
    1. deep
    2. deeper

After it

| river | km |
|-------|----|
| Seine | 777 |

```py
def f():
    return 1
```
<div>some <b>HTML</b></div>
"""


def test_a_page_becomes_paragraphs():
    parsed = parse_markdown(PAGE)
    assert parsed.title == "Rivers: a list"
    assert parsed.text.split("\n\n") == [
        "The Seine",
        "It flows through Paris and on, softly. A map",
        "- one more\n  second paragraph\n- two\n  1. deep\n  2. deeper",
        "After it",
        "river | km\nSeine | 777",
        "def f():\n    return 1",
        "some HTML",
    ]


def test_the_title_is_the_first_heading_of_the_first_level():
    assert parse_markdown("## No\n\ntext\n\nThe  *title*\n===\n\n# Late").title == "The title"
    assert parse_markdown("## No\n").title == ""


def test_a_rule_at_the_beginning_is_no_front_matter():
    assert parse_markdown("---\n\nSome words\n\n***\n\nmore").text == "Some words\n\nmore"


def test_a_list_that_starts_elsewhere_keeps_its_numbers():
    assert parse_markdown("7. seven\n8. eight").text == "7. seven\n8. eight"


@given(
    st.lists(st.sampled_from([*PIECES, "# ", "- ", "1. ", "> ", "|", "```", "---"]), max_size=30)
)
def test_whatever_is_read_gives_text(pieces):
    parsed = parse_markdown("".join(pieces))
    assert isinstance(parsed.text, str) and isinstance(parsed.title, str)


def test_words_are_neither_lost_nor_doubled():
    words = [f"w{number}" for number in range(40)]
    page = (
        "# {}\n\n{} *{}* `{}`\n\n> {}\n> {}\n\n* {}\n  * {}\n\n    {}\n\n{}\n---\n\n"
        "| {} | {} |\n|---|---|\n| {} | {} |\n\n    {}\n\n<p>{} <i>{}</i></p>\n"
    ).format(*words)
    assert (
        parse_markdown(page).text.replace("|", " ").replace("-", " ").replace("*", " ").split()
        == words[:17]
    )


HOSTILE = {
    "quotations": "> ", "items": "- ", "brackets": "[", "images": "![", "emphasis": "*a **b ",
    "tags": "<a ", "comments": "a <!--", "backslashes": "\\", "ampersands": "&", "links": "[a](",
    "targets": "[a]: b\n", "HTML": "<p>\n\n", "tables": "|a", "headings": "# h\n", "ends": "]",
    "fences": "~~~\n", "lines": "a line of words\n",
}  # fmt: skip


def cost(page):
    """The least processor time of three readings, in seconds."""
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        parse_markdown(page)
        seconds.append(time.process_time() - begun)
    return min(seconds)


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=list(HOSTILE))
def test_time_is_linear_whatever_the_page(unit):
    # Four times the page takes four times as long; sixteen times where it is quadratic.
    short, long = (unit * (size // len(unit)) for size in (5_000, 20_000))
    assert cost(long) < 9 * cost(short) + 0.02


def test_a_title_of_white_space_takes_no_time():
    page = "---\ntitle: x" + " " * 100_000 + "y\n---\nText"
    assert cost(page) < 1 and parse_markdown(page).text == "Text"
    assert parse_markdown("---\ntitle:  'A b'  \n---\nText").title == "A b"
