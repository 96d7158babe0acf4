"""Which passages a conversation is read with: how many, which distractors, in which order.

Everything is drawn from NumPy's global random state, which the loaders seed for each batch, so
that a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refrag_lightning.data.conversations import Conversation
from refrag_lightning.data.questions import Passage

PassageOrder = Literal["given", "shuffled", "gold_first", "gold_last"]
Distractors = Literal["own", "random"]

# Draws before a passage that holds an answer is taken as a distractor after all.
_MAX_DRAWS = 50


@dataclass(frozen=True)
class PassageChoice:
    """Draws the passages of a conversation.

    Args:
        num_passages: How many, the fewest and the most, or all if None.
        order: The retriever's order, a drawn one, or the gold ones at an end.
        distractors: The conversation's own passages beside the gold ones, in the retriever's order,
            or passages of other conversations in which no right answer stands.
        drop_gold: Share of the conversations that are read without their gold passages, as after
            a weak retriever.
    """

    num_passages: int | tuple[int, int] | None = None
    order: PassageOrder = "given"
    distractors: Distractors = "own"
    drop_gold: float = 0.0

    def __post_init__(self) -> None:
        low, high = self._range(0)
        if self.num_passages is not None and not 1 <= low <= high:
            raise ValueError(
                f"num_passages ({self.num_passages}) must be at least 1, and of two numbers the "
                "smaller one first"
            )
        if not 0 <= self.drop_gold <= 1:
            raise ValueError(f"drop_gold ({self.drop_gold}) must be 0 to 1")

    def draw(self, conversation: Conversation, pool: Sequence[Conversation]) -> list[Passage]:
        """Draws the passages of a conversation.

        Args:
            conversation: The conversation.
            pool: Conversations whose passages may be random distractors.
        """
        passages = conversation.passages
        if not passages:
            return []
        dropped = self.drop_gold > 0 and np.random.random() < self.drop_gold
        gold = [] if dropped else [n for n, passage in enumerate(passages) if passage.gold]
        others = [n for n, passage in enumerate(passages) if not passage.gold]
        low, high = self._range(len(passages))
        count = int(np.random.randint(low, high + 1)) if low < high else low
        gold = gold[:count]
        if self.distractors == "own":
            placed = [(n, passages[n]) for n in [*gold, *others[: count - len(gold)]]]
        else:
            # They take the places of the own ones, and then those behind.
            places = [*others, *range(len(passages), len(passages) + count)]
            drawn = [_distractor(conversation, pool) for _ in range(count - len(gold))]
            placed = [(n, passages[n]) for n in gold] + [
                *zip(places[: len(drawn)], drawn, strict=True)
            ]
        return self._ordered([passage for _, passage in sorted(placed, key=lambda pair: pair[0])])

    def most(self, conversation: Conversation) -> list[Passage]:
        """The most own passages that are read, gold ones first counted, in the given order."""
        _, high = self._range(len(conversation.passages))
        gold = [n for n, passage in enumerate(conversation.passages) if passage.gold][:high]
        others = [n for n, passage in enumerate(conversation.passages) if not passage.gold]
        kept = sorted([*gold, *others[: high - len(gold)]])
        return [conversation.passages[n] for n in kept]

    def _range(self, num_own: int) -> tuple[int, int]:
        if self.num_passages is None:
            return num_own, num_own
        if isinstance(self.num_passages, int):
            return self.num_passages, self.num_passages
        return self.num_passages

    def _ordered(self, passages: list[Passage]) -> list[Passage]:
        if self.order == "shuffled":
            return [passages[n] for n in np.random.permutation(len(passages))]
        if self.order == "given":
            return passages
        return sorted(passages, key=lambda passage: passage.gold == (self.order == "gold_last"))


def _distractor(conversation: Conversation, pool: Sequence[Conversation]) -> Passage:
    """A passage of another conversation, one without an answer where there is one."""
    answers = [reference.casefold() for reference in conversation.references]
    passage = None
    for _ in range(_MAX_DRAWS):
        other = pool[np.random.randint(len(pool))]
        if other.id == conversation.id or not other.passages:
            continue
        found = other.passages[np.random.randint(len(other.passages))]
        # There it may be gold; here it is not.
        passage = Passage(found.text, found.id, found.title)
        if not any(answer in passage.text.casefold() for answer in answers):
            break
    if passage is None:
        raise ValueError(
            f"distractors ('random'): no passage of another conversation than {conversation.id!r} "
            "was found"
        )
    return passage
