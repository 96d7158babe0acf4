"""How often a search finds the passage that holds the answer.

Recall at k is the share of a question's gold passages that are among the first k hits, averaged
over the questions; with one gold passage each it is how often that one is found. A question whose
gold passage is not in the index counts as one where it was not found, and is told apart.

A gold passage is recognised in the store by its text, white space aside: a whole document of the
store (any of its passages then counts), or one passage. Where no text is the same, a document of
the same id and title is it, provided the id names one text only among all the questions' passages
(those that number them 1 to 10 for each question name none).

The intervals are those of `evaluation.gap`: a bootstrap over questions, those with the same gold
passages drawn together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refrag_lightning.evaluation.gap import Bootstrap, Interval, groups_of

if TYPE_CHECKING:
    from refrag_lightning.data.questions import Passage as QuestionPassage
    from refrag_lightning.data.questions import Question
    from refrag_lightning.retrieval.passages import Passage
    from refrag_lightning.retrieval.search import Searcher

KS = (1, 5, 10)
_BATCH = 64  # questions a search


@dataclass(frozen=True)
class Recall:
    """How well one method finds gold passages.

    Attributes:
        method: Of the search.
        at: Recall for each k.
        mean_reciprocal_rank: Mean of 1 / rank of the first gold passage, 0 where none is among
            the hits up to the largest k.
        num_questions: Questions with a gold passage; all of them count.
        num_without_gold: Questions left out, for they have no gold passage.
        num_not_indexed: Questions with a gold passage that the index does not hold.
        num_groups: What the intervals draw: questions, those with the same gold passages as one.
        seconds_per_question: Of the search, the reading of the store left out.
    """

    method: str
    at: dict[int, Interval]
    mean_reciprocal_rank: Interval
    num_questions: int
    num_without_gold: int
    num_not_indexed: int
    num_groups: int
    seconds_per_question: float


@dataclass(frozen=True)
class GoldQuestion:
    """A question and which passages of a store are gold.

    Attributes:
        question: The question.
        golds: For each gold passage the ids of the store's passages that count as it; empty where
            the store does not hold it.
    """

    question: str
    golds: tuple[frozenset[str], ...]


def gold_questions(
    passages: Iterable[Passage], questions: Iterable[Question]
) -> list[GoldQuestion]:
    """Recognises the gold passages of questions in a store; see the module.

    Args:
        passages: All passages of the store.
        questions: The questions; those without gold passages come out with empty `golds`.
    """
    documents: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        documents[passage.document_id].append(passage)
    by_text: dict[str, set[str]] = defaultdict(set)
    by_name: dict[tuple[str, str], set[str]] = {}
    for document_id, parts in documents.items():
        parts.sort(key=lambda passage: passage.start)
        ids = {passage.id for passage in parts}
        by_text[_bare(_whole(parts))] |= ids
        for passage in parts:
            by_text[_bare(passage.text)].add(passage.id)
        by_name[document_id, _bare(parts[0].title)] = ids

    questions = list(questions)
    texts: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        for given in question.passages:
            texts[given.id].add(_bare(given.text))

    def matches(gold: QuestionPassage) -> frozenset[str]:
        found = by_text.get(_bare(gold.text), set())
        if not found and gold.id and len(texts[gold.id]) == 1:
            found = by_name.get((gold.id, _bare(gold.title)), set())
        return frozenset(found)

    return [
        GoldQuestion(
            question.question,
            tuple(matches(passage) for passage in question.passages if passage.gold),
        )
        for question in questions
    ]


def recall_at(
    searcher: Searcher,
    questions: Sequence[Question] | Sequence[GoldQuestion],
    ks: Sequence[int] = KS,
    *,
    seed: int = 0,
) -> Recall:
    """Measures a search.

    Args:
        searcher: The search.
        questions: Questions with gold passages; or what `gold_questions` made of them for this
            store, so that several searches need not recognise them again.
        ks: How many hits count; several.
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no k, one is less than 1, no question has a gold passage, or the store
            holds none of them.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise ValueError(f"ks ({list(ks)}) must be one number or more, each at least 1")
    golden = _golden(searcher, questions)
    asked = [question for question in golden if question.golds]
    if not asked:
        raise ValueError(f"none of the {len(golden)} questions has a passage marked as gold")
    not_indexed = sum(not all(question.golds) for question in asked)
    if not any(gold for question in asked for gold in question.golds):
        raise ValueError(
            f"the index holds no gold passage of the {len(asked)} questions: their passages are "
            "recognised by equal texts, or by id and title"
        )
    # The first search may read the store again; that is no part of a search's time.
    searcher.search([asked[0].question], k=ks[-1])
    begun = time.perf_counter()
    hits = [
        found
        for start in range(0, len(asked), _BATCH)
        for found in searcher.search(
            [question.question for question in asked[start : start + _BATCH]], k=ks[-1]
        )
    ]
    seconds = time.perf_counter() - begun
    values = []
    for question, found in zip(asked, hits, strict=True):
        firsts = [_first(gold, [hit.passage.id for hit in found]) for gold in question.golds]
        recalls = [sum(first <= k for first in firsts) / len(firsts) for k in ks]
        values.append([*recalls, 1 / min(firsts)])
    groups = groups_of([[name for gold in question.golds for name in gold] for question in asked])
    bootstrap = Bootstrap(np.array(values), groups_N=groups, seed=seed)
    intervals = [bootstrap.mean(column) for column in range(len(ks) + 1)]
    return Recall(
        method=searcher.method,
        at=dict(zip(ks, intervals[:-1], strict=True)),
        mean_reciprocal_rank=intervals[-1],
        num_questions=len(asked),
        num_without_gold=len(golden) - len(asked),
        num_not_indexed=not_indexed,
        num_groups=bootstrap.num_groups,
        seconds_per_question=seconds / len(asked),
    )


def _golden(
    searcher: Searcher, questions: Sequence[Question] | Sequence[GoldQuestion]
) -> list[GoldQuestion]:
    given = [question for question in questions if isinstance(question, GoldQuestion)]
    if len(given) == len(questions):
        return given
    return gold_questions(searcher.store.passages(), questions)  # type: ignore[arg-type]


def _whole(parts: Sequence[Passage]) -> str:
    """A document's text out of its passages in order, up to white space between them."""
    text, end = "", 0
    for passage in parts:
        if passage.start > end:
            text += " "
        text += passage.text[max(0, end - passage.start) :]
        end = max(end, passage.end)
    return text


def _bare(text: str) -> str:
    return " ".join(text.split())


def _first(gold: frozenset[str], ids: Sequence[str]) -> float:
    """The rank of the first hit that is a gold passage; infinite if there is none."""
    return next((float(rank) for rank, hit in enumerate(ids, start=1) if hit in gold), np.inf)
