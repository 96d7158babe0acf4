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
        ("Wait... what?! No.", ["Wait... what?!", " No."]),
        ("no mark at all", ["no mark at all"]),
        ("a.b c.d", ["a.b c.d"]),
        (" \n ", [" \n "]),
    ],
)
def test_hand_worked_sentences(text, expected):
    if expected is None:
        expected = ["He left (at 3.5 km/h).", " She\u2019s \u201chere.\u201d", " So"]
    assert sentences(text) == expected


@pytest.mark.parametrize(
    "parts",
    [
        ["Dr. A. B. Smith met J. K. Rowling on Jan. 5.", " It rained."],
        ["George W. Bush and J. A. Garfield won.", " J.R.R. Tolkien wrote."],
        ["See Fig. 3, e.g. the left one, i.e. No. 4 on pp. 3 of vol. 2.", " No. 5 is next."],
        ["Is it far?", " No.", " He said so.", " See p. xii of it."],
        ["The U.S. Army left the U.S. in May.", " It came back to the U.S.", " Then it left."],
        [
            "He holds a Ph.D. in law.",
            " She came at 5 p.m. on Monday.",
            " He left at 6 a.m.",
            " So.",
        ],
        ["Cats, dogs etc. are pets.", " Cats, dogs, etc.", " They are pets."],
        ["Roe v. Wade, St. Paul vs. St. Louis, Wed. Dec. 3 at 10.5.", " In 1990.", " Then 3."],
        ["1. First of all.", " 2. Second.", "\n(a) Third.", "\nIV. Fourth."],
        ["Smith et al. 2020 and Smith, Jr. say so.", " Acme Inc. is one.", " He sat.", " Bo ran."],
        ["He is at vitamin C.", " It helps.", " So am I.", " The end."],
        ['"What?" he asked.', ' "Stop!"', " She ran.", " Well\u2026 so what.", " One.)", " Two."],
        ["他说。", "你好！", "「はい。」", "よし？！", "终"],
        ["Dr.", "\nSmith"],
        ["यह है।", " वह है।", " x"],
    ],
)
def test_full_stops_that_end_no_sentence(parts):
    assert sentences("".join(parts)) == parts


@given(texts())
def test_ends_rise_to_the_texts_end(text):
    ends = sentence_ends(text).tolist()
    assert ends == sorted(set(ends))
    assert ends[-1] == len(text)


@pytest.mark.parametrize(
    "piece", [".", "!)", " ", "\n", ". ", "a\r", "A. ", "Dr. ", "。)", "1. ", ".   \r", "e.g."]
)
def test_time_is_linear(piece):
    text = "a" + piece * 200_000 + "b"
    start = time.process_time()
    sentence_ends(text)
    # A tenth of a second or so; a rule that looks far ahead would take hours.
    assert time.process_time() - start < 10
