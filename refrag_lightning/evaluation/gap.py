"""How much of what a full reading gives is kept: shares of a gap, with paired bootstrap intervals.

An example has one value for each reading (an answer's nats, an F1, ...). Its values stand or fall
together: a draw of the bootstrap takes whole examples, so that what is hard for one reading is as
hard for the others (paired; Efron and Tibshirani 1993, percentile intervals). Everything is drawn
from the same examples: means, differences of two readings, and the share of the gap

    (compressed - none) / (full - none),

whose sign is right by itself where less is better. It says nothing where full and none do not
differ: `defined` is False where the interval of full - none holds 0.

Examples on the same thing, such as questions on one paragraph, are not independent: given as a
group, they are drawn together (the cluster bootstrap: Davison and Hinkley 1997, 3.8). Below
`MIN_GROUPS` examples or groups an estimate has no interval, and no share of a gap is defined.

SciPy's `bootstrap` draws neither groups nor several statistics from the same examples; on plain
means its percentile intervals are these within the noise of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

NUM_DRAWS = 2000
# From here on the 95 % intervals of normal values hold the mean at least 90 % of the time; of 5 it
# is 85 %, of 2 it is 49 %, and of one the interval would have no length at all.
MIN_GROUPS = 10
_CHUNK = 4_000_000  # numbers of a draw's counts that stand in memory at once


class Interval(NamedTuple):
    """An estimate and its 95 % interval; a tuple, as torchmetrics refuses frozen dataclasses.

    Attributes:
        value: Of the sample itself.
        low: 2.5 % of the draws lie below; NaN where there are too few examples for an interval.
        high: 2.5 % of the draws lie above; NaN as `low`.
    """

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def holds(self, number: float) -> bool:
        """Whether a number lies inside, the ends counted; False without an interval."""
        return self.low <= number <= self.high


class Gap(NamedTuple):
    """What `gap_closed` gives.

    Attributes:
        compressed: Mean of the compressed reading.
        full: Mean of the full reading.
        none: Mean without documents.
        full_minus_none: The gap.
        compressed_minus_none: What of it is closed.
        compressed_minus_full: What is missing.
        closed: The share; its value and interval mean nothing unless `defined`.
        defined: Whether full and none differ: their difference has an interval, and 0 is not in it.
        num_examples: How many examples were drawn from.
    """

    compressed: Interval
    full: Interval
    none: Interval
    full_minus_none: Interval
    compressed_minus_none: Interval
    compressed_minus_full: Interval
    closed: Interval
    defined: bool
    num_examples: int


class Bootstrap:
    """Means of the columns of a table over its rows, and over the same rows drawn again.

    Args:
        values_NC: (N, C) a row an example, a column a reading; no NaN.
        weights_N: (N,) how much each example counts in the means, such as its tokens; 1 if None.
        groups_N: (N,) a label for each example; those of one label are drawn together, such as what
            `groups_of` gives. Each example alone if None.
        num_draws: How often as many groups are drawn as there are.
        seed: Of the draws.

    Attributes:
        num_examples: N.
        num_groups: How many groups of those drawn from weigh anything; below `MIN_GROUPS` nothing
            has an interval.

    Raises:
        ValueError: If there is no example, or a value is not finite.
    """

    def __init__(
        self,
        values_NC: np.ndarray,
        *,
        weights_N: np.ndarray | None = None,
        groups_N: np.ndarray | None = None,
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
    ) -> None:
        values = np.asarray(values_NC, dtype=np.float64)
        if not len(values):
            raise ValueError("no example: there is nothing to draw from")
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of the values are not finite")
        weights = np.ones(len(values)) if weights_N is None else np.asarray(weights_N, np.float64)
        if weights.shape != values.shape[:1] or not (weights >= 0).all() or not weights.sum():
            raise ValueError("weights_N must hold one weight of at least 0 for each example")
        self.num_examples = len(values)
        table = np.concatenate([values * weights[:, None], weights[:, None]], axis=1)
        if groups_N is not None:
            labels, group_of_example = np.unique(groups_N, return_inverse=True)
            sums_of_groups = np.zeros((len(labels), table.shape[1]))
            np.add.at(sums_of_groups, group_of_example, table)
            table = sums_of_groups
        # One that weighs nothing tells nothing: of 40 answers only one may cite.
        self.num_groups = int((table[:, -1] > 0).sum())
        sums = np.concatenate([counts @ table for counts in _draws(len(table), num_draws, seed)])
        self._means = np.concatenate([table.sum(0)[None], sums])
        with np.errstate(invalid="ignore", divide="ignore"):
            self._means = self._means[:, :-1] / self._means[:, -1:]

    def mean(self, column: int) -> Interval:
        """The mean of a column."""
        return self._interval(self._means[:, column])

    def difference(self, column: int, other: int) -> Interval:
        """The mean of a column minus that of another."""
        return self._interval(self._means[:, column] - self._means[:, other])

    def share(self, compressed: int, full: int, none: int) -> Interval:
        """The share of the gap between `none` and `full` that `compressed` closes; see `Gap`."""
        means = self._means
        with np.errstate(invalid="ignore", divide="ignore"):
            gaps = means[:, full] - means[:, none]
            return self._interval((means[:, compressed] - means[:, none]) / gaps)

    def gap(self, compressed: int, full: int, none: int) -> Gap:
        """Everything about three columns."""
        full_minus_none = self.difference(full, none)
        return Gap(
            compressed=self.mean(compressed),
            full=self.mean(full),
            none=self.mean(none),
            full_minus_none=full_minus_none,
            compressed_minus_none=self.difference(compressed, none),
            compressed_minus_full=self.difference(compressed, full),
            closed=self.share(compressed, full, none),
            defined=full_minus_none.known and not full_minus_none.holds(0.0),
            num_examples=self.num_examples,
        )

    def _interval(self, values: np.ndarray) -> Interval:
        """Of the sample (first) and its draws; those without a value (0 / 0) are left out."""
        draws = values[1:][~np.isnan(values[1:])]
        if self.num_groups < MIN_GROUPS or not draws.size:
            return Interval(float(values[0]), math.nan, math.nan)
        # Not interpolated: a share of a gap may be infinite.
        low, high = np.percentile(draws, (2.5, 97.5), method="inverted_cdf")
        return Interval(float(values[0]), float(low), float(high))


def groups_of(shared: Sequence[Collection[Hashable]]) -> np.ndarray:
    """Groups of examples that stand on the same things.

    Examples that share only some of them are apart: through others, all might hang together.

    Args:
        shared: For each example what it stands on, such as its gold passages.

    Returns:
        (N,) for each example the first one of its group; its own number where it has nothing.
    """
    first: dict[Hashable, int] = {}
    numbers = [first.setdefault(frozenset(s) or n, n) for n, s in enumerate(shared)]
    return np.asarray(numbers, dtype=np.int64)


def gap_closed(
    compressed: Sequence[float] | np.ndarray,
    full: Sequence[float] | np.ndarray,
    none: Sequence[float] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Gap:
    """The share of the gap that the compressed reading closes, with its intervals.

    Args:
        compressed: (N,) value of each example, read compressed.
        full: (N,) read as text.
        none: (N,) without documents.
        weights: (N,) how much each example counts, such as its tokens; all the same if None.
        groups: (N,) labels of what is drawn together; each example alone if None.
        num_draws: Draws of the bootstrap.
        seed: Of the draws.

    Raises:
        ValueError: If there is no example, or a value is not finite.
    """
    return Bootstrap(
        np.stack([np.asarray(column, np.float64) for column in (compressed, full, none)], axis=1),
        weights_N=None if weights is None else np.asarray(weights, np.float64),
        groups_N=None if groups is None else np.asarray(groups),
        num_draws=num_draws,
        seed=seed,
    ).gap(0, 1, 2)


class ValueTable(Metric):
    """One row of values an example, gathered over all ranks and put in order.

    A sampler may hand an example to two ranks; it stands in the table once.

    Args:
        num_columns: Values of an example.
        kwargs: torchmetrics' own.
    """

    full_state_update = False
    index: list[Tensor]
    values: list[Tensor]

    def __init__(self, num_columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_columns = num_columns
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, index_N: Tensor, values_NC: Tensor) -> None:
        """Adds examples.

        Args:
            index_N: (N,) the number of each example in the data.
            values_NC: (N, C) its values, one a column; NaN where there is none.
        """
        assert values_NC.shape == (len(index_N), self.num_columns)
        self.index.append(index_N.long().to(self.device))
        # MPS has no float64; the values are small enough for float32 there.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.values.append(values_NC.to(self.device, dtype))

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples' numbers (N,), rising, and their values (N, C)."""
        if isinstance(self.index, list) and not self.index:
            return np.zeros(0, np.int64), np.zeros((0, self.num_columns))
        numbers = dim_zero_cat(self.index).cpu().numpy()
        values = dim_zero_cat(self.values).double().cpu().numpy()
        index, first = np.unique(numbers, return_index=True)
        return index, values[first]


def _draws(num_examples: int, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each example stands in each draw, (draws, N) at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // num_examples)
    chances = np.full(num_examples, 1 / num_examples)
    for start in range(0, num_draws, size):
        yield rng.multinomial(num_examples, chances, size=min(size, num_draws - start)).astype(
            np.float64
        )
