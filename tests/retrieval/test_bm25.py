import math
from collections import Counter

import numpy as np
import pytest

from refrag_lightning.cache import Process
from refrag_lightning.retrieval.bm25 import Bm25, searched_text, store_bm25
from tests.retrieval.stores import put, store_of

TEXTS = {
    "a": ("Rivers", "The Seine flows through Paris and the Thames through London."),
    "b": ("", "Vitamin C was isolated in 1928; vitamin B 12 later."),
    "c": ("Paris", "A city of museums."),
}
# What the texts are to BM25: in lower case, stop words left out, endings cut off (by hand).
WORDS = [
    text.split()
    for text in (
        "river sein flow through pari thame through london",
        "vitamin c isol 1928 vitamin b 12 later",
        "pari citi museum",
    )
]


def lucene_bm25(documents, query, k1=1.5, b=0.75):
    """Okapi BM25 as Lucene 8 has it, from its formula."""
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in query:
            df = sum(word in other for other in documents)
            if df == 0:
                continue
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


def index():
    return Bm25([searched_text(*value) for value in TEXTS.values()])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("Which river flows through Paris?", ["which", "river", "flow", "through", "pari"]),
        ("vitamins c", ["vitamin", "c"]),
        ("MUSEUM museum unheard", ["museum", "museum", "unheard"]),
        ("12", ["12"]),
    ],
)
def test_scores_are_lucenes(query, words):
    expected = lucene_bm25(WORDS, words)
    assert max(expected) > 0
    np.testing.assert_allclose(index().scores(query), expected, rtol=1e-5)


def test_the_title_counts():
    without = Bm25([text for _, text in TEXTS.values()])
    assert index().scores("paris")[2] > 0
    assert without.scores("paris")[2] == 0


def test_languages():
    texts = ["Die Häuser am Fluss", "das Haus"]
    assert (Bm25(texts, language="german").scores("Häuser") > 0).all()
    assert (Bm25(texts, language="none").scores("Häuser") > 0).tolist() == [True, False]
    # No endings are cut off and no stop words left out.
    assert (Bm25(["the rivers", "a river"], language="none").scores("the river") > 0).all()
    assert (Bm25(["a river", "the sea"]).scores("the") == 0).all()
    # A language without stop words in bm25s.
    assert (Bm25(["talo", "joki"], language="finnish").scores("talossa") > 0).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"language \('klingon'\) must be one of none, "):
        Bm25(["a"], language="klingon")


@pytest.mark.parametrize("texts", [[], ["", "?!"], ["the of"]])
def test_nothing_to_find(texts, tmp_path):
    found = Bm25(texts)
    np.testing.assert_array_equal(found.scores("river"), np.zeros(len(texts)))
    found.save(tmp_path)
    np.testing.assert_array_equal(Bm25.load(tmp_path).scores("river"), np.zeros(len(texts)))


@pytest.mark.parametrize("query", ["", "the of", "unheard", "?!"])
def test_queries_without_a_known_word(query):
    np.testing.assert_array_equal(index().scores(query), np.zeros(3))


def test_saved_scores_are_the_same(tmp_path):
    index().save(tmp_path)
    loaded = Bm25.load(tmp_path)
    assert (loaded.num_passages, loaded.language) == (3, "english")
    query = "vitamins and museums in Paris"
    np.testing.assert_array_equal(loaded.scores(query), index().scores(query))


def kept(store):
    return sorted(path.name for path in store.local_path.glob("*bm25*"))


def test_a_store_keeps_its_index(tmp_path, monkeypatch):
    store = store_of(tmp_path / "index", TEXTS)
    query = "paris museums"
    expected = index().scores(query)
    np.testing.assert_array_equal(store_bm25(store).scores(query), expected)
    assert len(kept(store)) == 1

    def fail(*args, **options):
        raise AssertionError("built again")

    with monkeypatch.context() as patched:
        patched.setattr(Bm25, "__init__", fail)
        np.testing.assert_array_equal(store_bm25(store).scores(query), expected)
    store_bm25(store, language="german")
    assert [name.split("-")[1] for name in kept(store)] == ["english", "german"]


def test_a_store_that_changed_is_indexed_again(tmp_path):
    store = store_of(tmp_path / "index", TEXTS)
    store_bm25(store)
    before = kept(store)
    # The title alone: the text has the same key.
    put(store, {"c": ("Berlin", TEXTS["c"][1])}, replaced=["c"])
    scores = store_bm25(store).scores("berlin")
    assert (scores > 0).tolist() == [False, False, True]
    assert len(kept(store)) == 1
    assert kept(store) != before
    store.remove_documents(["a"])
    assert len(store_bm25(store).scores("berlin")) == 2


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    store = store_of(tmp_path / "index", TEXTS)

    def fail(self, folder):
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(Bm25, "save", fail)
    if error is OSError:  # a store that can only be read is searched all the same
        assert store_bm25(store).scores("museum")[2] > 0
    else:
        with pytest.raises(error):
            store_bm25(store)
    assert kept(store) == []


def test_what_a_kill_left_goes_with_the_next_build(tmp_path):
    store = store_of(tmp_path / "index", TEXTS)
    me = Process.current()
    killed = f".bm25.{me.host}-{me.pid}-{me.started - 1}-0000.partial"
    running = f".bm25.{me.host}-{me.pid}-{me.started}-0000.partial"
    for name in (killed, running):
        (store.local_path / name).mkdir()
    store_bm25(store)
    assert kept(store)[0] == running
    assert len(kept(store)) == 2
