"""Scores of written answers against reference answers.

Each score is a function of one answer and one reference, in [0, 1], and of several references the
best one counts. Exact match and F1 are those of SQuAD (arXiv 1606.05250; of empty answers, the 2.0
script's rule). ROUGE-L is the F-measure of Lin (ACL W04-1013) over lower-case words and numbers, as
the rouge-score package computes it without stemming.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from refrag_lightning.text.documents import find_citations

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[a-z0-9]+")
# Where one word of a text ends though no space follows: Einstein's, Paris-based, Paris,France.
_INNER_BREAK = re.compile(r"'s\b|,(?!\d)|(?<!\d),|[!-&(-+\-/:-@\[-`{-~]")
# Scripts without spaces between words: Thai to Myanmar, Khmer, Han, Kana, Hangul (whose particles
# are written to the word), Yi.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf"
    "\u4e00-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U0001aff0-\U0001b16f\U00020000-\U0003ffff]"
)


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where both have the same normal form, else 0."""
    return float(normalise(answer) == normalise(reference))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms."""
    mine, wanted = normalise(answer).split(), normalise(reference).split()
    if not mine or not wanted:
        return float(mine == wanted)
    same = (Counter(mine) & Counter(wanted)).total()
    return 2 * same / (len(mine) + len(wanted))


def match(answer: str, reference: str) -> float:
    """1 where the words of the reference's normal form stand in a row in the answer's, else 0.

    Words are whole: "know" does not hold "no". In scripts without spaces (Chinese, Japanese, Thai,
    ...) each character counts as a word, and so does each Hangul syllable. A word also ends at a
    hyphen and before a possessive 's. Long answers are favoured, so it is no score to be reported
    alone. An empty reference stands in an empty answer only.
    """
    # One form for full-width and combined characters, and for both apostrophes.
    mine, wanted = (
        unicodedata.normalize("NFKC", text.lower()).replace("\u2019", "'")
        for text in (answer, reference)
    )
    if not _words(wanted):
        return float(not _words(mine))
    if _in_a_row(wanted, mine):
        return 1.0
    return float(_in_a_row(*(_INNER_BREAK.sub(" ", text) for text in (wanted, mine))))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words."""
    mine, wanted = (_WORD.findall(text.lower()) for text in (answer, reference))
    if not mine or not wanted:
        return 0.0
    return 2 * _common_subsequence(mine, wanted) / (len(mine) + len(wanted))


SCORES: dict[str, Callable[[str, str], float]] = {
    "em": exact_match,
    "f1": f1,
    "match": match,
    "rouge_l": rouge_l,
}
"""The scores by the names that reports and curves give them."""


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Every score of an answer, each against the reference that is best for it.

    Args:
        answer: What the model wrote.
        references: The answers that count as right.

    Raises:
        ValueError: If there is no reference.
    """
    if not references:
        raise ValueError(f"the answer {answer!r} has no reference to be scored against")
    return {name: max(score(answer, r) for r in references) for name, score in SCORES.items()}


def split_citations(answer: str, ids: Collection[str]) -> tuple[str, list[str]]:
    """Takes citations such as `[7]` or `[7, 12]` out of an answer, the white space before them too.

    Args:
        answer: What the model wrote.
        ids: Ids of the documents that it was shown.

    Returns:
        The answer without them, and the cited ids, each once, in order; see `find_citations`.
    """
    kept, done = [], 0
    cited: dict[str, None] = {}
    for start, end, names in find_citations(answer, ids):
        kept.append(answer[done:start].rstrip())
        cited.update(dict.fromkeys(names))
        done = end
    return "".join([*kept, answer[done:]]), list(cited)


class AnswerScores(Metric):
    """Means of `em`, `f1`, `match` and `rouge_l` over answers, on several ranks too.

    Citations such as ` [3]`, which no reference has, are taken out of the answers.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(len(SCORES), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds answers.

        Args:
            answers: What the model wrote.
            references: For each answer those that count as right.

        Raises:
            ValueError: If an answer has no references.
        """
        for answer, wanted in zip(answers, references, strict=True):
            text, _ = split_citations(answer, ())
            scores = list(answer_scores(text, wanted).values())
            self.sums = self.sums + torch.tensor(scores).to(self.sums)
            self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """The means by name, each a scalar; NaN where there was no answer."""
        means = self.sums / self.count
        return dict(zip(SCORES, means.float().unbind(), strict=True))


class Resilience(Metric):
    """What documents do to answers, as xRAG counts it (arXiv 2405.13792).

    `resilience` is the share of the questions right without documents that stay right with them,
    `boost` the share of those wrong without that become right.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # right without, wrong without; right with as well, right with only
        self.add_state("counts", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, with_documents: Tensor, without: Tensor) -> None:
        """Adds questions.

        Args:
            with_documents: (N,) whether the answer with documents is right.
            without: (N,) whether the answer without them is right.
        """
        right, before = with_documents.bool(), without.bool()
        groups = (before, ~before, before & right, ~before & right)
        self.counts = self.counts + torch.stack([g.sum() for g in groups]).to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """`resilience` and `boost`; NaN where there was no such question."""
        right, wrong, kept, gained = self.counts.float().unbind()
        return {"resilience": kept / right, "boost": gained / wrong}


def _words(text: str) -> list[str]:
    """The words of a text's normal form; characters of scripts without spaces apart."""
    pieces = []
    for char in normalise(text):
        if _UNSPACED.match(char) or unicodedata.category(char).startswith("S"):
            pieces.append(f" {char} ")
        else:
            # Letters, numbers and the marks on them; str.isalnum knows no marks.
            pieces.append(char if unicodedata.category(char)[0] in "LMN" else " ")
    return "".join(pieces).split()


def _in_a_row(wanted: str, text: str) -> bool:
    words, within = (f" {' '.join(_words(part))} " for part in (wanted, text))
    return words.strip() != "" and words in within


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer.

    Bit n of `row` is 0 where the table rises at column n (Hyyrö, AWOCA 2004).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    row = all_ones = (1 << len(a)) - 1
    for word in b:
        rises = row & places.get(word, 0)
        row = ((row + rises) | (row - rises)) & all_ones
    return len(a) - row.bit_count()
