import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.retrieval import search
from refrag_lightning.retrieval.dense import embed_missing
from refrag_lightning.retrieval.search import Searcher, best
from tests.retrieval.stores import TableEmbedder, put, store_of

# Words favour a, then b, then c; d has none of the query's. Vectors favour d, then c, then b.
QUERY = "river bank"
TEXTS = {
    "a": "river bank river bank",
    "b": "a river and a bank of clouds over towns",
    "c": "river towns fields forests hills clouds sun rain",
    "d": "stream shore",
}
VECTORS = {
    QUERY: (1.0, 0.0),
    "sky": (0.0, 1.0),
    TEXTS["a"]: (0.1, 1.0),
    TEXTS["b"]: (0.5, 1.0),
    TEXTS["c"]: (1.0, 0.5),
    TEXTS["d"]: (1.0, 0.1),
}


@pytest.fixture
def embedder():
    return TableEmbedder(dict(VECTORS))


@pytest.fixture
def store(tmp_path, embedder):
    made = store_of(tmp_path / "index", TEXTS)
    embed_missing(made, embedder)
    return made


def ids(hits):
    return [hit.passage.id for hit in hits]


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), max_size=40),
    st.integers(1, 50),
    st.sampled_from([-np.inf, 0.0, 0.25]),
)
def test_best_is_a_stable_sort_cut_off(scores, k, above):
    expected = [place for place in range(len(scores)) if scores[place] > above]
    expected = sorted(expected, key=lambda place: (-scores[place], place))[:k]
    found = best(np.array(scores), k, above=above)
    assert found.places.tolist() == expected
    assert found.scores.tolist() == [scores[place] for place in expected]


def test_bm25_finds_what_shares_words(store):
    searcher = Searcher(store, "bm25")
    hits = searcher.search([QUERY], k=10)[0]
    assert ids(hits) == ["a", "b", "c"]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [hit.ranks for hit in hits] == [{"bm25": 1}, {"bm25": 2}, {"bm25": 3}]
    assert hits[0].score > hits[1].score > hits[2].score > 0
    assert hits[0].passage == store.get(["a"])[0]
    assert searcher.search(["unheard", ""]) == [[], []]


def test_dense_gives_cosines(store, embedder):
    hits = Searcher(store, "dense", embedder).search([QUERY], k=3)[0]
    assert ids(hits) == ["d", "c", "b"]
    # cos of (1, y) or (x, 1) with (1, 0), by hand.
    expected = [1 / np.sqrt(1.01), 1 / np.sqrt(1.25), 0.5 / np.sqrt(1.25)]
    np.testing.assert_allclose([hit.score for hit in hits], expected, rtol=1e-6)


def test_fused_adds_reciprocal_ranks(store, embedder):
    hits = Searcher(store, "fused", embedder).search([QUERY], k=10)[0]
    ranks = {
        "a": {"bm25": 1, "dense": 4},
        "b": {"bm25": 2, "dense": 3},
        "c": {"bm25": 3, "dense": 2},
        "d": {"dense": 1},
    }
    # 1/61 + 1/64 > 1/62 + 1/63, twice > 1/61; b stands before c by its id.
    assert ids(hits) == ["a", "b", "c", "d"]
    assert [hit.ranks for hit in hits] == list(ranks.values())
    expected = [1 / 61 + 1 / 64, 1 / 62 + 1 / 63, 1 / 63 + 1 / 62, 1 / 61]
    np.testing.assert_allclose([hit.score for hit in hits], expected, rtol=1e-12)
    assert hits[1].score == hits[2].score


def test_rrf_k_and_depth(store, embedder):
    # 1/1 (d) > 1/2 (c, b would be 1/3): only the first two of each method count.
    hits = Searcher(store, "fused", embedder, rrf_k=0, depth=2).search([QUERY], k=2)[0]
    assert ids(hits) == ["a", "d"]
    assert [hit.score for hit in hits] == [1.0, 1.0]
    # More are asked for than depth says, so each method gives as many.
    hits = Searcher(store, "fused", embedder, depth=1).search([QUERY], k=3)[0]
    assert len(hits) == 3


