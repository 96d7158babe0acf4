"""QuestionDataModule: questions with their passages chosen, for an evaluation to read in many ways.

Everything about a question is fixed by the settings and its number, so that all models and readings
get the same ones, on any number of ranks. A batch holds segments and no tensors: what the decoder
reads depends on the reading.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from refrag_lightning.data.conversations import QuestionConversations, fill
from refrag_lightning.data.questions import Passage, Question, QuestionSource
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.rows import Split
from refrag_lightning.text.segments import Segment, render_chat
from refrag_lightning.text.tokenizer import RefragTokenizer

Order = Literal["given", "shuffled", "gold_first", "gold_last", "gold_spread"]


@dataclass(frozen=True)
class AskedQuestion:
    """A question with the passages that it is read with.

    Attributes:
        index: Its number in the data.
        id: Its name.
        question: The question.
        references: The answers that count as right; the first one's likelihood is measured.
        passages: The passages, in order; the decoder reads them numbered from 1 on.
        kind: What sort of question it is, or "".
        detail: What sort of answer it has, or "".
        segments: The conversation, its gold answer marked as what is to be written.
        prompt: The conversation up to the place where the answer goes.
        golds: Texts of all gold passages that the data has for it, read with it or not; questions
            with the same ones are not independent.
        article: Title of the first of these, or "".
    """

    index: int
    id: str
    question: str
    references: tuple[str, ...]
    passages: tuple[Passage, ...]
    kind: str = ""
    detail: str = ""
    segments: tuple[Segment, ...] = ()
    prompt: tuple[Segment, ...] = ()
    golds: tuple[str, ...] = ()
    article: str = ""

    @property
    def num_passages(self) -> int:
        """How many passages there are."""
        return len(self.passages)

    @property
    def gold_place(self) -> int | None:
        """Where the first gold passage stands, from 0; None where none is among them."""
        return next((n for n, passage in enumerate(self.passages) if passage.gold), None)

    @property
    def gold_ids(self) -> list[str]:
        """The numbers under which the decoder reads the gold passages."""
        return [str(n) for n, passage in enumerate(self.passages, start=1) if passage.gold]

    @property
    def ids(self) -> list[str]:
        """The numbers under which the decoder reads its passages."""
        return [str(n + 1) for n in range(self.num_passages)]


@dataclass
class QuestionBatch:
    """Questions, and for each another one whose documents the controls read.

    Attributes:
        asked: The questions.
        others: For each the documents of another question, as texts, none in common with its own;
            empty where no question has others.
    """

    asked: list[AskedQuestion]
    others: list[list[str]]

    def to(self, device: Any, **options: Any) -> QuestionBatch:
        """The batch itself: it has no tensors."""
        return self


class QuestionDataModule(ResumableDataModule):
    """Questions for `AnswerEvaluation`.

    Args:
        source: The questions.
        split: Which of them: train is all of them where the source holds nothing out.
        num_passages: Passages a question; all if None. A list is dealt out to the questions in
            turn. The gold ones come first, then the others in the retriever's order.
        order: `given` (the retriever's), `shuffled`, `gold_first`, `gold_last`, or `gold_spread`:
            the gold one at each place in turn.
        drop_gold: Share of the questions whose gold passages are left out, as a weak retriever
            does; others take their places.
        limit: Most questions.
        prompt: The user's message; `{passages}` and `{question}` stand for what they say. The same
            as in training.
        system: The system's message; None has none.
        batch_size: Questions a batch.
        num_workers: Processes that prepare batches.
        seed: Of the order and of whose gold is dropped.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        source: QuestionSource,
        split: Split = "train",
        num_passages: int | list[int] | None = None,
        order: Order = "given",
        drop_gold: float = 0.0,
        limit: int | None = None,
        prompt: str = "{passages}Answer in a few words: {question}",
        system: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: RefragTokenizer | None = None,
    ) -> None:
        counts = [num_passages] if isinstance(num_passages, int) else num_passages
        if counts is not None and (not counts or min(counts) < 1):
            raise ValueError(f"num_passages ({num_passages}) must be at least 1")
        if not 0 <= drop_gold <= 1:
            raise ValueError(f"drop_gold ({drop_gold}) must be 0 to 1")
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.source = source
        self.split: Split = split
        self.counts = counts
        self.order: Order = order
        self.drop_gold = drop_gold
        self.limit = limit
        self.conversations = QuestionConversations(source, prompt, system)
        self._tokenizer = tokenizer

    @cached_property
    def questions(self) -> list[AskedQuestion]:
        """The questions in order, each with its passages.

        Raises:
            ValueError: If there is none.
        """
        found = islice(self.source.questions(self.split), self.limit)
        questions = [self.ask(number, question) for number, question in enumerate(found)]
        if not questions:
            raise ValueError(f"there is no question in split {self.split!r} of {self.source.key()}")
        return questions

    def ask(self, index: int, question: Question) -> AskedQuestion:
        """A question with its passages chosen and its conversation rendered.

        Args:
            index: Its number in the data.
            question: The question.
        """
        passages = self.choose(index, question.passages)
        decoder = self.tokenizer.decoder
        style: dict[str, Any] = {"header": self.tokenizer.header, "footer": self.tokenizer.footer}
        messages = fill(self.conversations.conversation(question), passages)
        whole = render_chat(decoder, messages, add_generation_prompt=False, **style)
        prompt = render_chat(decoder, messages[:-1], add_generation_prompt=True, **style)
        return AskedQuestion(
            index=index,
            id=question.id,
            question=question.question,
            references=question.answers,
            passages=tuple(passages),
            kind=question.kind,
            detail=question.detail,
            segments=tuple(whole),
            prompt=tuple(replace(segment, train=False) for segment in prompt),
            golds=tuple(" ".join(p.text.split()) for p in question.passages if p.gold),
            article=next((p.title for p in question.passages if p.gold), ""),
        )

    def choose(self, index: int, passages: Sequence[Passage]) -> list[Passage]:
        """The passages that a question is read with, in order.

        Args:
            index: The question's number.
            passages: What the retriever found.
        """
        draw = random.Random(f"{self.seed} {index}")
        gold = [place for place, passage in enumerate(passages) if passage.gold]
        rest = [place for place, passage in enumerate(passages) if not passage.gold]
        if draw.random() < self.drop_gold:
            gold = []
        number = len(passages)
        if self.counts is not None:
            number = self.counts[index % len(self.counts)]
        gold = gold[:number]
        rest = rest[: number - len(gold)]
        if self.order == "given":
            chosen = sorted([*gold, *rest])
        elif self.order == "shuffled":
            chosen = draw.sample([*gold, *rest], len(gold) + len(rest))
        else:
            last = len(rest)
            # With numbers of passages dealt out in turn, each number has every place.
            turn = index // len(self.counts or [0])
            place = {"gold_first": 0, "gold_last": last}.get(self.order, turn % (last + 1))
            chosen = [*rest[:place], *gold, *rest[place:]]
        return [passages[place] for place in chosen]

    @property
    def tokenizer(self) -> RefragTokenizer:
        """The tokenizer of the trainer's module, unless one was given."""
        if self._tokenizer is None:
            assert self.trainer is not None
            self._tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[assignment]
        assert isinstance(self._tokenizer, RefragTokenizer)
        return self._tokenizer

    def collate(self, samples: list[int]) -> QuestionBatch:
        """The batch of the questions of these numbers."""
        others = [self.other(n) for n in samples]
        return QuestionBatch(
            [self.questions[n] for n in samples],
            [[p.text for p in other.passages] if other is not None else [] for other in others],
        )

    def other(self, index: int) -> AskedQuestion | None:
        """The next question that has passages, none of them in common with this one's.

        Several questions on the same passages may stand side by side. None where no question has
        other passages.

        Args:
            index: The number of this one.
        """
        questions = self.questions
        own = {passage.text for passage in questions[index].passages}
        for step in range(1, len(questions)):
            place = (index + step) % len(questions)
            texts = [passage.text for passage in questions[place].passages]
            if texts and own.isdisjoint(texts):
                return questions[place]
        return None

    def test_dataloader(self) -> DataLoader:
        """All questions, each rank its share."""
        return self.eval_dataloader(_Numbers(len(self.questions)))

    val_dataloader = test_dataloader


class _Numbers(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index
