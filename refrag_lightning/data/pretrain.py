"""PretrainDataModule: stretches of text to reconstruct and to continue, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from refrag_lightning.data.corpus import Corpus, CorpusText
from refrag_lightning.data.corpus_data import CorpusDataModule
from refrag_lightning.data.curriculum import Curriculum
from refrag_lightning.data.examples import Example, Reading, TextBatch, collate
from refrag_lightning.data.pretrain_examples import TASKS, PretrainFormat, check_tasks
from refrag_lightning.data.pretrain_samples import Sample, Samples, example_lengths
from refrag_lightning.data.sources import Split, TextSource
from refrag_lightning.text.tokenizer import RefragTokenizer

# How often a place is drawn anew where a word is longer than the rows that it should fit into.
_TRIES = 32


class PretrainDataModule(CorpusDataModule):
    """Stretches of text for `PretrainModule`: contexts to reconstruct, and contexts to continue.

    An example's context is a stretch of a text, cut between words, of as many rows as the
    curriculum says (at times a row less or more, since words stay whole). Which stretch, in which
    documents, and which task: all is a function of the seed, the example's number and its batch's
    rate. An epoch is `num_examples` examples in the curriculum's order; a second one would repeat
    them. Each training batch has one of the tokenizer's rates, drawn evenly. Rows of sentences
    (`chunk_by: sentence`) come as many as a context of that many encoder tokens has.

    Validation and test have one loader a rate, with the same examples every time: cut at the lowest
    rate, the same texts are read at each. In test they are also read as text and without documents,
    as the tasks `reconstruct-text` and `reconstruct-none`, between whose losses that of
    `reconstruct` lies (and so for `continue`). These are the same at every rate, and come with the
    lowest alone.

    Args:
        source: Where the text comes from; the Python reference by default. See `data.sources`.
        val_source: Validation text; what `source` holds out if None.
        test_source: Text of the report; what `source` holds out for it if None.
        tasks: The tasks and their weights, which are the shares of the examples.
        max_rows: Rows of the longest context.
        min_rows: Rows of the shortest context; sizes double from it to `max_rows`.
        num_stages: Stages of the curriculum.
        num_examples: Training examples in all.
        curriculum: Begin with short contexts (see `data.curriculum`). False takes the same
            examples in random order.
        num_documents: Documents that a context is cut into, or the least and the most.
        continuation: Decoder tokens to continue with.
        expand_share: Share of the training rows that stay tokens (selective pre-training).
        chat: Put the tasks into the decoder's chat template.
        instructions: What is asked for each task, in place of the default instructions.
        eval_examples: Examples for each task and rate in validation, and in test.
        eval_rows: Rows of their contexts at the lowest rate, in turn; `max_rows` if None.
        test_readings: How documents are read in test.
        line_length: Pack short training examples into lines of at most that many positions.
        tokens_per_batch: Positions of a training batch, in place of `batch_size`; about so many at
            the mean of the rates, more at the highest.
        batch_size: Training examples a batch and device.
        eval_batch_size: Examples a batch in validation and test; None takes `batch_size`.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        seed: Seed of everything that is drawn.
        pin_memory: Copy batches to pinned memory, for a faster way to a GPU.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        val_source: TextSource | None = None,
        test_source: TextSource | None = None,
        tasks: dict[str, float] | None = None,
        max_rows: int = 32,
        min_rows: int = 1,
        num_stages: int = 9,
        num_examples: int = 10000,
        curriculum: bool = True,
        num_documents: int | tuple[int, int] = 1,
        continuation: int = 64,
        expand_share: float = 0.0,
        chat: bool = False,
        instructions: dict[str, str] | None = None,
        eval_examples: int = 32,
        eval_rows: list[int] | None = None,
        test_readings: list[Reading] | None = None,
        line_length: int | None = None,
        tokens_per_batch: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
        tokenizer: RefragTokenizer | None = None,
    ) -> None:
        super().__init__(
            source=source,
            val_source=val_source,
            test_source=test_source,
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            # The curriculum is the order.
            shuffle=False,
            seed=seed,
            pin_memory=pin_memory,
            tokens_per_batch=tokens_per_batch,
        )
        self.tasks = _shares(tasks if tasks is not None else dict.fromkeys(TASKS, 1.0))
        self.curriculum = Curriculum(max_rows, num_stages, num_examples, min_rows)
        self.in_stages = curriculum
        low, high = (num_documents,) * 2 if isinstance(num_documents, int) else num_documents
        if not 1 <= low <= high:
            raise ValueError(f"num_documents ({num_documents}) must be at least 1, the least first")
        self.num_documents = low, high
        if continuation < 1:
            raise ValueError(f"continuation ({continuation}) must be at least 1")
        self.continuation = continuation
        if not 0 <= expand_share <= 1:
            raise ValueError(f"expand_share ({expand_share}) must be 0 to 1")
        self.expand_share = expand_share
        self.chat = chat
        check_tasks("instructions", instructions or {})
        self.instructions = instructions or {}
        if eval_examples < 1:
            raise ValueError(f"eval_examples ({eval_examples}) must be at least 1")
        self.eval_examples = eval_examples
        self.eval_rows = eval_rows or [max_rows]
        if min(self.eval_rows) < 1:
            raise ValueError(f"eval_rows ({eval_rows}) must be at least 1")
        self.test_readings = test_readings or ["compressed", "text", "none"]
        self.line_length = line_length

    @cached_property
    def format(self) -> PretrainFormat:
        """How the tasks are put to the decoder."""
        return PretrainFormat(self.tokenizer, chat=self.chat, instructions=self.instructions)

    def check(self, split: Split, corpus: Corpus) -> None:
        """Raises a ValueError where no text is long enough for the longest context."""
        rows = self.curriculum.max_rows if split == "train" else max(self.eval_rows)
        rate = max(self.tokenizer.rates) if split == "train" else min(self.tokenizer.rates)
        for task in self.tasks:
            try:
                self._draw(corpus, np.random.default_rng(0), rows, task, rate)
            except ValueError as error:
                raise ValueError(
                    f"{error}; a context has up to {rows} rows of {rate}: take fewer "
                    f"({'max_rows' if split == 'train' else 'eval_rows'}), or longer texts"
                ) from error

    def example(self, sample: Sample, rate: int) -> Example:
        """The text of a sample at a rate."""
        corpus = self.corpus(sample.split)
        # Validation and test are the same whatever the seed of training and the rate.
        seed = self.seed
        if sample.split != "train":
            seed, rate = 0, min(self.tokenizer.rates)
        place = ("train", "val", "test").index(sample.split)
        random = np.random.default_rng([seed, place, sample.number, rate])
        text, cuts = self._cut(corpus, random, sample, rate)
        documents = [text.between(a, b).strip() for a, b in pairwise(cuts)]
        example = self.format(
            sample.task,
            documents,
            self._target(text, cuts, sample.task),
            id=f"{sample.split}-{sample.number}",
            reading=sample.reading,
            expand_share=self.expand_share if sample.split == "train" else 0.0,
        )
        if sample.reading == "compressed":
            return example
        return replace(example, task=f"{sample.task}-{sample.reading}")

    def data_key(self) -> Any:
        """The corpus' key, and what decides which context and task comes when."""
        order = [asdict(self.curriculum), self.in_stages, self.tasks]
        return [*super().data_key(), *order]

    def training_data(self) -> Samples:
        """The training samples in their order."""
        rows = self.curriculum.schedule(self.seed)
        random = np.random.default_rng([self.seed, 1])
        if not self.in_stages:
            rows = random.permutation(rows)
        tasks = random.choice(len(self.tasks), size=len(rows), p=[*self.tasks.values()])
        names = np.asarray([*self.tasks])[tasks]
        self._check_lengths(rows, names)
        samples = [
            Sample("train", number, int(num_rows), str(task))
            for number, (num_rows, task) in enumerate(zip(rows, names, strict=True))
        ]
        return Samples(samples, self._lengths(rows, names, float(np.mean(self.tokenizer.rates))))

    def collate(self, samples: list[Sample]) -> TextBatch:
        """Cuts the samples' texts at the batch's rate and builds a batch of them."""
        training = samples[0].rate is None
        rates = self.tokenizer.rates
        # NumPy's own state, which the loaders seed for each batch.
        rate = samples[0].rate or int(rates[np.random.randint(len(rates))])
        return collate(
            [self.example(sample, rate) for sample in samples],
            self.tokenizer,
            compression=rate,
            teacher=self.needs_teacher,
            line_length=self.line_length if training else None,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Held-out examples, a loader for each rate."""
        return self._eval_dataloaders("val", ["compressed"])

    def test_dataloader(self) -> list[DataLoader]:
        """Examples that validation does not see, a loader for each rate."""
        return self._eval_dataloaders("test", self.test_readings)

    def _eval_dataloaders(self, split: Split, readings: Sequence[Reading]) -> list[DataLoader]:
        rows, rates = self.eval_rows, self.tokenizer.rates
        loaders = []
        for rate in rates:
            samples = [
                Sample(split, number, rows[number % len(rows)], task, rate, reading)
                for reading in readings
                if reading == "compressed" or rate == min(rates)
                for number in range(self.eval_examples)
                for task in self.tasks
            ]
            if samples:
                loaders.append(self.eval_dataloader(Samples(samples)))
        return loaders

    def _draw(
        self, corpus: Corpus, random: np.random.Generator, num_rows: int, task: str, rate: int
    ) -> tuple[CorpusText, int]:
        continuation = self.continuation if task == "continue" else 0
        return corpus.draw(
            random, context=num_rows * rate, continuation=continuation, unit=self.unit
        )

    def _cut(
        self, corpus: Corpus, random: np.random.Generator, sample: Sample, rate: int
    ) -> tuple[CorpusText, list[int]]:
        """Draws a text and the cuts in it at the edges of the context's documents.

        Raises:
            ValueError: If no place is found, since the words are longer than context and target.
        """
        found = None
        for _ in range(_TRIES):
            text, first = self._draw(corpus, random, sample.num_rows, sample.task, rate)
            # A continuation needs one word at least.
            last = len(text.places) - 1 - (sample.task == "continue")
            rows = self._split_rows(random, sample.num_rows)
            cuts = [first]
            for part in rows:
                cuts.append(min(text.after(cuts[-1], part * rate, self.unit), last))
            sizes = np.diff(text.counts(self.unit)[cuts])
            if ((sizes > 0) & (sizes <= rows * rate)).all():
                return text, cuts
            if sizes[0] > 0:
                found = text, sorted(set(cuts))
        if found is None:
            raise ValueError(
                f"{sample.split} has words longer than a context of {sample.num_rows} rows of "
                f"{rate} and its continuation: take more rows (min_rows) or other texts"
            )
        return found

    def _split_rows(self, random: np.random.Generator, num_rows: int) -> np.ndarray:
        """Cuts a context's rows at random into documents."""
        low, high = self.num_documents
        number = min(int(random.integers(low, high + 1)), num_rows)
        inner = 1 + np.sort(random.choice(num_rows - 1, number - 1, replace=False))
        return np.diff(np.concatenate([[0], inner, [num_rows]]))

    def _target(self, text: CorpusText, cuts: Sequence[int], task: str) -> str:
        if task == "reconstruct":
            return text.between(cuts[0], cuts[-1]).strip()
        end = text.after(cuts[-1], self.continuation, "decoder")
        return text.between(cuts[-1], end).strip()

    def _check_lengths(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        longest = int(self._lengths(rows, tasks, max(self.tokenizer.rates)).max())
        # Before training: a line that turns out too short would end the run in its last stage.
        if self.line_length is not None and self.line_length < 1.25 * longest:
            raise ValueError(
                f"line_length ({self.line_length}) must hold the longest training examples, of "
                f"about {longest} positions, and a quarter more to be safe"
            )
        module = self.trainer.lightning_module if self.trainer is not None else None
        window = getattr(getattr(module, "model", None), "window", None)
        if window is not None and longest > window:
            raise ValueError(
                f"the longest training examples take about {longest} positions, but the decoder "
                f"has {window}: take fewer rows (max_rows) or a shorter continuation"
            )

    def _lengths(self, rows: np.ndarray, tasks: np.ndarray, rate: float) -> np.ndarray:
        """About how many positions of the decoder each training example takes at a rate."""
        corpus = self.corpus("train")
        ratio = corpus.totals("decoder").sum() / corpus.totals(self.unit).sum()
        return example_lengths(
            rows,
            tasks,
            self.format,
            tokens_per_row=rate * ratio,
            continuation=self.continuation,
            num_documents=sum(self.num_documents) / 2,
            expand_share=self.expand_share,
        )


def _shares(tasks: Mapping[str, float]) -> dict[str, float]:
    """The tasks that have a weight, and their shares of the examples."""
    check_tasks("tasks", tasks)
    total = sum(tasks.values())
    if min(tasks.values(), default=0) < 0 or not total > 0:
        raise ValueError(f"tasks ({tasks}) need weights of at least 0, and one above")
    return {task: weight / total for task, weight in tasks.items() if weight}
