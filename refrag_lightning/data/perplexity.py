"""PerplexityDataModule: held-out text for log-perplexity on a grid of contexts and continuations.

Each window of the corpus is a stretch of text with a place in it: the longest context lies before
that place and the longest continuation behind it. Every cell of the grid has the same windows: a
shorter context ends at the same place, and a shorter continuation is the beginning of the longer
one, so that one pass over the longest gives the figures of all (the first n targets of each text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch.utils.data import DataLoader, Dataset

from refrag_lightning.data.corpus import Corpus, CorpusText
from refrag_lightning.data.corpus_data import CorpusDataModule
from refrag_lightning.data.examples import Example, Reading, TextBatch, collate
from refrag_lightning.data.pretrain_examples import PretrainFormat
from refrag_lightning.data.sources import Split, TextSource
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

ContextReading = Literal["full", "none", "last", "compressed"]
"""How a context is read: as tokens; not at all; its last tokens, as many as rows take; as rows."""

_READINGS: dict[ContextReading, Reading] = {
    "full": "text",
    "none": "none",
    "last": "text",
    "compressed": "compressed",
}


class Cell(NamedTuple):
    """Part of the grid.

    Attributes:
        reading: How the context is read.
        context: Its decoder tokens; 0 where it is not read.
    """

    reading: ContextReading
    context: int

    @property
    def task(self) -> str:
        """Names the cell in a `TextBatch`, such as `compressed-512`."""
        return f"{self.reading}-{self.context}"

    @classmethod
    def of(cls, task: str) -> Cell:
        """The cell that a batch's task names."""
        reading, _, context = task.rpartition("-")
        assert reading in get_args(ContextReading), task
        return cls(reading, int(context))  # type: ignore[arg-type]


class Window(NamedTuple):
    """A window of the corpus as it is read in a cell, at a rate (tokens a row)."""

    number: int
    cell: Cell
    rate: int


class _Windows(Dataset):
    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        return self.windows[index]


