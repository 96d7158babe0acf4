"""The report on log-perplexity: a grid of contexts and continuations, by reading of the context.

Figures are in nats a token (log-perplexity), over all tokens of all windows. Intervals draw whole
windows, the same ones for every reading, so that differences and shares of the gap are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refrag_lightning.evaluation.gap import MIN_GROUPS, NUM_DRAWS, Bootstrap, Interval
from refrag_lightning.evaluation.readings import Kind, Reading
from refrag_lightning.evaluation.report import Cell, Plot, Report, Table

WITHOUT_RATE: tuple[Kind, ...] = ("full", "none")
_NAMES: dict[str, Any] = {"compressed": "rows", "last": "last"}


class Series(NamedTuple):
    """One reading of contexts of one length.

    Attributes:
        reading: How the context is read.
        context: Its decoder tokens; 0 where it is not read.
        values: Continuation's tokens -> (nats (N,), tokens (N,)) of the windows, in their order.
    """

    reading: Reading
    context: int
    values: dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Grid:
    """Numbers for the rows of a `gap.ValueTable`: one for each cell, rate and window.

    Attributes:
        cells: Names of the cells (a reading and a context).
        rates: Tokens a row.
        continuations: Tokens of the continuations.
        num_windows: Windows.
    """

    cells: Sequence[str]
    rates: Sequence[int]
    continuations: Sequence[int]
    num_windows: int

    def index(self, cell: str, rate: int, window: int) -> int:
        """The number of a window read in a cell at a rate."""
        assert 0 <= window < self.num_windows
        place = self.rates.index(rate) * len(self.cells) + self.cells.index(cell)
        return place * self.num_windows + window

    def series(
        self, index_N: np.ndarray, values_NC: np.ndarray, cell_of: Callable[[str], Any]
    ) -> list[Series]:
        """What was measured, by reading and context.

        Args:
            index_N: (N,) numbers, rising.
            values_NC: (N, C) nats and tokens of each continuation, one pair behind the other.
            cell_of: Gives `reading` and `context` of a cell's name.
        """
        found = []
        for place in np.unique(index_N // self.num_windows):
            rate, name = divmod(int(place), len(self.cells))
            cell = cell_of(self.cells[name])
            rows = values_NC[index_N // self.num_windows == place]
            values = {
                length: (rows[:, 2 * n], rows[:, 2 * n + 1])
                for n, length in enumerate(self.continuations)
            }
            if cell.reading in WITHOUT_RATE:
                reading = Reading(cell.reading)
            else:
                reading = Reading(_NAMES[cell.reading], self.rates[rate])
            found.append(Series(reading, cell.context, values))
        return found


def perplexity_report(
    series: Sequence[Series],
    settings: dict[str, Any],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> tuple[Report, dict[str, float]]:
    """The report, and its figures by name for logs.

    Args:
        series: What was measured; every series of the same windows.
        settings: What was evaluated, on what, and how.
        num_draws: Draws of the bootstrap.
        seed: Of the draws.
    """
    readings = sorted({s.reading for s in series}, key=_order)
    contexts = sorted({s.context for s in series if s.context})
    continuations = list(series[0].values)
    figures: dict[str, float] = {}
    nats_rows: list[list[Cell]] = []
    gap_rows: list[list[Cell]] = []
    points: dict[str, list[tuple[float | str, Interval]]] = {}
    by_place = {(s.reading, s.context): s for s in series}
    shared = [r for r in readings if r.kind not in WITHOUT_RATE]
    for context in contexts or [0]:
        # Without a context there is nothing that its length could change.
        there = [by_place.get((r, context), by_place.get((r, 0))) for r in readings]
        columns = {r: s for r, s in zip(readings, there, strict=True) if s is not None}
        for length in continuations:
            table = [columns[r].values[length] for r in columns]
            tokens = table[0][1]
            assert all(np.array_equal(tokens, other) for _, other in table), "the same targets"
            boot = Bootstrap(
                np.stack([nats / tokens for nats, _ in table], axis=1),
                weights_N=tokens,
                num_draws=num_draws,
                seed=seed,
            )
            places = {r: n for n, r in enumerate(columns)}
            means = {r: boot.mean(n) for r, n in places.items()}
            nats_rows.append([f"{context}+{length}", *(means.get(r) for r in readings)])
            for reading, mean in means.items():
                figures[f"nll/{reading.name}/{context}+{length}"] = mean.value
                if length == continuations[-1]:
                    points.setdefault(reading.name, []).append((float(context), mean))
            gap_row: list[Cell] = [f"{context}+{length}"]
            full, none = (places.get(Reading(kind)) for kind in WITHOUT_RATE)
            if full is None or none is None:
                continue
            for reading in shared:
                gap = boot.gap(places[reading], full, none)
                gap_row.append(gap.closed if gap.defined else "undefined")
                if gap.defined:
                    name = f"closed/{reading.name}/{context}+{length}"
                    figures[name] = gap.closed.value
            gap_rows.append(gap_row)
    first = "context+continuation"
    notes = ["Nats a token; context and continuation in decoder tokens."]
    notes += [
        "Brackets: 95 % intervals of a paired bootstrap over windows, none of fewer than "
        f"{MIN_GROUPS}."
    ]
    tables = [Table("Log-perplexity", [first, *(r.name for r in readings)], nats_rows, notes)]
    notes = ["Share of the gap closed: (reading - none) / (full - none)."]
    notes += [f"undefined: full - none may be 0, or there are fewer than {MIN_GROUPS} windows."]
    tables.append(Table("Gap closed", [first, *(r.name for r in shared)], gap_rows, notes))
    plot = Plot(
        f"nats a token over {continuations[-1]} tokens by context",
        "decoder tokens of context",
        "nats a token",
        points,
        log_x=True,
    )
    report = Report(
        "Log-perplexity after compressed contexts",
        settings,
        [table for table in tables if table.rows and len(table.columns) > 1],
        [plot] if contexts else [],
    )
    return report, figures


def _order(reading: Reading) -> tuple[int, int]:
    return (["none", "last", "rows", "full"].index(reading.kind), reading.rate or 0)
