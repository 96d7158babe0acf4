import gzip
import json
from itertools import pairwise

import numpy as np
import pytest

from refrag_lightning.data.questions import Passage, Question
from refrag_lightning.retrieval.commands_search import index_evaluate
from refrag_lightning.retrieval.dense import embed_missing, embedder
from refrag_lightning.retrieval.passages import PassageSplitter
from refrag_lightning.retrieval.recall import gold_questions, recall_at
from refrag_lightning.retrieval.search import Searcher
from refrag_lightning.retrieval.sources import SourceDocument
from tests.retrieval.stores import store_of

TEXTS = {
    "a": "river river river",
    "b": "river river sea",
    "c": "river sea sea lake",
    "d": "mountain",
}


def question(text, *golds, others=("something else",), name=""):
    passages = [Passage(gold, gold=True) if isinstance(gold, str) else gold for gold in golds]
    return Question(name, text, ("answer",), (*(Passage(other) for other in others), *passages))


@pytest.fixture
def searcher(tmp_path):
    return Searcher(store_of(tmp_path / "index", TEXTS), "bm25")


def test_recall_by_hand(searcher):
    # The hits for "river" are a, b, c.
    assert [hit.passage.id for hit in searcher.search(["river"])[0]] == ["a", "b", "c"]
    questions = [
        question("river", TEXTS["a"]),  # rank 1
        question("river", TEXTS["b"]),  # rank 2
        question("river", TEXTS["c"], TEXTS["a"]),  # ranks 3 and 1
        question("river", TEXTS["d"]),  # not found
        question("river", "not in the index"),
        question("river"),  # no gold passage
    ]
    found = recall_at(searcher, questions, ks=(3, 1, 2, 3))
    assert list(found.at) == [1, 2, 3]
    np.testing.assert_allclose(
        [found.at[k].value for k in (1, 2, 3)], [1.5 / 5, 2.5 / 5, 3 / 5], rtol=1e-12
    )
    np.testing.assert_allclose(found.mean_reciprocal_rank.value, (1 + 0.5 + 1) / 5, rtol=1e-12)
    assert (found.num_questions, found.num_without_gold, found.num_not_indexed) == (5, 1, 1)
    assert found.method == "bm25"
    assert found.seconds_per_question > 0
    # Too few for intervals.
    assert not found.at[1].known and found.num_groups == 5
    assert recall_at(searcher, questions, ks=[1]).at[1] == found.at[1]


def test_intervals_are_those_of_a_share_of_the_gold_passages(tmp_path):
    # 30 of 40 are found first, by the normal approximation 0.75 +- 1.96 * sqrt(0.75 * 0.25 / 40).
    texts = {f"t{n}": f"word{n} river" for n in range(40)}
    searcher = Searcher(store_of(tmp_path / "index", texts), "bm25")
    asked = [question(f"word{n if n < 30 else 0}", text) for n, text in enumerate(texts.values())]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    found = recall_at(searcher, asked, ks=[1])
    np.testing.assert_allclose(found.at[1], (0.75, 0.75 - half, 0.75 + half), atol=0.03)
    # The same passages asked for four times are no more independent than once.
    again = recall_at(searcher, asked * 4, ks=[1])
    assert (again.num_questions, again.num_groups, again.at) == (160, 40, found.at)


def test_several_searches_share_the_recognised_passages(searcher):
    questions = [question("river", TEXTS["b"]), question("mountain", TEXTS["d"])]
    golden = gold_questions(searcher.store.passages(), questions)
    assert [gold.golds for gold in golden] == [(frozenset("b"),), (frozenset("d"),)]
    direct, shared = recall_at(searcher, questions), recall_at(searcher, golden)
    assert direct.at == shared.at
    assert list(direct.at) == [1, 5, 10]


# ---- what is gold ----------------------------------------------------------------------------


def golds(passages, *questions):
    return [gold.golds for gold in gold_questions(passages, questions)]


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_document_in_several_passages(overlap):
    text = "\n One two three four.  Five six seven eight.\n\nNine ten eleven twelve. End."
    splitter = PassageSplitter(words=5, overlap=overlap)
    passages = splitter.split(SourceDocument("doc", "Title", text, "by hand"))
    assert len(passages) >= 3
    for before, after in pairwise(passages):
        assert (after.start < before.end) == (overlap > 0)
    every = frozenset(passage.id for passage in passages)
    same = " ".join(text.split())
    assert golds(passages, question("x", same), question("x", same + "!")) == [
        (every,),
        (frozenset(),),
    ]
    # One passage alone can be a gold one too.
    assert golds(passages, question("x", passages[1].text)) == [(frozenset({passages[1].id}),)]