class PerplexityDataModule(CorpusDataModule):
    """Windows of text for the log-perplexity of a continuation after a context.

    `test` has one loader a rate. A batch's tasks are named by `Cell.task`; what is read the same
    at every rate (`full`, `none`) comes with the first one alone. Every text has at least
    `max(continuations)` targets, unless it ends before; the figure of a continuation of n tokens is
    the mean over the first n targets of each text. The word after the context stands before the
    targets in every reading, so that all of them predict the same tokens.

    Args:
        source: Where the text comes from; the Python reference by default. See `data.sources`.
        test_source: Text to measure on; what `source` holds out for test if None.
        contexts: Decoder tokens of the contexts, at most; they begin with a whole word, but for the
            reading `last`, which is cut at the token that gives it the positions of the rows.
        continuations: Decoder tokens of the continuations.
        readings: How contexts are read.
        num_windows: Windows, the same ones for every cell, model and rate.
        chat: Put context and continuation into the decoder's chat template.
        instruction: Stands between context and continuation, as in the model's training; the text
            goes on as it is if it is empty.
        headers: Whether the tokenizer's header and footer stand around the context.
        batch_size: Windows a batch and device.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        pin_memory: Copy batches to pinned memory, for a faster way to a GPU.
        tokenizer: The model's tokenizer; taken from the trainer's module if None.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        test_source: TextSource | None = None,
        contexts: list[int] | None = None,
        continuations: list[int] | None = None,
        readings: list[ContextReading] | None = None,
        num_windows: int = 32,
        chat: bool = False,
        instruction: str = "",
        headers: bool = False,
        batch_size: int = 4,
        num_workers: int = 0,
        pin_memory: bool = False,
        tokenizer: RefragTokenizer | None = None,
    ) -> None:
        super().__init__(
            source=source,
            test_source=test_source,
            tokenizer=tokenizer,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.contexts = sorted(contexts or [128, 256])
        self.continuations = sorted(continuations or [64, 128])
        for name, sizes in (("contexts", self.contexts), ("continuations", self.continuations)):
            if sizes[0] < 1:
                raise ValueError(f"{name} ({sizes}) must be at least 1")
        if num_windows < 1:
            raise ValueError(f"num_windows ({num_windows}) must be at least 1")
        self.readings = readings or list(get_args(ContextReading))
        self.num_windows = num_windows
        self.chat = chat
        self.instruction = instruction
        self.headers = headers

    @cached_property
    def format(self) -> PretrainFormat:
        """How context and continuation are put to the decoder."""
        around = None if self.headers else ""
        return PretrainFormat(
            self.tokenizer,
            chat=self.chat,
            instructions={"continue": self.instruction},
            header=around,
            footer=around,
        )

    def check(self, split: Split, corpus: Corpus) -> None:
        """Raises a ValueError where no text is long enough for the longest context."""
        self._place(corpus, 0)

    def example(self, window: Window) -> Example:
        """A window's text as it is read in its cell."""
        reading, context = window.cell
        text, at = self._place(self.corpus("test"), window.number)
        read = text.between(text.before(at, context, "decoder"), at)
        if reading == "last":
            slots = self._num_slots(read, window.rate)
            read = self.tokenizer.plain_decoder.cut(read, slots, from_end=True)
        # The word that stands before the targets.
        word = text.after(at, 1, "decoder")
        end = text.after(word, max(self.continuations), "decoder")
        if text.decoder[end] - text.decoder[word] < max(self.continuations):
            end = min(end + 1, len(text.decoder) - 1)
        example = self.format(
            "continue",
            [read],
            text.between(word, end),
            id=f"window-{window.number}",
            reading=_READINGS[reading],
        )
        segments = list(example.segments)
        if reading == "last":
            # It is cut off its text, so no space opens it: it takes the positions that it has.
            segments = [replace(s, after="text") if s.document else s for s in segments]
        (target,) = (place for place, segment in enumerate(segments) if segment.train)
        segments.insert(target, Segment(text.between(at, word), "text"))
        return Example(tuple(segments), task=window.cell.task, id=example.id, expand=example.expand)

    def collate(self, samples: list[Window]) -> TextBatch:
        """Builds a batch of windows of one rate."""
        examples = [self.example(window) for window in samples]
        return collate(examples, self.tokenizer, compression=samples[0].rate)

    def test_dataloader(self) -> list[DataLoader]:
        """Every window in every cell, a loader for each rate."""
        loaders = []
        for rate in self.tokenizer.rates:
            is_first = rate == self.tokenizer.rates[0]
            # Cell by cell, so that the texts of a batch are about as long as each other.
            windows = [
                Window(number, cell, rate)
                for cell in self.cells()
                if is_first or cell.reading not in ("full", "none")
                for number in range(self.num_windows)
            ]
            if windows:
                loaders.append(self.eval_dataloader(_Windows(windows)))
        return loaders

    def cells(self) -> list[Cell]:
        """Every combination of reading and context."""
        return [
            Cell(reading, context)
            for reading in self.readings
            for context in (self.contexts if reading != "none" else [0])
        ]

    def _place(self, corpus: Corpus, number: int) -> tuple[CorpusText, int]:
        """The place of a window: a function of its number and the corpus alone."""
        text, first = corpus.draw(
            np.random.default_rng([0, number]),
            context=max(self.contexts),
            # The word before the targets, and the one that may reach beyond them.
            continuation=max(self.continuations) + 16,
            unit="decoder",
        )
        return text, text.after(first, max(self.contexts), "decoder")

    def _num_slots(self, context: str, rate: int) -> int:
        """How many positions a context's rows take."""
        if self.tokenizer.encoder is None:
            return -(-len(self.tokenizer.plain_decoder([context])[0].ids) // rate)
        tokenizer = self.tokenizer.at(rate)
        (document,) = tokenizer.pack([context])
        return int(tokenizer.assembler.slots_of_rows(document.row_sizes).sum())
