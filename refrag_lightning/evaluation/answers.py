"""The report on answered questions: scores of each reading, gap closed, controls, groups.

Every measure is a table of questions by entries; an entry is a model under a reading. All figures
of a measure come from the same draws of questions (`gap.Bootstrap`). Questions with the same gold
passages, such as SQuAD's on one paragraph, are drawn together, whether the model reads them or not.
`nll` is in nats a token of the gold answer, over all tokens of all questions (less is better); the
others are means over questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from refrag_lightning.data.cloze import answer_kind
from refrag_lightning.data.question_batches import AskedQuestion
from refrag_lightning.evaluation.gap import (
    MIN_GROUPS,
    NUM_DRAWS,
    Bootstrap,
    Interval,
    groups_of,
)
from refrag_lightning.evaluation.measures import Entry, Measure
from refrag_lightning.evaluation.metrics import SCORES, Resilience
from refrag_lightning.evaluation.readings import CONTROLS, WITH_SHARE
from refrag_lightning.evaluation.report import Cell, Plot, Report, Table

MAX_ARTICLES = 30
"""Most titles of gold passages that have figures of their own."""

# What is between full text and none.
_BETWEEN = ("rows", "cut", *WITH_SHARE)


def num_columns(entries: Sequence[Entry]) -> int:
    """Columns of a `gap.ValueTable` for these entries."""
    return sum(len(entry.columns) for entry in entries)


class Answers:
    """What was measured of questions, by entry and measure.

    Args:
        entries: The entries.
        values_NC: (N, C) for each question the columns of each entry, one entry behind the other.
        asked: The questions, in the same order.
        num_draws: Draws of the bootstrap.
        seed: Of the draws.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        values_NC: np.ndarray,
        asked: Sequence[AskedQuestion],
        *,
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
    ) -> None:
        assert values_NC.shape == (len(asked), num_columns(entries))
        self.entries = list(entries)
        self.asked = list(asked)
        self.groups_N = groups_of([question.golds for question in asked])
        self.options: dict[str, Any] = {"num_draws": num_draws, "seed": seed}
        self.values: dict[tuple[Entry, str], np.ndarray] = {}
        column = 0
        for entry in entries:
            for name in entry.columns:
                self.values[entry, name] = values_NC[:, column]
                column += 1

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """`nll`, and the scores of the entries that generate."""
        tokens = self.values[self.entries[0], "tokens"]
        for entry in self.entries:
            assert np.array_equal(self.values[entry, "tokens"], tokens), "the same targets"
        table = np.stack([self.values[e, "nats"] / tokens for e in self.entries], axis=1)
        nll = Measure(self.entries, table, tokens, self.groups_N, less=True, options=self.options)
        measures = {"nll": nll}
        generating = [entry for entry in self.entries if entry.generates]
        for name in SCORES if generating else ():
            table = np.stack([self.values[e, name] for e in generating], axis=1)
            measures[name] = Measure(
                generating, table, None, self.groups_N, less=False, options=self.options
            )
        return measures

    def figures(self) -> dict[str, float]:
        """Means by `<measure>/<entry>`, and `closed/<measure>/<entry>`, for logs."""
        figures = {}
        for name, measure in self.measures.items():
            for entry in measure.entries:
                figures[f"{name}/{entry.key}"] = measure.mean(entry).value
                closed = measure.closed(entry)
                if entry.reading.kind in ("rows", *WITH_SHARE) and isinstance(closed, Interval):
                    figures[f"closed/{name}/{entry.key}"] = closed.value
        return figures

    def report(self, title: str, settings: dict[str, Any]) -> Report:
        """The whole report.

        Args:
            title: Its heading.
            settings: What was evaluated, on what, and how.
        """
        tables = [self._scores(), self._gaps(), self._controls()]
        tables += [self._group(name, labels) for name, labels in self._groups().items()]
        tables += [self._resilience(), self._citations()]
        settings = {"questions": len(self.asked), **settings}
        return Report(title, settings, [table for table in tables if table.rows], self._plots())

    def _scores(self) -> Table:
        notes = ["nll: nats a token of the gold answer, its end-of-turn token not counted."]
        num_groups = len(np.unique(self.groups_N))
        drawn = "questions"
        if num_groups < len(self.asked):
            drawn = f"the {num_groups} sets of questions with the same gold passages"
        notes += [f"Brackets: 95 % intervals of a paired bootstrap over {drawn}."]
        if num_groups < MIN_GROUPS:
            notes += [f"No intervals and no shares of a gap: {drawn} are fewer than {MIN_GROUPS}."]
        notes += ["positions: of the prompt, as the decoder reads it, on average."]
        if (number := self._num_articles) > MAX_ARTICLES:
            notes += [f"By article is left out: {number} titles, more than {MAX_ARTICLES}."]
        rows: list[list[Cell]] = []
        for entry in self.entries:
            cells = [m.mean(entry) if entry in m.entries else None for m in self.measures.values()]
            rows.append([entry.label, *cells, float(self.values[entry, "positions"].mean())])
        return Table("Answers", ["reading", *self.measures, "positions"], rows, notes)

    def _gaps(self) -> Table:
        rows: list[list[Cell]] = []
        notes = ["Share of the gap closed: (reading - none) / (full - none)."]
        if any(entry.model != "model" for entry in self.entries):
            notes.append("full and none: of the model and its baseline the better one here.")
        gaps: list[Cell] = []
        for name, measure in self.measures.items():
            if measure.none is None or measure.full is None:
                gaps.append(None)
                continue
            notes.append(f"{name}: full is {measure.full.label}, none is {measure.none.label}.")
            gap = measure.bootstrap.difference(*measure.places(measure.full, measure.none))
            gaps.append(gap)
            if not gap.known:
                notes.append(f"{name}: undefined, since there are too few questions.")
            elif gap.holds(0.0):
                notes.append(
                    f"{name}: undefined, since full - none is {gap.value:.3f} "
                    f"[{gap.low:.3f}, {gap.high:.3f}], which may be 0."
                )
        if len(notes) > 1:
            rows = [
                [entry.label, *(m.closed(entry) for m in self.measures.values())]
                for entry in self.entries
                if entry.model == "model" and entry.reading.kind in _BETWEEN
            ]
            rows.append(["full - none itself", *gaps])
        return Table("Gap closed", ["reading", *self.measures], rows, notes)

    def _controls(self) -> Table:
        rows: list[list[Cell]] = []
        for name, measure in self.measures.items():
            bases = [b for b in (measure.none, measure.titles) if b is not None]
            for entry in measure.entries:
                if entry.reading.kind not in CONTROLS:
                    continue
                cells: list[Cell] = []
                for base in (measure.none, measure.titles):
                    if base is None:
                        cells += [None, None]
                        continue
                    better = measure.bootstrap.difference(*measure.places(entry, base))
                    cells += [better, measure.verdict(entry, base)]
                rows.append([entry.label, name, measure.mean(entry), *cells])
            if not bases:
                return Table("Controls", ["control"], [])
        columns = ["control", "measure", "mean", "minus none", "none", "minus titles", "titles"]
        notes = [
            "Controls hold nothing of the documents.",
            "ABOVE: better than all of the base's interval, which must not be.",
            "better: inside it, but ahead of the base on the same questions (the difference's",
            "interval leaves 0 out), as a model that is used to documents may be.",
            "They show the documents' headers; titles is what those tell by themselves.",
        ]
        return Table("Controls", columns, rows, notes)

    def _groups(self) -> dict[str, list[str]]:
        """For each way to group the questions that makes several groups, each one's label."""
        asked = self.asked
        labels = {
            "kind of question": [question.kind or "-" for question in asked],
            "kind of answer": [_kind_of_answer(question) for question in asked],
            "article": [question.article or "-" for question in asked],
            "place of the gold passage": [
                "-" if q.gold_place is None else str(q.gold_place + 1) for q in asked
            ],
            "number of passages": [str(question.num_passages) for question in asked],
            "gold passage shown": ["no" if q.gold_place is None else "yes" for q in asked],
        }
        if self._num_articles > MAX_ARTICLES:
            del labels["article"]
        return {name: names for name, names in labels.items() if len(set(names)) > 1}

    @property
    def _num_articles(self) -> int:
        return len({question.article for question in self.asked if question.article})

    def _group(self, name: str, labels: list[str]) -> Table:
        measures = {n: m for n, m in self.measures.items() if n in ("nll", "em", "f1")}
        columns = [name, "reading", "questions"]
        columns += [column for n in measures for column in (n, f"{n} closed")]
        rows: list[list[Cell]] = []
        for label in sorted(set(labels), key=_natural):
            mask = np.asarray([other == label for other in labels])
            parts = [measure.of(mask) for measure in measures.values()]
            for entry in self.entries:
                if entry.reading.kind not in ("none", "full", *_BETWEEN):
                    continue
                between = entry.reading.kind in _BETWEEN
                cells: list[Cell] = []
                for part in parts:
                    cells.append(part.mean(entry) if entry in part.entries else None)
                    cells.append(part.closed(entry) if between else None)
                rows.append([label, entry.label, int(mask.sum()), *cells])
        notes = [
            f"undefined: full - none may be 0, or there are fewer than {MIN_GROUPS} questions, "
            "or sets of them."
        ]
        return Table(f"By {name}", columns, rows, notes)

    def _resilience(self) -> Table:
        rows: list[list[Cell]] = []
        own_none = [e for e in self.entries if e.generates and e.key == "none"]
        for entry in self.entries if own_none else ():
            if entry.generates and entry.key != "none":
                metric = Resilience()
                metric.update(
                    torch.from_numpy(self.values[entry, "match"]),
                    torch.from_numpy(self.values[own_none[0], "match"]),
                )
                shares = metric.compute()
                rows.append([entry.label, *(float(shares[n]) for n in ("resilience", "boost"))])
        notes = ["resilience: of the questions right without documents, the share right with them."]
        notes += ["boost: of those wrong without, the share right with. Right means match."]
        return Table("Resilience and boost", ["reading", "resilience", "boost"], rows, notes)

    def _citations(self) -> Table:
        num_gold = np.asarray([len(q.gold_ids) for q in self.asked], np.float64)
        rows: list[list[Cell]] = []
        for entry in self.entries:
            if not entry.generates or not self.values[entry, "cited"].any():
                continue
            right, cited = (self.values[entry, name] for name in ("cited_right", "cited"))
            citing = Bootstrap((cited > 0)[:, None], groups_N=self.groups_N, **self.options).mean(0)
            rows.append([entry.label, self._ratio(right, cited), self._ratio(right, num_gold)])
            rows[-1].append(citing)
        columns = ["reading", "precision", "recall", "answers that cite"]
        return Table("Citations of the gold passages", columns, rows)

    def _ratio(self, part_N: np.ndarray, whole_N: np.ndarray) -> Interval | None:
        if not whole_N.any():
            return None
        shares = np.divide(part_N, whole_N, out=np.zeros_like(part_N), where=whole_N > 0)
        return Bootstrap(
            shares[:, None], weights_N=whole_N, groups_N=self.groups_N, **self.options
        ).mean(0)

    def _plots(self) -> list[Plot]:
        plots = []
        for name in ("nll", "em", "f1"):
            measure = self.measures.get(name)
            if measure is None:
                continue
            series: dict[str, list[tuple[float | str, Interval]]] = {}
            for entry in measure.entries:
                if entry.reading.rate is not None and entry.model == "model":
                    point = (float(entry.reading.rate), measure.mean(entry))
                    kind = entry.label.replace(f"@{entry.reading.rate}", "")
                    series.setdefault(kind, []).append(point)
            lines = {
                e.label: measure.mean(e).value for e in measure.entries if e.reading.rate is None
            }
            plots.append(Plot(f"{name} by rate", "tokens a row", name, series, lines, log_x=True))
        places = self._groups().get("place of the gold passage")
        if places is not None:
            plots.append(self._place_plot(places))
        return plots

    def _place_plot(self, labels: list[str]) -> Plot:
        series: dict[str, list[tuple[float | str, Interval]]] = {}
        for label in sorted(set(labels) - {"-"}, key=_natural):
            measure = self.measures["nll"].of(np.asarray([other == label for other in labels]))
            for entry in measure.entries:
                if entry.model == "model" and entry.reading.kind in ("rows", "full", "none"):
                    series.setdefault(entry.label, []).append((label, measure.mean(entry)))
        return Plot("nll by place of the gold passage", "place", "nll", series)


def _kind_of_answer(question: AskedQuestion) -> str:
    """As the data has it; where that says nothing of the question, by its first answer."""
    if question.kind or question.detail:
        return question.detail or "-"
    return answer_kind(question.references[0])


def _natural(label: str) -> tuple[float, str]:
    return (float(label), "") if label.isdecimal() else (float("inf"), label)
