"""The report on answers: figures worked out by hand, controls, groups, and what is undefined."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from refrag_lightning.data.question_batches import AskedQuestion
from refrag_lightning.data.questions import Passage
from refrag_lightning.evaluation.answers import Answers, num_columns
from refrag_lightning.evaluation.gap import gap_closed
from refrag_lightning.evaluation.measures import Entry
from refrag_lightning.evaluation.readings import Reading

NUMBER = 40


def _asked(number=NUMBER, golds=None):
    asked = []
    for n in range(number):
        passages = [Passage("text", gold=place == n % 3) for place in range(2)]
        kind = "date" if n % 2 else "place"
        question = AskedQuestion(n, str(n), "?", ("Paris",), tuple(passages), "one", kind)
        asked.append(replace(question, golds=golds[n] if golds else ()))
    return asked


def _answers(means, *, tokens=None, generates=True, scores=None, number=NUMBER, golds=None):
    """Entries by name; each question's nats a token are a mean plus what all entries share."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, number)
    tokens = np.full(number, 2.0) if tokens is None else tokens
    entries, columns = [], []
    for name, mean in means.items():
        model, _, reading = name.rpartition(":")
        entries.append(Entry(Reading.parse(reading), model or "model", generates))
        columns += [(mean + shared) * tokens, tokens, np.full(number, 7.0)]
        if generates:
            score = (scores or {}).get(name, np.zeros(number))
            # em, f1, match, rouge_l, right citations, citations
            columns += [score, score, score, score, score, np.ones(number)]
    values = np.stack(columns, axis=1)
    assert values.shape == (number, num_columns(entries))
    return Answers(entries, values, _asked(number, golds), num_draws=300)


def _grouped(report, name):
    (table,) = [table for table in report.tables if table.name == name]
    return {
        tuple(row[:2]): dict(zip(table.columns[2:], row[2:], strict=True)) for row in table.rows
    }