def test_equal_texts_are_all_gold():
    splitter = PassageSplitter()
    passages = [
        passage
        for name in ("x", "y", "z")
        for passage in splitter.split(
            SourceDocument(name, "", "Same text." if name < "z" else "Other.", "by hand")
        )
    ]
    assert golds(passages, question("q", "Same  text.\n")) == [(frozenset({"x", "y"}),)]


def test_ids_name_documents_where_they_name_one_text():
    passages = PassageSplitter().split(SourceDocument("7", "Rivers", "New text.", "by hand"))
    gold = Passage("Old text.", id="7", title="Rivers", gold=True)
    assert golds(passages, question("q", gold)) == [(frozenset({"7"}),)]
    # Two questions that number their passages: the id says nothing.
    other = Passage("Another text.", id="7", title="Rivers", gold=True)
    assert golds(passages, question("q", gold), question("q", other)) == [(frozenset(),)] * 2
    # Another title: two sources that happen to number alike.
    stranger = Passage("Old text.", id="7", title="Lakes", gold=True)
    assert golds(passages, question("q", stranger)) == [(frozenset(),)]


def test_what_cannot_be_measured(searcher):
    with pytest.raises(ValueError, match=r"ks \(\[0, 1\]\)"):
        recall_at(searcher, [question("river", TEXTS["a"])], ks=(1, 0))
    with pytest.raises(ValueError, match=r"ks \(\[\]\)"):
        recall_at(searcher, [question("river", TEXTS["a"])], ks=())
    with pytest.raises(ValueError, match="none of the 1 questions has a passage marked as gold"):
        recall_at(searcher, [question("river")])
    with pytest.raises(ValueError, match="none of the 0 questions"):
        recall_at(searcher, [])
    with pytest.raises(ValueError, match="the index holds no gold passage of the 1 questions"):
        recall_at(searcher, [question("river", "elsewhere")])


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def questions_file(tmp_path):
    rows = [
        {
            "id": f"q{number}",
            "question": text,
            "answers": ["answer"],
            "passages": [
                {"id": "1", "title": "", "text": TEXTS[gold], "gold": True},
                {"id": "2", "title": "", "text": "unheard", "gold": False},
            ],
        }
        for number, (text, gold) in enumerate([("river", "a"), ("sea", "c"), ("lake", "b")])
    ]
    file = tmp_path / "questions.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return str(file)


def test_the_command_without_a_model(searcher, questions_file, tmp_path, capsys):
    out = tmp_path / "recall.json"
    index_evaluate(searcher.store.uri, [questions_file], ks=[1, 2], out=str(out))
    printed = capsys.readouterr().out
    assert "recall@1" in printed
    assert "bm25" in printed
    assert "fused" not in printed
    assert "questions: 3;" in printed
    assert "0.667" in printed
    assert " to " not in printed and "too few for intervals" in printed
    assert "MRR@2" in printed
    report = json.loads(out.read_text())
    assert report["embedder"] is None
    (row,) = report["results"]
    # a for "river" and c for "sea" come first; b does not hold "lake".
    assert row["at"]["1"] == {"value": pytest.approx(2 / 3), "low": None, "high": None}
    assert row["at"]["2"]["value"] == pytest.approx(2 / 3)
    assert row["num_questions"] == 3
    index_evaluate(searcher.store.uri, [questions_file], limit=1)
    assert "questions: 1;" in capsys.readouterr().out


def test_the_command_with_an_embedder(searcher, questions_file, tmp_path, capsys):
    embed_missing(searcher.store, embedder("tiny/encoder"))
    out = tmp_path / "recall.json"
    index_evaluate(
        searcher.store.uri, [questions_file], embedder="tiny/encoder", ks=[4], out=str(out)
    )
    report = json.loads(out.read_text())
    assert report["embedder"] == "tiny/encoder"
    assert [row["method"] for row in report["results"]] == ["bm25", "dense", "fused"]
    # There are four passages, and dense search finds each of them.
    assert [row["at"]["4"]["value"] for row in report["results"]] == [
        pytest.approx(2 / 3),
        1.0,
        1.0,
    ]


def test_the_command_needs_vectors_of_questions(searcher, questions_file):
    with pytest.raises(ValueError, match=r"methods \['fused'\] need --model or --embedder"):
        index_evaluate(searcher.store.uri, [questions_file], methods=["bm25", "fused"])
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        index_evaluate(searcher.store.uri + "-not", [questions_file])
