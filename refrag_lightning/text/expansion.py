"""Which rows stand as their own decoder tokens: from what a caller says to a mask a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Expand = Literal["none", "all"] | Sequence[int] | Sequence[Sequence[int]]
"""`none`, `all`, or the indices of each text's rows (for a single text, its indices)."""


def expansion_masks(num_rows: Sequence[Sequence[int]], expand: Expand) -> list[list[np.ndarray]]:
    """For each text and document, which of its rows are expanded.

    Args:
        num_rows: For each text, the rows of each of its documents.
        expand: What the caller said.

    Returns:
        For each text and document a boolean mask over its rows.

    Raises:
        ValueError: If `expand` is none of its forms, or names a row that a text does not have.
    """
    if isinstance(expand, str):
        if expand not in ("none", "all"):
            raise ValueError(f"expand ({expand!r}) must be 'none', 'all' or lists of row indices")
        return [[np.full(n, expand == "all") for n in counts] for counts in num_rows]
    lists = list(expand)
    if len(num_rows) == 1 and (not lists or not isinstance(lists[0], Sequence | np.ndarray)):
        lists = [lists]  # type: ignore[list-item]
    if len(lists) != len(num_rows):
        raise ValueError(f"expand holds {len(lists)} lists for {len(num_rows)} texts")
    masks = []
    for number, (counts, chosen) in enumerate(zip(num_rows, lists, strict=True)):
        if np.asarray(chosen).dtype == bool:
            raise ValueError(f"expand: text {number} has a mask, where row indices are expected")
        rows = np.asarray(chosen, dtype=np.int64).reshape(-1)
        wrong = rows[(rows < 0) | (rows >= sum(counts))]
        if wrong.size:
            raise ValueError(f"expand: text {number} has {sum(counts)} rows, no row {wrong[0]}")
        mask = np.zeros(sum(counts), dtype=bool)
        mask[rows] = True
        masks.append(np.split(mask, np.cumsum(counts)[:-1]) if counts else [])
    return masks
