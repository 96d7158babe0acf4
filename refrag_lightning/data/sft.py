"""SFTDataModule: conversations and questions with passages to batches for fine-tuning."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from refrag_lightning.data.conversations import Conversation, ConversationSource, fill
from refrag_lightning.data.examples import Example, Reading, TextBatch, collate
from refrag_lightning.data.lengths import cached_lengths, first_too_long
from refrag_lightning.data.mixture import (
    Context,
    Mixture,
    WeightedSource,
    as_one,
    contexts_of,
    learnable,
    short_ones,
)
from refrag_lightning.data.passages import Distractors, PassageChoice, PassageOrder
from refrag_lightning.data.questions import Passage
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.rows import Split
from refrag_lightning.data.teacher_answers import TeacherAnswers
from refrag_lightning.data.worker import seeded
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment, render_chat
from refrag_lightning.text.tokenizer import RefragTokenizer

# Conversations, the longest by their bytes, that are counted before training.
_MOST_CHECKED = 256


class SFTDataModule(ResumableDataModule):
    """Conversations, with or without documents, for `SFTModule`.

    The decoder's chat template is applied, and what the assistant says is learnt. Passages, their
    order and the batch's rate are drawn anew for each batch. Conversations are held in memory.

    Validation and test have one loader a rate, with the same passages in each.

    Args:
        sources: Where the conversations come from: one source, or several with weights.
        val_source: Validation conversations; what `sources` hold out if None.
        test_source: Conversations of the report; what `sources` hold out for it if None.
        read: How documents are read: as rows (compressed), as text, or not at all (none).
        expand_share: With `read: compressed`, share of the training rows that stay tokens; of two
            numbers, one between them is drawn for each context.
        num_passages: Passages a conversation is read with, a number or the least and the most; all
            if None.
        order: Of the passages: the retriever's (given), drawn anew (shuffled), or the gold ones
            first or last.
        distractors: The conversation's own passages beside the gold ones (own), or those of other
            conversations (random).
        drop_gold: Share of the conversations read without their gold passages, as after a weak
            retriever.
        teacher_answers: A model (name or folder, or one with settings) whose answers are learnt
            in place of the last gold ones. It reads the documents as text.
        questions_per_context: Most training conversations on the same gold passages that stand
            behind one context: each sees the context and itself only, and what they have in common
            is read once. Distractors are then those of the first of them, without any that holds
            an answer of another.
        max_length: Leave out training contexts of more positions; None keeps all. Positions are
            counted at the smallest rate, with the most passages.
        line_length: Pack training texts into lines of so many positions, without attention between
            them.
        tokens_per_batch: Positions of a training batch, in place of `batch_size`.
        eval_examples: Most conversations in validation, and in test.
        generate_eval: Let validation and test batches carry what an answer is generated from.
        batch_size: Training contexts a batch and device.
        eval_batch_size: Conversations a batch in validation and test; None takes `batch_size`.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        shuffle: Shuffle the training conversations anew in each epoch.
        drop_last: Leave out the incomplete batch at the end of an epoch.
        seed: Seed of everything that is drawn.
        pin_memory: Copy batches to pinned memory, for a faster way to a GPU.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.

    Raises:
        ValueError: If a setting is out of its range, or does not fit another one.
    """

    def __init__(
        self,
        sources: ConversationSource | list[WeightedSource],
        val_source: ConversationSource | None = None,
        test_source: ConversationSource | None = None,
        read: Reading = "compressed",
        expand_share: float | tuple[float, float] = 0.0,
        num_passages: int | tuple[int, int] | None = None,
        order: PassageOrder = "given",
        distractors: Distractors = "own",
        drop_gold: float = 0.0,
        teacher_answers: TeacherAnswers | str | None = None,
        questions_per_context: int = 1,
        max_length: int | None = None,
        line_length: int | None = None,
        tokens_per_batch: int | None = None,
        eval_examples: int = 64,
        generate_eval: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        pin_memory: bool = False,
        tokenizer: RefragTokenizer | None = None,
    ) -> None:
        shares = expand_share if isinstance(expand_share, tuple) else (expand_share, expand_share)
        if not 0 <= shares[0] <= shares[1] < 1:
            raise ValueError(
                f"expand_share ({expand_share}) must be from 0 to below 1, and of two numbers the "
                "smaller one first"
            )
        if questions_per_context < 1:
            raise ValueError(f"questions_per_context ({questions_per_context}) must be at least 1")
        if shares[1] and read != "compressed":
            raise ValueError(f"expand_share ({expand_share}) needs read: compressed, not {read}")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            pin_memory=pin_memory,
            tokens_per_batch=tokens_per_batch,
        )
        if isinstance(sources, ConversationSource):
            sources = [WeightedSource(sources)]
        if not sources:
            raise ValueError("sources must hold at least one source")
        self.sources = sources
        self.eval_sources = {"val": val_source, "test": test_source}
        self.read: Reading = read
        self.expand_shares = shares
        self.questions_per_context = questions_per_context
        self.choice = PassageChoice(num_passages, order, distractors, drop_gold)
        if isinstance(teacher_answers, str):
            teacher_answers = TeacherAnswers(teacher_answers)
        self.teacher_answers = teacher_answers
        self.max_length = max_length
        self.line_length = line_length
        self.eval_examples = eval_examples
        self.generate_eval = generate_eval
        self._tokenizer = tokenizer
        self._parts: dict[Split, list[list[Conversation]]] = {}
        self._pools: dict[Split, list[Conversation]] = {}

    @property
    def tokenizer(self) -> RefragTokenizer:
        """The tokenizer given, or that of the trainer's module."""
        if self._tokenizer is not None:
            return self._tokenizer
        assert self.trainer is not None
        return self.trainer.lightning_module.tokenizer  # type: ignore[return-value]

    @property
    def rates(self) -> list[int]:
        """The rates that batches are built at; where no row is read there is but one."""
        tokenizer = self.tokenizer
        return list(tokenizer.rates) if self.read == "compressed" else [tokenizer.compression]

    def prepare_data(self) -> None:
        """Has the teacher answer, and downloads what is to be downloaded; once on each node."""
        for split in self._splits():
            self.conversations(split)

    def training_data(self) -> Mixture:
        """The training contexts of all sources, by their weights."""
        parts = [
            contexts_of(part, self.questions_per_context) for part in self.conversations("train")
        ]
        lengths = None
        if self.tokens_per_batch is not None or self.max_length is not None:
            lengths = [self._lengths(number, part) for number, part in enumerate(parts)]
        if self.max_length is not None:
            assert lengths is not None
            parts, lengths = short_ones(parts, lengths, self.max_length)
        self._check_windows("train", parts)
        if self.num_workers:
            # The workers tokenize; forked after threads were used, they would warn and use one.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return Mixture(parts, [source.weight for source in self.sources], lengths)

    def data_key(self) -> Any:
        """Each source's size, ends and weight; no file's place or time, which a retry changes."""
        return [
            [len(part), *(c.id for c in (*part[:1], *part[-1:])), source.weight]
            for part, source in zip(self.conversations("train"), self.sources, strict=True)
        ]

    def conversations(self, split: Split) -> list[list[Conversation]]:
        """The conversations of a split, a list for each source, read once.

        Raises:
            ValueError: If there is none.
        """
        if split not in self._parts:
            own = self.eval_sources.get(split)
            if own is not None:
                parts = [list(islice(learnable(own, "train"), self.eval_examples))]
            else:
                limit = None
                if split != "train":
                    limit = -(-self.eval_examples // len(self.sources))
                parts = [list(islice(learnable(s.source, split), limit)) for s in self.sources]
            if not any(parts):
                keys = json.dumps([s.source.key() for s in self.sources])
                advice = "" if split == "train" else f": give a {split}_source or held_out"
                raise ValueError(f"{keys} has no conversation for {split}{advice}")
            if split == "train" and self.teacher_answers is not None:
                parts = [self._answered(number, part) for number, part in enumerate(parts)]
            self._parts[split] = parts
        return self._parts[split]

    def example(
        self,
        conversation: Conversation,
        passages: Sequence[Passage],
        *,
        split: Split = "train",
        with_prompt: bool = False,
    ) -> Example:
        """The example that a conversation becomes with its passages.

        Args:
            conversation: The conversation.
            passages: What it is read with, in order.
            split: What it is read for; rows stay tokens in training alone.
            with_prompt: Whether to give what the last answer is generated from.
        """
        messages = fill(conversation, passages, documents=self.read != "none")
        share = self.expand_shares[1] if split == "train" else 0.0
        expand: str | float = "all" if self.read == "text" else share or "none"
        prompt, references = None, ()  # type: tuple[Segment, ...] | None, tuple[str, ...]
        if with_prompt and conversation.ends_with_answer:
            prompt = self._rendered(messages[:-1], add_generation_prompt=True)
            # What chat data gives no references for is answered as it says.
            references = conversation.references or (conversation.answer,)
        return Example(
            self._rendered(messages, add_generation_prompt=False),
            task=conversation.task,
            id=conversation.id,
            expand=expand,
            prompt=prompt,
            references=references,
        )

    def collate(self, samples: list[Context]) -> TextBatch:
        """Builds a training batch: draws its rate and each context's passages."""
        rates = self.rates
        compression = rates[np.random.randint(len(rates))] if len(rates) > 1 else rates[0]
        return collate(
            self._drawn(samples, "train"),
            self.tokenizer,
            compression=compression,
            teacher=self._needs_teacher(),
            line_length=self.line_length,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Held-out conversations, a loader for each rate."""
        return self._eval_dataloaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Held-out conversations that validation does not see, a loader for each rate."""
        return self._eval_dataloaders("test")

    def _eval_dataloaders(self, split: Split) -> list[DataLoader]:
        parts = self.conversations(split)
        contexts = [contexts_of(part, 1) for part in parts]
        self._check_windows(split, contexts)
        data = Mixture(contexts, [1] * len(parts))
        return [
            self.eval_dataloader(data, partial(self._collate_eval, split=split, compression=rate))
            for rate in self.rates
        ]

    def _collate_eval(self, samples: list[Context], *, split: Split, compression: int) -> TextBatch:
        # The loader seeds each batch by its place, so every rate draws the same passages.
        return collate(
            self._drawn(samples, split, with_prompt=self.generate_eval),
            self.tokenizer,
            compression=compression,
            teacher=self._needs_teacher(),
        )

    def _drawn(
        self, samples: list[Context], split: Split, *, with_prompt: bool = False
    ) -> list[Example]:
        if split not in self._pools:
            parts = self.conversations(split)
            self._pools[split] = [c for part in parts for c in part if c.passages]
        pool = self._pools[split]
        examples = []
        for number, context in enumerate(samples):
            passages = self.choice.draw(as_one(context), pool)
            low, high = self.expand_shares
            share = np.random.uniform(low, high) if low < high and split == "train" else None
            for conversation in context:
                example = self.example(conversation, passages, split=split, with_prompt=with_prompt)
                if share is not None:
                    example = replace(example, expand=share)
                examples.append(replace(example, context=number if len(context) > 1 else None))
        return examples

    def _rendered(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
    ) -> tuple[Segment, ...]:
        tokenizer = self.tokenizer
        segments = render_chat(
            tokenizer.decoder,
            messages,
            header=tokenizer.header,
            footer=tokenizer.footer,
            add_generation_prompt=add_generation_prompt,
        )
        return tuple(segments)

    def _needs_teacher(self) -> bool:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return bool(getattr(module, "needs_teacher", False))

    def _splits(self) -> list[Split]:
        function = self.trainer.state.fn if self.trainer is not None else None
        stage = "fit" if function is None else function.value
        return {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(stage, [])  # type: ignore[return-value]

    def _answered(self, number: int, part: list[Conversation]) -> list[Conversation]:
        """A source's conversations with the teacher's answers."""
        assert self.teacher_answers is not None
        asked = [place for place, c in enumerate(part) if c.ends_with_answer]
        device = self.trainer.strategy.root_device if self.trainer is not None else "cpu"
        answers = self.teacher_answers.answers(
            [part[place] for place in asked],
            self.choice.most,
            self._answers_key(number),
            device=device,
        )
        answered = list(part)
        for place, answer in zip(asked, answers, strict=True):
            # Nothing can be learnt from an empty answer beside how to end it; the gold one stays.
            if answer:
                answered[place] = part[place].with_answer(answer)
        return answered

    def _answers_key(self, number: int) -> dict[str, Any]:
        source = self.sources[number].source
        return {"source": source.key(), "passages": self.choice.num_passages}

    def _answers_name(self, number: int) -> str | None:
        if self.teacher_answers is None:
            return None
        return self.teacher_answers.path(self._answers_key(number)).name

    def _lengths(self, number: int, part: Sequence[Context]) -> np.ndarray:
        """Positions of each of a source's contexts, at the rate that takes the most."""
        key = {
            "source": self.sources[number].source.key(),
            "answers": self._answers_name(number),
            "read": self.read,
            "expand_share": self.expand_shares[1],
            "passages": self.choice.num_passages,
            "questions_per_context": self.questions_per_context,
        }

        # A share of expanded rows is drawn; a cached number must not depend on what was drawn.
        with seeded([self.seed]):
            return cached_lengths(map(self._longest, part), self.tokenizer.at(self.rates[0]), key)

    def _longest(self, context: Context, split: Split = "train") -> list[Example]:
        """A context's examples with the most passages."""
        passages = self.choice.most(as_one(context))
        return [self.example(conversation, passages, split=split) for conversation in context]

    def _check_windows(self, split: Split, parts: Sequence[Sequence[Context]]) -> None:
        """Refuses what the decoder, or the teacher, has no room for, before anything is learnt.

        Of a large part the longest conversations are looked at.

        Raises:
            ValueError: A conversation takes more positions, at the smallest rate and with the most
                passages.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        model = getattr(module, "model", None)
        readers = [("the decoder", model, False)]
        if self._needs_teacher():
            teacher = getattr(module, "teacher_model", None) or model
            readers.append(("the teacher, which reads documents as text,", teacher, True))
        for name, reader, as_text in readers:
            window = getattr(reader, "window", None)
            if window is None:
                continue
            # No token has less than a byte, so most need not be rendered and tokenized; and of many
            # the longest are enough. What is missed is named by the batch in which it stands.
            sizes = ((_num_bytes(c), c) for part in parts for c in part)
            most = nlargest(_MOST_CHECKED, (s for s in sizes if s[0] > window), key=itemgetter(0))
            longest = (self._longest(context, split) for _, context in most)
            if as_text:
                longest = ([replace(e, expand="all") for e in each] for each in longest)
            with seeded([self.seed]):
                found = first_too_long(longest, self.tokenizer.at(self.rates[0]), window)
            if found is not None:
                advice = "max_length leaves such conversations out" if split == "train" else ""
                advice = advice if advice and not as_text else "give shorter or fewer passages"
                raise ValueError(
                    f"{split} conversation {found[0]!r} takes {found[1]} positions, but {name} has "
                    f"{window}: {advice}"
                )


def _num_bytes(context: Context) -> int:
    """Bytes of a context with everything that is said behind it, and some for the template."""
    total = 512
    for conversation in context:
        for turn in conversation.turns:
            total += 64
            for part in turn.content:
                text = part.text + part.title if isinstance(part, Document) else str(part)
                total += len(text.encode())
        for passage in conversation.passages:
            total += 64 + len((passage.text + passage.title).encode())
    return total
