from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given

from refrag_lightning.text.sentences import sentence_ends
from tests.strategies import texts


def sentences(text):
    return [text[start:end] for start, end in pairwise([0, *sentence_ends(text)])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("He left (at 3.5 km/h). She\u2019s \u201chere.\u201d So", None),
        ("Title\n\nA line\nmore. \n", ["Title", "\n\nA line", "\nmore. \n"]),
        ("Wait... what?! No.", ["Wait...", " what?!", " No."]),
        ("no mark at all", ["no mark at all"]),
        ("a.b c.d", ["a.b c.d"]),
        (" \n ", [" \n "]),
    ],
)
def test_hand_worked_sentences(text, expected):
    if expected is None:
        expected = ["He left (at 3.5 km/h).", " She\u2019s \u201chere.\u201d", " So"]
    assert sentences(text) == expected


@given(texts())
def test_ends_rise_to_the_texts_end(text):
    ends = sentence_ends(text).tolist()
    assert ends == sorted(set(ends))
    assert ends[-1] == len(text)


@pytest.mark.parametrize("piece", [".", "!)", " ", "\n", ". ", "a\r"])
def test_time_is_linear(piece):
    text = "a" + piece * 200_000 + "b"
    start = time.perf_counter()
    sentence_ends(text)
    # A tenth of a second or so; a rule that looks far ahead would take hours.
    assert time.perf_counter() - start < 10