@pytest.mark.parametrize("method", ["bm25", "dense", "fused"])
def test_a_batch_is_its_queries_alone(method, store, embedder, monkeypatch):
    searcher = Searcher(store, method, embedder)
    together = searcher.search([QUERY, "sky", QUERY], k=3)
    assert together == [searcher.search([query], k=3)[0] for query in (QUERY, "sky", QUERY)]
    assert together[0] == together[2]
    monkeypatch.setattr(search, "_BLOCK", 1)
    assert searcher.search([QUERY, "sky", QUERY], k=3) == together
    assert searcher.search([]) == []


@pytest.mark.parametrize("method", ["bm25", "dense", "fused"])
def test_equal_scores_stand_by_id(method, tmp_path):
    names = [f"p{number:02}" for number in range(30)]
    texts = {name: "the same river" for name in reversed(names)}
    store = store_of(tmp_path / "index", texts)
    embedder = TableEmbedder({"the same river": (1.0, 2.0), "river": (1.0, 0.0)})
    assert embed_missing(store, embedder) == 1
    hits = Searcher(store, method, embedder).search(["river"], k=7)[0]
    assert ids(hits) == names[:7]


@pytest.mark.parametrize("method", ["bm25", "dense", "fused"])
def test_an_empty_store(method, tmp_path, embedder):
    store = store_of(tmp_path / "index", {})
    assert Searcher(store, method, embedder).search([QUERY]) == [[]]


def test_titles_are_searched(tmp_path):
    store = store_of(
        tmp_path / "index", {"a": ("Seine", "It flows."), "b": ("Thames", "It flows.")}
    )
    embedder = TableEmbedder(
        {"Seine\nIt flows.": (1, 0), "Thames\nIt flows.": (0, 1), "Thames": (0, 1)}
    )
    assert embed_missing(store, embedder) == 2
    for method in ("bm25", "dense", "fused"):
        assert ids(Searcher(store, method, embedder).search(["Thames"], k=1)[0]) == ["b"]


def test_a_store_that_changes_is_read_again(store, embedder):
    words, fused = Searcher(store, "bm25"), Searcher(store, "fused", embedder)
    put(store, {"e": "river bank"})
    store.remove_documents(["a", "d"])
    assert ids(words.search([QUERY], k=10)[0]) == ["e", "b", "c"]
    # It has no vector yet, so its words alone find it.
    hits = fused.search([QUERY], k=10)[0]
    assert {hit.passage.id: hit.ranks for hit in hits} == {
        "b": {"bm25": 2, "dense": 2},
        "c": {"bm25": 3, "dense": 1},
        "e": {"bm25": 1},
    }
    with pytest.raises(ValueError, match="no vector by a table for 1 of its 3 passages"):
        Searcher(store, "dense", embedder)
    embedder.table["river bank"] = (1.0, 0.0)
    embed_missing(store, embedder)
    assert ids(Searcher(store, "dense", embedder).search([QUERY], k=1)[0]) == ["e"]


def test_a_store_that_was_empty_gets_passages(tmp_path, embedder):
    store = store_of(tmp_path / "index", {})
    searcher = Searcher(store, "fused", embedder)
    put(store, {"a": TEXTS["a"]})
    assert ids(searcher.search([QUERY])[0]) == ["a"]


def test_what_cannot_be_searched(store, embedder):
    with pytest.raises(ValueError, match=r"method \('words'\) must be one of bm25, dense, fused"):
        Searcher(store, "words")
    with pytest.raises(ValueError, match=r"method \('fused'\) needs an embedder"):
        Searcher(store, "fused")
    with pytest.raises(ValueError, match=r"rrf_k \(-1\)"):
        Searcher(store, "bm25", rrf_k=-1)
    with pytest.raises(ValueError, match=r"depth \(0\)"):
        Searcher(store, "bm25", depth=0)
    with pytest.raises(ValueError, match=r"language \('elvish'\)"):
        Searcher(store, "dense", embedder, language="elvish")
    with pytest.raises(ValueError, match=r"k \(0\)"):
        Searcher(store, "bm25").search([QUERY], k=0)
    with pytest.raises(TypeError, match="several queries"):
        Searcher(store, "bm25").search(QUERY)
