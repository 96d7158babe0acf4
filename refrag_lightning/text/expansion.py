"""Which rows stand as their own decoder tokens: from what a caller says to a mask a document."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal

import numpy as np

ExpandText = Literal["none", "all"] | float | Sequence[int]
"""For one text: `none`, `all`, a share of its rows drawn at random, or the indices of its rows."""

Expand = Literal["none", "all"] | float | Sequence[int] | Sequence[ExpandText]
"""For all texts `none`, `all` or a share; or for each text its own (for a single text, the indices
of its rows)."""


def expansion_masks(num_rows: Sequence[Sequence[int]], expand: Expand) -> list[list[np.ndarray]]:
    """For each text and document, which of its rows are expanded.

    A share is drawn with NumPy's global random state, which the loaders seed.

    Args:
        num_rows: For each text, the rows of each of its documents.
        expand: What the caller said.

    Returns:
        For each text and document a boolean mask over its rows.

    Raises:
        ValueError: If `expand` is none of its forms, or names a row that a text does not have.
    """
    choices: list[ExpandText]
    if isinstance(expand, str) or _is_share(expand):
        choices = [expand] * len(num_rows)  # type: ignore[list-item]
    else:
        choices = list(expand)  # type: ignore[arg-type]
        is_list = not choices or not isinstance(choices[0], Sequence | np.ndarray | float)
        if len(num_rows) == 1 and is_list:
            choices = [choices]  # type: ignore[list-item]
    if len(choices) != len(num_rows):
        raise ValueError(f"expand holds {len(choices)} entries for {len(num_rows)} texts")
    masks = []
    for number, (counts, chosen) in enumerate(zip(num_rows, choices, strict=True)):
        mask = _mask(sum(counts), chosen, number)
        masks.append(np.split(mask, np.cumsum(counts)[:-1]) if counts else [])
    return masks


def num_expanded(num_rows: int, share: float) -> int:
    """How many rows a share is, rounded; at least one unless the share is 0 or there is none."""
    return max(1, round(share * num_rows)) if share and num_rows else 0


def _mask(num_rows: int, chosen: ExpandText, number: int) -> np.ndarray:
    """The rows (C,) of one text that are expanded."""
    if isinstance(chosen, str):
        if chosen not in ("none", "all"):
            raise ValueError(
                f"expand ({chosen!r}) must be 'none', 'all', a share or a list of row indices"
            )
        return np.full(num_rows, chosen == "all")
    if _is_share(chosen):
        return _draw(num_rows, float(chosen))  # type: ignore[arg-type]
    if np.asarray(chosen).dtype == bool:
        raise ValueError(f"expand: text {number} has a mask, where row indices are expected")
    rows = np.asarray(chosen, dtype=np.int64).reshape(-1)
    wrong = rows[(rows < 0) | (rows >= num_rows)]
    if wrong.size:
        raise ValueError(f"expand: text {number} has {num_rows} rows, no row {wrong[0]}")
    mask = np.zeros(num_rows, dtype=bool)
    mask[rows] = True
    return mask


def _draw(num_rows: int, share: float) -> np.ndarray:
    if not 0 <= share <= 1:
        raise ValueError(f"expand ({share}) as a share of the rows must lie between 0 and 1")
    mask = np.zeros(num_rows, dtype=bool)
    if count := num_expanded(num_rows, share):
        mask[np.random.choice(num_rows, count, replace=False)] = True
    return mask


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, int)
