"""Entries (a model under a reading) and measures: one value for each question and entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refrag_lightning.evaluation.gap import Bootstrap, Interval
from refrag_lightning.evaluation.metrics import SCORES
from refrag_lightning.evaluation.readings import Reading
from refrag_lightning.evaluation.report import Cell

UNDEFINED = "undefined"
BASICS = ("nats", "tokens", "positions")
GENERATED = (*SCORES, "cited_right", "cited")
NAMES = {"model": "", "full_model": "full-text baseline", "closed_model": "closed-book baseline"}


@dataclass(frozen=True)
class Entry:
    """A model under a reading.

    Attributes:
        reading: The reading.
        model: `model`, the one that is evaluated, or a baseline trained on the same data:
            `full_model` (reads text) or `closed_model` (reads no documents).
        generates: Whether it writes answers too, beside the gold answer's likelihood.
    """

    reading: Reading
    model: str = "model"
    generates: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.reading.name if self.model == "model" else NAMES[self.model]

    @property
    def key(self) -> str:
        """Its name in logs."""
        return self.reading.name if self.model == "model" else self.model

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured of a question."""
        return (*BASICS, *GENERATED) if self.generates else BASICS


class Measure:
    """One measure of several entries, and the questions drawn again.

    Args:
        entries: The entries (E here).
        values_NE: (N, E).
        weights_N: (N,) how much each question counts; the same if None.
        groups_N: (N,) labels of questions that are drawn together.
        less: Whether less is better.
        options: Of the bootstrap.

    Attributes:
        none: What counts as no documents: the better of the model itself and the closed-book
            baseline.
        full: What counts as full text: the better of the model itself and the full-text baseline.
            On the same questions, so neither choice is in favour of what is between them.
        titles: The reading of the headers alone.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        values_NE: np.ndarray,
        weights_N: np.ndarray | None,
        groups_N: np.ndarray,
        *,
        less: bool,
        options: dict[str, Any],
    ) -> None:
        self.entries = list(entries)
        self.values_NE = values_NE
        self.weights_N = weights_N
        self.groups_N = groups_N
        self.less = less
        self.options = options
        self.bootstrap = Bootstrap(values_NE, weights_N=weights_N, groups_N=groups_N, **options)
        sign = 1 if less else -1

        def best(kind: str) -> Entry | None:
            of_kind = [entry for entry in entries if entry.reading.kind == kind]
            return min(of_kind, key=lambda e: sign * self.mean(e).value, default=None)

        self.none, self.full = best("none"), best("full")
        self.titles = next((e for e in entries if e.reading.kind == "titles"), None)

    def of(self, mask_N: np.ndarray) -> Measure:
        """The same of some of the questions; what counts as full and none stays."""
        weights = None if self.weights_N is None else self.weights_N[mask_N]
        part = Measure(
            self.entries,
            self.values_NE[mask_N],
            weights,
            self.groups_N[mask_N],
            less=self.less,
            options=self.options,
        )
        part.none, part.full = self.none, self.full
        return part

    def places(self, *entries: Entry) -> list[int]:
        """The columns of entries."""
        return [self.entries.index(entry) for entry in entries]

    def mean(self, entry: Entry) -> Interval:
        """The mean of an entry."""
        return self.bootstrap.mean(*self.places(entry))

    def closed(self, entry: Entry) -> Cell:
        """The share of the gap that an entry closes; `undefined` where there may be no gap."""
        if self.none is None or self.full is None or entry not in self.entries:
            return None
        gap = self.bootstrap.gap(*self.places(entry, self.full, self.none))
        return gap.closed if gap.defined else UNDEFINED

    def verdict(self, entry: Entry, base: Entry) -> str:
        """How a control compares with what it must not exceed.

        Returns:
            `ABOVE` where its mean is better than all of the base's interval; `better` where it is
            not, but their paired difference is above chance; `too few` where there are too few
            questions for an interval; else `ok`.
        """
        sign = -1 if self.less else 1
        bounds = self.mean(base)
        if not bounds.known:
            return "too few"
        bound = bounds.low if self.less else bounds.high
        if sign * (self.mean(entry).value - bound) > 0:
            return "ABOVE"
        difference = self.bootstrap.difference(*self.places(entry, base))
        return "better" if min(sign * difference.low, sign * difference.high) > 0 else "ok"
