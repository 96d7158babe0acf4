"""Mixture: several lists of conversations as one data set, each with its weight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from refrag_lightning.data.conversations import Conversation, ConversationSource
from refrag_lightning.data.rows import Split


@dataclass
class WeightedSource:
    """A source of a mixture.

    Attributes:
        source: The conversations.
        weight: How often each of them comes in an epoch, on average: 2 is twice, 0.5 every other
            one, drawn anew in each epoch.
    """

    source: ConversationSource
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight ({self.weight}) must be above 0")


class Mixture(Dataset):
    """Conversations of several sources, each as often as its weight says.

    The whole part of a weight repeats every conversation; the rest is drawn from NumPy's global
    random state when an item is looked up.

    Args:
        parts: The conversations of each source.
        weights: The weight of each source.
        lengths: Tokens of each conversation, for each source, where batches are sized by tokens.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Conversation]],
        weights: Sequence[float],
        lengths: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.parts = parts
        self.whole = [int(w) * len(part) for part, w in zip(parts, weights, strict=True)]
        sizes = [round(w * len(part)) for part, w in zip(parts, weights, strict=True)]
        self.starts = np.cumsum([0, *sizes])
        if lengths is not None:
            self.lengths = np.concatenate(
                [self._lengths(n, size, lengths[n]) for n, size in enumerate(sizes)]
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Conversation:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part, place = self.parts[number], index - int(self.starts[number])
        if place >= self.whole[number]:
            return part[np.random.randint(len(part))]
        return part[place % len(part)]

    def _lengths(self, number: int, size: int, lengths: np.ndarray) -> np.ndarray:
        """The lengths of a source's items: of what is drawn, the mean."""
        if not size:
            return lengths[:0]
        repeated = np.resize(lengths, size)
        repeated[self.whole[number] :] = int(np.ceil(lengths.mean()))
        return repeated


def learnable(source: ConversationSource, split: Split) -> Iterator[Conversation]:
    """Yields a split's conversations in which the assistant says something to be learnt.

    Warns of the others at the end.
    """
    left_out = 0
    for conversation in source.conversations(split):
        if conversation.is_learnable:
            yield conversation
        else:
            left_out += 1
    if left_out:
        warnings.warn(
            f"{left_out} {split} conversations of {json.dumps(source.key())} are left out: the "
            "assistant says nothing to be learnt",
            stacklevel=2,
        )


def short_ones(
    parts: list[list[Conversation]], lengths: list[np.ndarray], max_length: int
) -> tuple[list[list[Conversation]], list[np.ndarray]]:
    """The conversations of at most `max_length` positions, and their lengths; warns of the others.

    Args:
        parts: The conversations of each source.
        lengths: Positions of each of them, for each source.
        max_length: Most positions.

    Raises:
        ValueError: If none is left.
    """
    kept = [lengths_of_part <= max_length for lengths_of_part in lengths]
    num_long, total = sum(int((~k).sum()) for k in kept), sum(map(len, kept))
    if num_long == total:
        raise ValueError(f"max_length ({max_length}) is less than every conversation takes")
    if num_long:
        warnings.warn(
            f"{num_long} of {total} training conversations take more than max_length "
            f"({max_length}) positions and are left out",
            stacklevel=2,
        )
    short = [
        [conversation for conversation, keep in zip(part, k, strict=True) if keep]
        for part, k in zip(parts, kept, strict=True)
    ]
    return short, [part[k] for part, k in zip(lengths, kept, strict=True)]
