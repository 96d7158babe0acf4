"""Lines: where texts stand in a batch, each on a line of its own or several packed on one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch

PaddingSide = Literal["left", "right"]
IGNORED = -100
"""The label of a position where no loss is taken."""


class Positions:
    """What one text is at the decoder's side, collected piece by piece.

    Several texts may share what they begin with: `branch` starts each of them behind it.

    Attributes:
        ids: Decoder tokens of each piece, (N,); the padding id at slots.
        slots: Slot of each position, or -1.
        labels: Label of each position, or -100.
        length: Positions so far.
        places: Position id of each position: 0 at the first, and behind a shared beginning at the
            first of each branch the same again.
        branches: The text of each position; -1 where several share it.
        is_trained: Whether a piece had labels.
    """

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.branches: list[np.ndarray] = []
        self.length = 0
        self.is_trained = False
        self._shared = 0
        self._place = 0
        self._branch = -1

    def branch(self, text: int) -> None:
        """Begins a text behind what was added before the first branch.

        Args:
            text: Its number in the batch.
        """
        if self._branch < 0:
            self._shared = self.length
        self._branch, self._place = text, self._shared

    def add(
        self, ids: np.ndarray, *, slots: np.ndarray | None = None, labels: np.ndarray | None = None
    ) -> None:
        """Appends a piece (N,)."""
        self.ids.append(ids)
        self.slots.append(np.full(len(ids), -1) if slots is None else slots)
        self.labels.append(np.full(len(ids), IGNORED) if labels is None else labels)
        self.places.append(self._place + np.arange(len(ids)))
        self.branches.append(np.full(len(ids), self._branch))
        self._place += len(ids)
        self.length += len(ids)
        self.is_trained |= labels is not None


@dataclass(frozen=True)
class Lines:
    """Where each text stands.

    Attributes:
        line: (N,) the line of each text.
        start: (N,) its first position on the line, padding on the left not counted.
        lengths: (N,) its positions.
        sizes: (B,) positions of each line.
    """

    line: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def one_a_line(lengths: np.ndarray) -> Lines:
    """Each of the texts (N,) on its own line, in their order."""
    return Lines(np.arange(len(lengths)), np.zeros_like(lengths), lengths, lengths)


def pack_lines(lengths: np.ndarray, line_length: int) -> Lines:
    """Packs texts on few lines that are about equally long, so that little is padded.

    How many lines: those of first-fit decreasing, at most 11/9 of the fewest possible, plus one
    (Johnson 1973). On so many the longest text comes first, each on the shortest line (Graham 1969,
    at most 4/3 of the shortest longest line), unless a line then gets too long; first fit's own
    lines are taken in that case. Texts of equal length keep their order, so the same texts always
    give the same lines.

    Args:
        lengths: (N,) positions of each text.
        line_length: Most positions of a line; no text is longer.
    """
    assert lengths.max(initial=1) <= line_length, (lengths.max(), line_length)
    fitted = _place(lengths, lambda sizes, length: int(np.argmax(sizes + length <= line_length)))
    num_lines = len(fitted.sizes)
    even = _place(lengths, lambda sizes, length: int(np.argmin(sizes[:num_lines])))
    return even if even.sizes.max(initial=0) <= line_length else fitted


def _place(lengths: np.ndarray, choose: Callable[[np.ndarray, int], int]) -> Lines:
    """Puts texts, the longest first, each on the line that is chosen by the lines' sizes."""
    line, start = np.zeros_like(lengths), np.zeros_like(lengths)
    sizes = np.zeros_like(lengths)  # as many lines as texts suffice
    for number in np.argsort(-lengths, kind="stable"):
        place = choose(sizes, int(lengths[number]))
        line[number], start[number] = place, sizes[place]
        sizes[place] += lengths[number]
    return Lines(line, start, lengths, sizes[: int(line.max(initial=-1)) + 1])


def lay_out(
    texts: Sequence[Positions],
    *,
    padding_side: PaddingSide,
    padding_id: int,
    line_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Puts texts on the lines of a batch and pads.

    Args:
        texts: The texts, those that share a beginning as one.
        padding_side: Where shorter lines are padded.
        padding_id: The decoder's padding token.
        line_length: Packs the texts into lines of at most so many positions, or as many as the
            longest text has: how long a text is shows only once it is tokenized.

    Returns:
        The decoder's side of a `RefragBatch`: `labels` where a text has some, `segment_ids` where
        texts are packed, `branch_ids` where some share a beginning.

    Raises:
        ValueError: If `line_length` is less than 1.
    """
    lengths = np.asarray([text.length for text in texts], dtype=np.int64)
    if line_length is None:
        lines = one_a_line(lengths)
    elif line_length < 1:
        raise ValueError(f"line_length ({line_length}) must be at least 1")
    else:
        lines = pack_lines(lengths, max(line_length, int(lengths.max(initial=1))))
    shape = (len(lines.sizes), int(lines.sizes.max(initial=0)))
    left = shape[1] - lines.sizes if padding_side == "left" else np.zeros_like(lines.sizes)
    # Of every real position: its text, its place in it, and where it stands in the batch.
    text_N = np.repeat(np.arange(len(texts)), lengths)
    place_N = np.arange(len(text_N)) - (np.cumsum(lengths) - lengths)[text_N]
    first_of_text = lines.line * shape[1] + left[lines.line] + lines.start
    flat_N = first_of_text[text_N] + place_N

    def laid_out(values_N: np.ndarray | int, padding: int) -> torch.Tensor:
        values_BS = np.full(shape, padding, dtype=np.int64)
        values_BS.reshape(-1)[flat_N] = values_N
        return torch.from_numpy(values_BS)

    position_N = _joined(text.places for text in texts)
    data = {
        "input_ids": laid_out(_joined(text.ids for text in texts), padding_id),
        "attention_mask": laid_out(1, 0),
        "position_ids": laid_out(position_N, 0),
        "slot_ids": laid_out(_joined(text.slots for text in texts), -1),
    }
    if any(text.is_trained for text in texts):
        labels_N = _joined(text.labels for text in texts)
        # Nothing of the same text stands before its first token, so nothing predicts it.
        data["labels"] = laid_out(np.where(position_N > 0, labels_N, IGNORED), IGNORED)
    if line_length is not None:
        data["segment_ids"] = laid_out(text_N, -1)
    branches_N = _joined(text.branches for text in texts)
    if (branches_N >= 0).any():
        data["branch_ids"] = laid_out(branches_N, -1)
    return data


def _joined(pieces: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *chain.from_iterable(pieces)])
