"""RefragBatch: what a tokenizer gives and a model takes.

Legend of the shape suffixes, the same in every file: B texts, S decoder positions, R encoder
sequences, T encoder tokens, C rows, P spans, E encoder hidden, D decoder hidden, V vocabulary,
m slots a row.

| key | shape | meaning |
|---|---|---|
| `input_ids` | (B, S) | decoder token ids; at slots and padding the padding id |
| `attention_mask` | (B, S) | 1 at real positions (tokens and slots), 0 at padding |
| `position_ids` | (B, S) | 0 at the first real position of a text or packed segment |
| `slot_ids` | (B, S) | which of the C * m projected vectors stands here (row * m + j), or -1 |
| `labels` | (B, S) | optional; a token's label stands at its own position, -100 elsewhere |
| `segment_ids` | (B, S) | only where texts are packed: which text, or -1 at padding |
| `branch_ids` | (B, S) | only where texts share what they begin with: the text that a position \
belongs to alone, or -1 (shared, padding) |
| `encoder_input_ids` | (R, T) | encoder tokens with the encoder's special tokens |
| `encoder_attention_mask` | (R, T) | 1 at real encoder tokens |
| `encoder_row_ids` | (R, T) | the row that a token pools into, or -1 (special tokens, padding) |
| `row_states_mask` | (C,) | True where `row_states` holds a row's states; its length is C |
| `row_states` | (C, m, E) | optional; states given from outside, before the projector |

Where texts share a beginning (several questions behind one context), it stands once, and each text
goes on behind it as if it were alone: `position_ids` count on from it, a text sees the beginning
and itself.

Where texts are packed, B counts lines that hold several texts each, in any order; `segment_ids`
say which. A text's first token has no label, since nothing stands before it that could predict it.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

if TYPE_CHECKING:
    import numpy as np
    import torch

RowState = Literal["vector", "tokens", "empty"]
ROW_STATES: tuple[RowState, ...] = get_args(RowState)


@dataclass(frozen=True)
class RowTrace:
    """Where one row of one text came from and what became of it.

    Attributes:
        row: Index of the row among the batch's C rows.
        document: Index of the document within its text.
        document_id: The document's id, as the decoder reads it.
        start: First character of the row in the document's text.
        end: One past the last character of the row.
        state: `vector` (one projected vector a slot), `tokens` (handed to the decoder as its own
            tokens) or `empty` (the encoder's tokenizer made no token of it, so nothing stands).
        lost: Characters of the row that the encoder read as its unknown token, or not at all.
    """

    row: int
    document: int
    document_id: str
    start: int
    end: int
    state: RowState
    lost: int = 0


class TextTrace(Sequence[RowTrace]):
    """The rows of one text, in order; kept as arrays, and made into `RowTrace` when looked at.

    Args:
        rows: (N,) row of the batch that each of the text's rows is.
        documents: (N,) index of its document.
        bounds: (N, 2) its characters.
        states: (N,) index into the values of `RowState`.
        lost: (N,) lost characters.
        document_ids: The id of each document.
    """

    def __init__(
        self,
        rows: np.ndarray,
        documents: np.ndarray,
        bounds: np.ndarray,
        states: np.ndarray,
        lost: np.ndarray,
        document_ids: list[str],
    ) -> None:
        self.rows = rows
        self.documents = documents
        self.bounds = bounds
        self.states = states
        self.lost = lost
        self.document_ids = document_ids

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> RowTrace: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowTrace]: ...
    def __getitem__(self, index: int | slice) -> RowTrace | list[RowTrace]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        document = int(self.documents[index])
        return RowTrace(
            row=int(self.rows[index]),
            document=document,
            document_id=self.document_ids[document],
            start=int(self.bounds[index, 0]),
            end=int(self.bounds[index, 1]),
            state=ROW_STATES[self.states[index]],
            lost=int(self.lost[index]),
        )


class RefragBatch(UserDict):
    """A mapping of tensors (see the module's table) with two attributes beside it.

    `model(**batch)` passes the tensors alone.

    Attributes:
        compression: Encoder (or decoder) tokens a row, as the batch was packed.
        num_rows: C, the number of distinct rows in the batch.
        num_slots: m, the vectors a row.
        trace: For each text (not line), its rows in order; the list index is what `expand` takes.
    """

    def __init__(
        self,
        data: dict[str, torch.Tensor] | None = None,
        *,
        compression: int = 0,
        num_rows: int = 0,
        num_slots: int = 1,
        trace: Sequence[Sequence[RowTrace]] = (),
    ) -> None:
        super().__init__(data or {})
        self.compression = compression
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.trace = trace

    def to(self, device: Any, *, non_blocking: bool = False) -> RefragBatch:
        """Moves every tensor to `device` in place and returns the batch."""
        for key, value in self.data.items():
            self.data[key] = value.to(device, non_blocking=non_blocking)
        return self

    def pin_memory(self) -> RefragBatch:
        """Pins every tensor's memory; DataLoader calls it when `pin_memory=True`."""
        for key, value in self.data.items():
            self.data[key] = value.pin_memory()
        return self
