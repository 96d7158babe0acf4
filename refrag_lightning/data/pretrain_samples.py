"""Which pre-training examples there are, and about how long they are, before any text is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from refrag_lightning.data.examples import Reading
from refrag_lightning.data.pretrain_examples import PretrainFormat
from refrag_lightning.data.sources import Split


class Sample(NamedTuple):
    """What is fixed about an example before its text is cut.

    Attributes:
        split: Which corpus it is cut from.
        number: Its number in the split.
        num_rows: Rows of its context; in validation and test, at the lowest rate.
        task: `reconstruct` or `continue`.
        rate: Tokens a row; None takes the rate that its batch draws.
        reading: How the documents are read.
    """

    split: Split
    number: int
    num_rows: int
    task: str
    rate: int | None = None
    reading: Reading = "compressed"


class Samples(Dataset):
    """A list of samples.

    Args:
        samples: The samples.
        lengths: About how many positions each of them takes in the decoder, if that is known.
    """

    def __init__(self, samples: Sequence[Sample], lengths: np.ndarray | None = None) -> None:
        self.samples = samples
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def example_lengths(
    rows: np.ndarray,
    tasks: np.ndarray,
    format: PretrainFormat,
    *,
    tokens_per_row: float,
    continuation: int,
    num_documents: float,
    expand_share: float,
) -> np.ndarray:
    """About how many positions of the decoder each example takes (N,).

    Args:
        rows: (N,) rows of the contexts.
        tasks: (N,) their tasks.
        format: How tasks are put to the decoder.
        tokens_per_row: Decoder tokens of a row's text.
        continuation: Decoder tokens that a continuation has.
        num_documents: Documents of a context.
        expand_share: Share of the rows that stand as tokens.
    """
    text = rows * tokens_per_row
    lengths = rows + expand_share * np.maximum(text - rows, 0)
    for task in np.unique(tasks):
        target = text if task == "reconstruct" else float(continuation)
        around = _positions_around(format, str(task), math.ceil(num_documents))
        lengths = lengths + np.where(tasks == task, target + around, 0)
    return np.ceil(lengths).astype(np.int64)


def _positions_around(format: PretrainFormat, task: str, num_documents: int) -> int:
    """Positions of an example beside its documents and its target."""
    tokenizer = format.tokenizer
    segments = format(task, ["x"] * num_documents, "x").segments
    (tokens,) = tokenizer.decoder_tokens([segments])
    around = [t.ids for s, t in zip(segments, tokens, strict=True) if s.document is None]
    return len(tokenizer.opening_ids) + sum(map(len, around))
