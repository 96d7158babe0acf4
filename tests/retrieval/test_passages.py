import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.retrieval.passages import PassageSplitter
from refrag_lightning.retrieval.sources import SourceDocument
from tests.strategies import PIECES, PYDOC

TEXTS = st.one_of(
    st.lists(st.sampled_from([*PIECES, "word", "One two.", "Three!", " ", ". "]), max_size=60).map(
        "".join
    ),
    st.builds(
        lambda start, size: PYDOC[start : start + size],
        st.integers(0, len(PYDOC) - 3000),
        st.integers(0, 3000),
    ),
)


def split(text, **settings):
    return PassageSplitter(**settings).split(SourceDocument("d", "T", text, "file.txt"))


def test_passages_end_with_sentences_where_they_can():
    text = "One two three. Four five.  Six seven eight nine ten eleven twelve. End"
    passages = split(text, words=5)
    # "Six ... twelve." has seven words: it is cut after five.
    assert [passage.text for passage in passages] == [
        "One two three. Four five.",
        "Six seven eight nine ten",
        "eleven twelve. End",
    ]
    assert [passage.id for passage in passages] == ["d#1", "d#2", "d#3"]
    assert [(passage.start, passage.end) for passage in passages] == [(0, 25), (27, 51), (52, 70)]
    first = passages[0]
    assert (first.document_id, first.title, first.source) == ("d", "T", "file.txt")


def test_a_document_of_one_passage_keeps_its_id():
    (passage,) = split(" Short enough.\n", words=2)
    assert (passage.id, passage.text, passage.start, passage.end) == ("d", "Short enough.", 1, 14)


def test_without_words_documents_stay_whole_with_their_white_space():
    text = " A b c. D e f.\n" * 50
    (passage,) = split(text, words=0)
    assert (passage.id, passage.text) == ("d", text)
    assert split("  \n", words=0) == split("", words=0) == split(" \n\t ", words=3) == []


def test_overlap_begins_with_a_sentence_where_one_begins_in_it():
    text = "A b c. D e. F g h i j k l."
    assert [passage.text for passage in split(text, words=6, overlap=3)] == [
        "A b c. D e.",
        "D e. F g h i",  # the last three words before hold the beginning of "D e."
        "g h i j k l.",  # and those here hold none
    ]


def test_runs_without_white_space_do_not_grow_without_bound():
    passages = split("x" * 1000, words=4)
    assert [len(passage.text) for passage in passages] == [96] * 10 + [40]
    japanese = split("漢字" * 100, words=10)
    assert [len(passage.text) for passage in japanese] == [20] * 10


@given(TEXTS, st.integers(1, 40))
def test_passages_tile_the_document(text, words):
    end = 0
    for passage in split(text, words=words):
        assert passage.text == text[passage.start : passage.end] == passage.text.strip() != ""
        assert not text[end : passage.start].strip()
        assert len(re.findall(r"\S+", passage.text)) <= words
        end = passage.end
    assert not text[end:].strip()


@given(TEXTS, st.integers(2, 40), st.data())
def test_overlapping_passages_cover_the_document_and_go_forward(text, words, data):
    overlap = data.draw(st.integers(1, words - 1))
    passages = split(text, words=words, overlap=overlap)
    starts, end = [passage.start for passage in passages], 0
    assert starts == sorted(set(starts))
    for passage in passages:
        assert not text[end : passage.start].strip()
        repeated = text[passage.start : end]
        assert len(re.findall(r"\S+", repeated)) <= overlap
        assert passage.end > end
        end = passage.end
    assert not text[end:].strip()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": -1}, "words \\(-1\\) must be 0"),
        ({"words": 5, "overlap": 5}, "overlap \\(5\\) must be from 0 to below words \\(5\\)"),
        ({"words": 5, "overlap": -1}, "overlap \\(-1\\)"),
        ({"words": 0, "overlap": 1}, "overlap \\(1\\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PassageSplitter(**settings)
