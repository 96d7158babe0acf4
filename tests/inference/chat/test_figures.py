"""A trace in words, on numbers that are made up."""

from collections import Counter
from types import SimpleNamespace

import pytest

from refrag_lightning.inference.chat import figures
from refrag_lightning.inference.trace import Seconds


def trace(*states, **values):
    documents = [SimpleNamespace(states=Counter(state)) for state in states]
    given = {
        "documents": documents,
        "positions": 1164,
        "positions_as_text": 8024,
        "seconds": Seconds(search=0.02, lookup=0.0004, prefill=0.18, first_token=0.214),
        "tokens_a_second": 31.06,
    }
    return SimpleNamespace(**given | values)


def test_the_summary_says_what_was_read_and_how_fast():
    documents = [{"vector": 12}, {"vector": 1, "tokens": 3, "empty": 1}]
    assert figures.summary(trace(*documents)) == (
        "2 documents, 13 rows as vectors and 3 as text · 1,164 positions instead of 8,024"
        " · first token 0.21 s · 31.1 tokens/s"
    )
    bare = trace(positions=24, positions_as_text=24, tokens_a_second=0.0)
    assert figures.summary(bare) == "no documents · 24 positions · first token 0.21 s"


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([{"vector": 1}], "1 document, 1 row as a vector"),
        ([{"tokens": 1}, {"tokens": 1}], "2 documents as text"),
        ([{"empty": 1}], "1 document as text"),
    ],
)
def test_what_documents_stand_as(states, words):
    assert figures.documents(trace(*states)) == words


def test_times_name_the_parts_that_count():
    assert figures.times(trace()) == "0.21 s (search 20 ms, reading it 0.18 s)"
    assert figures.times(trace(seconds=Seconds(first_token=0.0004))) == "0.4 ms"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 ms"),
        (0.00094, "0.9 ms"),
        (0.00095, "1 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (9.996, "10 s"),
        (74.2, "74 s"),
    ],
)
def test_durations(seconds, words):
    assert figures.duration(seconds) == words
