"""Mixture: several lists of conversations as one data set, each with its weight.

Its items are contexts: the conversations that are read behind the same passages, mostly one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


Context = tuple[Conversation, ...]
"""Conversations that begin alike and are read behind the same passages."""


class Mixture(Dataset):
    """Contexts of several sources, each as often as its weight says.

    The whole part of a weight repeats every context; the rest is drawn from NumPy's global
    random state when an item is looked up.

    Args:
        parts: The contexts of each source.
        weights: The weight of each source.
        lengths: Tokens of each context, for each source, where batches are sized by tokens.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Context]],
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

    def __getitem__(self, index: int) -> Context:
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
    parts: list[list[Context]], lengths: list[np.ndarray], max_length: int
) -> tuple[list[list[Context]], list[np.ndarray]]:
    """The contexts of at most `max_length` positions, and their lengths; warns of the others.

    Args:
        parts: The contexts of each source.
        lengths: Positions of each of them, for each source.
        max_length: Most positions.

    Raises:
        ValueError: If none is left.
    """
    kept = [lengths_of_part <= max_length for lengths_of_part in lengths]
    num_long, total = sum(int((~k).sum()) for k in kept), sum(map(len, kept))
    if num_long == total:
        raise ValueError(f"max_length ({max_length}) is less than every context takes")
    if num_long:
        warnings.warn(
            f"{num_long} of {total} training contexts take more than max_length "
            f"({max_length}) positions and are left out",
            stacklevel=2,
        )
    short = [
        [context for context, keep in zip(part, k, strict=True) if keep]
        for part, k in zip(parts, kept, strict=True)
    ]
    return short, [part[k] for part, k in zip(lengths, kept, strict=True)]


def contexts_of(part: Sequence[Conversation], most: int) -> list[Context]:
    """Puts conversations on the same gold passages together, as evenly as can be.

    Args:
        part: The conversations of a source; those without gold passages stay alone.
        most: Conversations behind one context at most.

    Returns:
        The contexts, in the order of their first conversations.
    """
    behind: dict[Any, list[Conversation]] = {}
    for number, conversation in enumerate(part):
        gold = tuple(passage.text for passage in conversation.passages if passage.gold)
        behind.setdefault(gold or number, []).append(conversation)
    contexts: list[Context] = []
    for conversations in behind.values():
        number = -(-len(conversations) // most)
        contexts += [tuple(conversations[start::number]) for start in range(number)]
    return contexts


def as_one(context: Context) -> Conversation:
    """The conversation to draw a context's passages for.

    No passage beside the gold ones may hold an answer of any of its conversations.
    """
    first, *others = context
    if not others:
        return first
    answers = [a.casefold() for conversation in others for a in conversation.references]
    kept = tuple(
        passage
        for passage in first.passages
        if passage.gold or not any(answer in passage.text.casefold() for answer in answers)
    )
    references = tuple(dict.fromkeys(r for c in context for r in c.references))
    return replace(first, passages=kept, references=references)
