"""Scores of answers: against torchmetrics' SQuAD, the rouge-score package, and worked examples."""

import random

import pytest
import torch
from torchmetrics.text import SQuAD

from refrag_lightning.evaluation.metrics import (
    SCORES,
    AnswerScores,
    Resilience,
    answer_scores,
    exact_match,
    f1,
    match,
    normalise,
    rouge_l,
    split_citations,
)

WORDS = ["the", "Seine", "a", "an", "flows", "Paris,", "in", "1789", "U.S.", "river-bed", "Émile"]
WORDS += ["O'Neil", "(north)", "--", "42%", "The", "loire", "Loire", "don't", "ça", "\n", "  "]


def _pairs(number=1000, seed=0):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 7))) for _ in range(2 * number)]
    # A few of them are the same but for articles and case, so that exact match is met.
    return [
        (a, a.upper() if n % 7 == 0 else b)
        for n, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]


def test_exact_match_and_f1_are_those_of_torchmetrics_squad():
    squad = SQuAD()
    hits = 0
    for answer, reference in _pairs():
        target = {"answers": {"answer_start": [0], "text": [reference]}, "id": "1"}
        expected = squad([{"prediction_text": answer, "id": "1"}], [target])
        assert exact_match(answer, reference) * 100 == expected["exact_match"]
        assert f1(answer, reference) * 100 == pytest.approx(expected["f1"].item(), abs=1e-4)
        hits += exact_match(answer, reference)
    assert 100 < hits < 900


def test_rouge_l_is_that_of_the_rouge_score_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, reference in _pairs(seed=1):
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_by_hand():
    # "the cat the mat" of 6 and 5 words: precision 4/6, recall 4/5.
    p, r = 4 / 6, 4 / 5
    value = rouge_l("the cat sat on the mat", "the cat lay, the mat")
    assert value == pytest.approx(2 * p * r / (p + r))
    assert rouge_l("", "x") == rouge_l("x", "!") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("It was Charles de Gaulle, in 1958.", "the  charles De Gaulle!", 1),
        ("Charles", "Charles de Gaulle", 0),
        # Whole words, in whatever script.
        ("I know nothing", "no", 0),
        ("No, I do not.", "no", 1),
        ("It opened in 2010.", "10", 0),
        ("It opened in 2010.", "201", 0),
        ("It is 1.5 or 2,500 miles", "5", 0),
        ("It is 1.5 or 2,500 miles", "2500", 1),
        ("Mozart", "art", 0),
        ("река Москварека", "Москва", 0),
        ("राम रामायण", "रामा", 0),
        ("राम रामायण", "राम", 1),
        ("I don't know, it can’t be", "don", 0),
        ("I don't know, it can’t be", "can", 0),
        ("I don't know, it can’t be", "can't", 1),
        # A word ends at a hyphen, a dash, a quote, an apostrophe.
        ("Einstein's and Planck’s theories", "Einstein", 1),
        ("Einstein's and Planck’s theories", "Planck", 1),
        ("A Paris-based firm (Acme/Rome) of 1914-1918", "paris", 1),
        ("A Paris-based firm (Acme/Rome) of 1914-1918", "Rome", 1),
        ("A Paris-based firm (Acme/Rome) of 1914-1918", "1918", 1),
        ("“Paris”—that is,it", "Paris", 1),
        ("“Paris”—that is,it", "is", 1),
        ("the river-bed", "riverbed", 1),
        ("U.S. dollars", "US", 1),
        ("a bus", "US", 0),
        # No spaces between words.
        ("答案是北京。", "北京", 1),
        ("答案是北京。", "京都", 0),
        ("嘇1889年完成", "1889", 1),
        ("嘇1889年完成", "889", 0),
        ("１８８９年", "1889", 1),
        ("パリは首都です", "パリ", 1),
        ("เมืองหลวงคือปารีส", "ปารีส", 1),
        ("서울입니다", "서울", 1),
        ("E\u0301mile", "Émile", 1),
        # "The" is an empty reference, which stands in no answer but an empty one.
        ("anything", "The", 0),
        ("the", "A", 1),
        ("anything", "--", 0),
        ("-", "'s", 0),
    ],
)
def test_match_is_a_row_of_whole_words(answer, reference, expected):
    assert match(answer, reference) == expected


def test_an_exact_match_is_a_match():
    for answer, reference in _pairs(200):
        assert match(answer, reference) >= exact_match(answer, reference)


def test_normal_form():
    assert normalise(" The  U.S.\tan Apple; a-b Theatre ") == "us apple ab theatre"


def test_the_best_reference_counts():
    scores = answer_scores("Paris France", ["Rome", "Paris", "paris, france"])
    assert scores == {"em": 1.0, "f1": 1.0, "match": 1.0, "rouge_l": 1.0}
    assert answer_scores("Paris", ["Paris France"])["f1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'Paris' has no reference"):
        answer_scores("Paris", [])


def test_answer_scores_are_means_over_batches():
    metric = AnswerScores()
    pairs = _pairs(30)
    for start in (0, 11, 17):
        stop = {0: 11, 11: 17, 17: 30}[start]
        metric.update([a for a, _ in pairs[start:stop]], [[r] for _, r in pairs[start:stop]])
    got = metric.compute()
    for name, score in SCORES.items():
        expected = sum(score(a, r) for a, r in pairs) / 30
        assert got[name].item() == pytest.approx(expected, rel=1e-6)
    metric.reset()
    metric.update(["Paris [2] [3]", "Paris [note]"], [["Paris"], ["Paris"]])
    assert metric.compute()["em"].item() == 1 / 2


def test_citations_are_taken_out():
    answer = "Paris [2] and Rome [a7; 3]. See [note] and []."
    assert split_citations(answer, ["2", "a7"]) == (
        "Paris and Rome. See [note] and [].",
        ["2", "a7", "3"],
    )
    assert split_citations("Paris [2][2, 1]", []) == ("Paris", ["2", "1"])
    assert split_citations("Paris [1-3] \u30101\u2020source\u3011, `x[4]`.", ["1"]) == (
        "Paris, `x[4]`.",
        ["1", "2", "3"],
    )
    assert split_citations("Paris [x[1], a]", ["x[1], a"]) == ("Paris", ["x[1], a"])


def test_resilience_and_boost_by_hand():
    metric = Resilience()
    metric.update(torch.tensor([1, 0, 1]), torch.tensor([1, 1, 0]))
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    got = metric.compute()
    # Right without: 3, of which 2 stay right. Wrong without: 2, of which 1 becomes right.
    assert got["resilience"].item() == pytest.approx(2 / 3)
    assert got["boost"].item() == pytest.approx(1 / 2)
