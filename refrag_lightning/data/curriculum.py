"""The geometric curriculum: how many examples of which size of context, stage by stage.

The table follows from three rules, which give Table 8 of "REFRAG: Rethinking RAG based Decoding"
(arXiv 2509.01092) cell by cell:

1. The sizes double, and each third of them has twice the examples of the third before: 2000 of
   each of the paper's sizes 1, 2, 4, then 4000 of each of 8, 16, 32, then 8000 of each of 64, 128,
   256 (42,000 in all).
2. Of the smallest size, two thirds (1333) stand in the first stage; each next size has a quarter
   of that, rounded down (333, 83, 20, 5, 1), and no size less than 1.
3. Over the stages a size's examples form a geometric series, whose ratio follows from its first
   term and its total: 0.33 for the smallest, 0.895, 1.23, 1.75, 2.13, 2.66, and 2.92 for the rest.

So training begins with contexts of one row and ends with the longest ones. Other totals keep the
shares of the table; other numbers of sizes and stages go through the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The scale of the paper's table, at which its first terms are whole numbers.
_FIRST_TOTAL = 2000


@dataclass(frozen=True)
class Curriculum:
    """Sizes of context, in rows, over the stages of training.

    Attributes:
        max_rows: Rows of the longest context. Sizes double from `min_rows` up to it; where it is
            no such double it is the last size all the same.
        num_stages: Stages.
        num_examples: Examples in all.
        min_rows: Rows of the shortest context.

    Raises:
        ValueError: If a number is less than 1, or `min_rows` is more than `max_rows`.
    """

    max_rows: int = 256
    num_stages: int = 9
    num_examples: int = 42000
    min_rows: int = 1

    def __post_init__(self) -> None:
        for name in ("max_rows", "num_stages", "num_examples", "min_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.min_rows > self.max_rows:
            raise ValueError(
                f"min_rows ({self.min_rows}) must be at most max_rows ({self.max_rows})"
            )

    @property
    def sizes(self) -> np.ndarray:
        """(L,) rows of a context, from the shortest size to the longest."""
        sizes = [self.min_rows]
        while sizes[-1] < self.max_rows:
            sizes.append(min(2 * sizes[-1], self.max_rows))
        return np.asarray(sizes, dtype=np.int64)

    def shares(self) -> np.ndarray:
        """(L, stages) share of the examples in each cell; they sum to 1."""
        num_sizes = len(self.sizes)
        table = np.zeros((num_sizes, self.num_stages))
        for place in range(num_sizes):
            total = _FIRST_TOTAL * 2 ** (3 * place // num_sizes)
            first = max(2 * _FIRST_TOTAL // 3 // 4**place, 1)
            series = _ratio(total / first, self.num_stages) ** np.arange(self.num_stages)
            # One stage alone has no ratio and takes everything.
            table[place] = total * series / series.sum()
        return table / table.sum()

    def stage_table(self) -> np.ndarray:
        """(L, stages) number of examples of each size in each stage.

        The whole is `num_examples` and each row its share of it, rounded; inside a row the cells
        with the largest remainders are rounded up, so none is off by a whole example.
        """
        shares = self.shares() * self.num_examples
        totals = _rounded(shares.sum(axis=1))
        return np.stack(
            [
                _rounded(row * (total / row.sum())) if total else np.zeros(len(row), np.int64)
                for row, total in zip(shares, totals, strict=True)
            ]
        )

    def schedule(self, seed: int) -> np.ndarray:
        """(N,) rows of each training example in order, shuffled within each stage.

        Args:
            seed: Seed of the shuffling.
        """
        stages = []
        for stage, counts in enumerate(self.stage_table().T):
            rows = np.repeat(self.sizes, counts)
            stages.append(np.random.default_rng([seed, stage]).permutation(rows))
        return np.concatenate(stages)


def _ratio(total: float, num_terms: int) -> float:
    """The ratio r > 0 with 1 + r + r^2 + … (`num_terms` terms) = `total`, or 0 if there is none."""
    if num_terms == 1 or total <= 1:
        return 0.0
    powers = np.arange(num_terms)
    # The sum grows with r and is at least 1 + r, so r lies below `total`.
    low, high = 0.0, float(total)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle**powers).sum() < total else (low, middle)
    return (low + high) / 2


def _rounded(values: np.ndarray) -> np.ndarray:
    """Whole numbers with the same (whole) sum, each less than 1 from its value."""
    total = round(float(values.sum()))
    whole = np.floor(values + 1e-9).astype(np.int64)
    rest = total - int(whole.sum())
    whole[np.argsort(whole - values, kind="stable")[:rest]] += 1
    return whole