def _table(report, name):
    (table,) = [table for table in report.tables if table.name == name]
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def test_gap_is_closed_as_by_hand():
    answers = _answers({"rows@4": 1.25, "full": 1.0, "none": 2.0}, generates=False)
    report = answers.report("A", {})
    assert _table(report, "Gap closed")["rows@4"]["nll"].value == pytest.approx(0.75)
    gap = _table(report, "Gap closed")["full - none itself"]["nll"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((-1, -1, -1))
    assert _table(report, "Answers")["rows@4"]["positions"] == 7.0
    figures = answers.figures()
    assert figures["closed/nll/rows@4"] == pytest.approx(0.75)
    assert figures["nll/none"] - figures["nll/full"] == pytest.approx(1.0)


def test_nats_a_token_are_over_all_tokens():
    tokens = np.random.default_rng(1).integers(1, 9, NUMBER).astype(float)
    answers = _answers({"rows@4": 1.2, "full": 1.0, "none": 2.0}, tokens=tokens)
    values = answers.values
    rows, full, none = answers.entries
    nats = values[rows, "nats"]
    assert answers.figures()["nll/rows@4"] == pytest.approx(nats.sum() / tokens.sum())
    expected = gap_closed(
        *(values[e, "nats"] / tokens for e in (rows, full, none)), weights=tokens, num_draws=300
    )
    assert answers.measures["nll"].closed(rows) == expected.closed


def test_baselines_stand_for_full_and_for_the_better_none():
    means = {"rows@4": 1.25, "full": 1.1, "none": 2.0, "full_model:full": 1.0}
    answers = _answers({**means, "closed_model:none": 1.75}, generates=False)
    nll = answers.measures["nll"]
    assert (nll.full.label, nll.none.label) == ("full-text baseline", "closed-book baseline")
    assert nll.closed(answers.entries[0]).value == pytest.approx((1.75 - 1.25) / 0.75)
    worse = _answers({**means, "closed_model:none": 2.5}, generates=False)
    assert worse.measures["nll"].none.label == "none"
    notes = " ".join(worse.report("A", {}).tables[1].notes)
    assert "full is full-text baseline, none is none" in notes
    # An adapter for text that learnt too little takes nothing off the gap.
    weak = _answers({**means, "full_model:full": 1.2}, generates=False)
    assert weak.measures["nll"].full.label == "full"
    assert weak.measures["nll"].closed(weak.entries[0]).value == pytest.approx(0.75 / 0.9)
    notes = " ".join(weak.report("A", {}).tables[1].notes)
    assert "the better one here" in notes and "full is full, none is none" in notes


def test_more_is_better_for_scores():
    rng = np.random.default_rng(2)
    right = {"full": 0.9, "none": 0.1, "rows@4": 0.7, "zero@4": 0.5}
    scores = {k: (rng.random(NUMBER) < share).astype(float) for k, share in right.items()}
    answers = _answers(dict.fromkeys(right, 1.0), scores=scores)
    em = answers.measures["em"]
    means = {name: values.mean() for name, values in scores.items()}
    closed = (means["rows@4"] - means["none"]) / (means["full"] - means["none"])
    assert em.closed(answers.entries[2]).value == pytest.approx(closed)
    verdicts = answers.report("A", {})
    (table,) = [table for table in verdicts.tables if table.name == "Controls"]
    found = {(row[0], row[1]): row[4] for row in table.rows}
    assert found["zero@4", "em"] == "ABOVE" and found["zero@4", "nll"] == "ok"


@pytest.mark.parametrize(
    ("mean", "verdict"), [(2.3, "ok"), (2.0, "ok"), (1.99, "better"), (1.9, "ABOVE")]
)
def test_controls_are_judged_by_the_interval_and_by_pairs(mean, verdict):
    # The mean of 40 questions of spread 0.1 is known to about 0.03, paired differences exactly.
    answers = _answers({"none": 2.0, "full": 1.0, "random@4": mean}, generates=False)
    assert _table(answers.report("A", {}), "Controls")["random@4"]["none"] == verdict


def test_what_is_undefined_is_said():
    answers = _answers({"rows@4": 1.5, "full": 2.0, "none": 2.0}, generates=False)
    report = answers.report("A", {})
    assert _table(report, "Gap closed")["rows@4"]["nll"] == "undefined"
    assert "nll: undefined, since full - none is 0.000 [0.000, 0.000]" in report.text()
    assert "closed/nll/rows@4" not in answers.figures()


def test_groups_are_the_questions_alone():
    rng = np.random.default_rng(3)
    score = (rng.random(NUMBER) < 0.5).astype(float)
    means = {"rows@4": 1.2, "full": 1.0, "none": 2.0}
    answers = _answers(means, scores={"rows@4": score})
    report = answers.report("A", {})
    names = [table.name for table in report.tables]
    # One kind of question makes no groups, and all have as many passages.
    assert "By kind of question" not in names and "By number of passages" not in names
    kinds = _grouped(report, "By kind of answer")
    assert kinds["date", "rows@4"]["questions"] == NUMBER // 2
    assert kinds["date", "rows@4"]["em"].value == pytest.approx(score[1::2].mean())
    # With its interval, as of these questions alone.
    alone = gap_closed(*[score[1::2]] * 3, num_draws=300).full
    assert kinds["date", "rows@4"]["em"] == alone
    assert kinds["date", "rows@4"]["f1"] == alone
    assert kinds["date", "full"]["nll closed"] is None
    places = _grouped(report, "By place of the gold passage")
    assert [*dict.fromkeys(label for label, _ in places)] == ["1", "2", "-"]
    assert places["2", "rows@4"]["em"].value == pytest.approx(score[1::3].mean())
    assert places["2", "rows@4"]["nll closed"].value == pytest.approx(0.8)
    shown = _grouped(report, "By gold passage shown")
    assert shown["no", "none"]["questions"] == len(range(2, NUMBER, 3))


def test_answers_have_a_kind_of_their_own_where_the_data_says_none():
    answers = _answers({"rows@4": 1.2, "full": 1.0, "none": 2.0})
    said = ["Ada Lovelace", "In May 1901", "12 miles", "because of the rain"]
    answers.asked = [
        replace(q, kind="", detail="", references=(said[n % 4], "Ada")) if n >= 8 else q
        for n, q in enumerate(answers.asked)
    ]
    kinds = _grouped(answers.report("A", {}), "By kind of answer")
    numbers = {label: row["questions"] for (label, name), row in kinds.items() if name == "full"}
    assert numbers == {"date": 4 + 8, "name": 8, "number": 8, "other": 8, "place": 4}
    # A question whose kind is known, but not the answer's, keeps that.
    answers.asked = [replace(q, kind="one", detail="x" if q.index else "") for q in answers.asked]
    kinds = _grouped(answers.report("A", {}), "By kind of answer")
    assert {label for label, _ in kinds} == {"x", "-"}


def test_articles_have_figures_where_they_are_few():
    answers = _answers({"rows@4": 1.2, "cut@4": 1.5, "full": 1.0, "none": 2.0})
    answers.asked = [replace(q, article=f"Page {q.index % 2}") for q in answers.asked]
    report = answers.report("A", {})
    table = _grouped(report, "By article")
    assert [*table][:4] == [("Page 0", name) for name in ("rows@4", "cut@4", "full", "none")]
    assert table["Page 1", "cut@4"]["nll closed"].value == pytest.approx(0.5)
    mine = answers.measures["nll"].of(np.arange(NUMBER) % 2 == 1)
    assert table["Page 1", "cut@4"]["nll"] == mine.mean(answers.entries[1])
    assert "left out" not in report.text()
    answers.asked = [replace(q, article=f"Page {q.index}") for q in answers.asked]
    report = answers.report("A", {})
    assert "By article" not in [table.name for table in report.tables]
    assert "By article is left out: 40 titles, more than 30." in report.text()


def test_questions_on_one_passage_are_drawn_together():
    rng = np.random.default_rng(5)
    means = {"rows@4": 1.2, "full": 1.0, "none": 2.0}
    score = np.repeat(rng.random(NUMBER // 2) < 0.5, 2).astype(float)
    scores = dict.fromkeys(means, score)
    alone = _answers(means, scores=scores)
    pairs = _answers(means, scores=scores, golds=[(f"passage {n // 2}",) for n in range(NUMBER)])
    rows = alone.entries[0]
    assert pairs.measures["em"].mean(rows).value == alone.measures["em"].mean(rows).value
    expected = gap_closed(*[score] * 3, groups=np.arange(NUMBER) // 2, num_draws=300).full
    assert pairs.measures["em"].mean(rows) == expected
    lengths = [m.high - m.low for m in (a.measures["em"].mean(rows) for a in (alone, pairs))]
    assert lengths[1] > 1.2 * lengths[0]
    text = pairs.report("A", {}).text()
    assert "over the 20 sets of questions with the same gold passages" in text
    assert "bootstrap over questions" in alone.report("A", {}).text()
    cited = _table(pairs.report("A", {}), "Citations of the gold passages")["rows@4"]["precision"]
    assert (cited.low, cited.high) == (expected.low, expected.high)


def test_few_questions_have_no_intervals(tmp_path):
    means = {"rows@4": 1.2, "full": 1.0, "none": 2.0, "zero@4": 2.0}
    report = _answers(means, generates=False, number=1).report("A", {})
    text = report.text()
    assert "No intervals and no shares of a gap: questions are fewer than 10." in text
    assert "[" not in text.replace("['", "")
    assert _table(report, "Gap closed")["rows@4"]["nll"] == "undefined"
    assert _table(report, "Controls")["zero@4"]["none"] == "too few"
    report.write(tmp_path)
    row = json.loads((tmp_path / "report.json").read_text())["tables"]["Answers"]["rows"][0]
    assert row[1]["value"] == pytest.approx(1.2, abs=0.5) and row[1]["low"] is None


def test_resilience_and_citations():
    before = np.tile([1.0, 1.0, 0.0, 0.0], NUMBER // 4)
    after = np.tile([1.0, 0.0, 1.0, 1.0], NUMBER // 4)
    means = {"rows@4": 1.2, "full": 1.0, "none": 2.0}
    report = _answers(means, scores={"none": before, "rows@4": after}).report("A", {})
    shares = _table(report, "Resilience and boost")["rows@4"]
    assert shares == {"resilience": pytest.approx(0.5), "boost": pytest.approx(1.0)}
    cited = _table(report, "Citations of the gold passages")["rows@4"]
    # One citation an answer, right in 30 of 40; two thirds of the questions have a gold passage.
    assert cited["precision"].value == pytest.approx(30 / 40)
    gold = sum(len(question.gold_ids) for question in _asked())
    with_gold = [bool(question.gold_ids) for question in _asked()]
    assert cited["recall"].value == pytest.approx(after[with_gold].sum() / gold)
    assert cited["answers that cite"].value == 1.0


def test_report_is_written(tmp_path):
    report = _answers({"rows@4": 1.2, "rows@8": 1.3, "full": 1.0, "none": 2.0}).report(
        "Title", {"model": "x|y"}
    )
    files = report.write(tmp_path)
    assert all(file.stat().st_size > 0 for file in files)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"] == {"questions": NUMBER, "model": "x|y"}
    table = data["tables"]["Gap closed"]
    cell = table["rows"][0][table["columns"].index("nll")]
    assert cell["value"] == pytest.approx(0.8) and cell["low"] <= cell["value"] <= cell["high"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title\n") and "![nll by rate](nll_by_rate.png)" in text
    assert text.count("| rows@4 |") >= 2
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")
    assert not math.isnan(cell["low"])


def test_weights_and_biases_get_every_table_and_plot(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    report = _answers({"rows@4": 1.25, "full": 1.0, "none": 2.0}).report("A", {})
    report.write(tmp_path)
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    report.log([CSVLogger(tmp_path), logger], tmp_path)
    logger.experiment.finish()
    found = {}
    for path in tmp_path.rglob("*.table.json"):
        found[path.name.split("_")[0]] = json.loads(path.read_text())
    assert {*found} == {table.name for table in report.tables}
    table = found["Gap closed"]
    assert table["columns"][:2] == ["reading", "nll"]
    assert table["data"][0][:2] == ["rows@4", "0.750 [0.750, 0.750]"]
    images = [path.name.split("_")[0] for path in tmp_path.rglob("media/images/**/*.png")]
    assert sorted(images) == sorted(plot.name for plot in report.plots)
