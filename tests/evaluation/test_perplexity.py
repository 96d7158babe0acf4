"""The report on log-perplexity, from figures worked out by hand."""

import numpy as np
import pytest

from refrag_lightning.data.perplexity import Cell
from refrag_lightning.evaluation.perplexity import Grid, perplexity_report
from refrag_lightning.evaluation.readings import Reading

CELLS = [Cell("full", 32), Cell("none", 0), Cell("last", 32), Cell("compressed", 32)]
MEANS = {"full": 1.0, "none": 2.0, "last": 1.5, "compressed": 1.2}


def _series(means=MEANS, spread=0.1, number=30):
    grid = Grid([c.task for c in CELLS], rates=[4, 8], continuations=[5, 10], num_windows=number)
    shared = np.random.default_rng(0).normal(0, spread, number)
    index, values = [], []
    for cell in CELLS:
        for rate in (4, 8) if cell.reading in ("last", "compressed") else (4,):
            # At rate 8 a tenth of a nat is lost, and later tokens are half a nat easier.
            nats = means[cell.reading] + 0.1 * (rate == 8) + shared
            for window in range(number):
                index.append(grid.index(cell.task, rate, window))
                values.append([5 * nats[window], 5, 10 * (nats[window] - 0.5), 10])
    order = np.argsort(index)
    return grid.series(np.asarray(index)[order], np.asarray(values)[order], Cell.of)


def test_numbers_are_one_for_each_cell_rate_and_window():
    grid = Grid([c.task for c in CELLS], rates=[4, 8], continuations=[5], num_windows=3)
    numbers = [grid.index(c.task, r, w) for c in CELLS for r in (4, 8) for w in range(3)]
    assert sorted(numbers) == list(range(24))


def test_grid_and_gaps_by_hand():
    series = _series()
    assert [(s.reading.name, s.context) for s in series] == [
        ("full", 32),
        ("none", 0),
        ("last@4", 32),
        ("rows@4", 32),
        ("last@8", 32),
        ("rows@8", 32),
    ]
    report, figures = perplexity_report(series, {}, num_draws=200)
    shared = figures["nll/full/32+5"] - 1.0
    assert figures["nll/none/32+10"] == pytest.approx(1.5 + shared)
    assert figures["closed/rows@4/32+5"] == pytest.approx(0.8)
    assert figures["closed/rows@8/32+10"] == pytest.approx(0.7)
    assert figures["closed/last@4/32+5"] == pytest.approx(0.5)
    grid, gaps = report.tables
    assert grid.columns[1:] == ["none", "last@4", "last@8", "rows@4", "rows@8", "full"]
    assert [row[0] for row in gaps.rows] == ["32+5", "32+10"]
    # Windows are harder or easier for every reading alike, so the share has no spread.
    closed = dict(zip(gaps.columns, gaps.rows[0], strict=True))["rows@4"]
    assert closed.high - closed.low == pytest.approx(0, abs=1e-9)
    assert grid.rows[0][1].high - grid.rows[0][1].low > 0.02


def test_no_gap_is_said():
    report, figures = perplexity_report(_series(means=dict.fromkeys(MEANS, 1.0)), {}, num_draws=50)
    assert report.tables[1].rows[0][1:] == ["undefined"] * 4
    assert not any(name.startswith("closed") for name in figures)


def test_a_model_without_rows_has_its_grid(tmp_path):
    series = [s for s in _series() if s.reading in (Reading("full"), Reading("none"))]
    report, figures = perplexity_report(series, {}, num_draws=50)
    assert [table.name for table in report.tables] == ["Log-perplexity"]
    assert {*figures} == {f"nll/{r}/32+{n}" for r in ("full", "none") for n in (5, 10)}
    assert all(path.stat().st_size for path in report.write(tmp_path))
