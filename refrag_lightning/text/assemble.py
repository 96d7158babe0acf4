"""Assembling: token ids and packed documents of several texts to one `RefragBatch`.

Everything is index arithmetic on NumPy arrays; the only Python loops are over texts and their
pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from refrag_lightning.text.batch import ROW_STATES, RefragBatch, TextTrace
from refrag_lightning.text.lines import PaddingSide, Positions, lay_out
from refrag_lightning.text.packing import PackedDocument, cut_windows

Context = Literal["row", "document"]


@dataclass(frozen=True)
class DocumentPiece:
    """A document's place in a text.

    Attributes:
        index: Which of the batch's packed documents it is.
        id: The id that the decoder reads.
        expanded: (C,) True where a row stands as its own decoder tokens.
        decoder_ids: (N,) the document's decoder tokens, or none where no row is expanded.
        decoder_rows: (N,) the row that each of them belongs to.
    """

    index: int
    id: str
    expanded: np.ndarray
    decoder_ids: np.ndarray
    decoder_rows: np.ndarray


@dataclass(frozen=True)
class TrainedPiece:
    """A stretch of a text that the decoder is trained to write.

    Attributes:
        ids: (N,) its decoder token ids, which are its labels too.
    """

    ids: np.ndarray


Piece = np.ndarray | TrainedPiece | DocumentPiece
"""A stretch of a text: decoder token ids, the same to be learnt, or a document."""


@dataclass(frozen=True)
class Assembler:
    """How batches are put together; the tokenizer's settings that matter here.

    Attributes:
        compression: Tokens a row.
        num_slots: m, the vectors a row.
        context: Whether the encoder reads a row alone or a window of its document.
        max_encoder_tokens: Most tokens of an encoder sequence, special tokens not counted.
        encoder_prefix: Special tokens that open an encoder sequence.
        encoder_suffix: Special tokens that close it.
        encoder_pad_id: The encoder's padding token.
        decoder_pad_id: The decoder's padding token; it also stands at slots.
    """

    compression: int
    num_slots: int
    context: Context
    max_encoder_tokens: int
    encoder_prefix: tuple[int, ...]
    encoder_suffix: tuple[int, ...]
    encoder_pad_id: int
    decoder_pad_id: int

    def __call__(
        self,
        texts: Sequence[Sequence[Piece]],
        documents: Sequence[PackedDocument],
        *,
        padding_side: PaddingSide,
        row_states: torch.Tensor | None = None,
        row_states_mask: torch.Tensor | None = None,
        line_length: int | None = None,
        shared: Sequence[tuple[Sequence[int], int]] | None = None,
    ) -> RefragBatch:
        """Builds a batch; it has labels where a text has a trained piece.

        Args:
            texts: The pieces of each text.
            documents: The packed documents that the pieces point to, each text of a document once.
            padding_side: Where shorter texts are padded.
            row_states: (C, m, E) states given from outside.
            row_states_mask: (C,) which rows they are given for; all by default.
            line_length: Packs the texts into lines of at most so many positions.
            shared: Which texts begin with the same pieces, and with how many; each text once. By
                default each stands alone.

        Raises:
            ValueError: If `row_states` or its mask does not have C rows.
        """
        rows = _Rows(documents, share=self.context == "row")
        mask = _states_mask(row_states, row_states_mask, rows.num_unique)
        num_slots_of_row = self.slots_of_rows(rows.sizes)

        wanted = np.zeros(rows.num_unique, dtype=bool)
        sequences: list[Positions] = []

        def add(sequence: Positions, piece: Piece) -> None:
            if isinstance(piece, np.ndarray):
                sequence.add(piece)
                return
            if isinstance(piece, TrainedPiece):
                sequence.add(piece.ids, labels=piece.ids)
                return
            unique = rows.unique[rows.of_document(piece.index)]
            wanted[unique[~piece.expanded]] = True
            counts = num_slots_of_row[rows.of_document(piece.index)] * ~piece.expanded
            ids, slots = self._interleave(piece, unique, counts)
            sequence.add(ids, slots=slots)

        for group, num_shared in shared or [([number], 0) for number in range(len(texts))]:
            sequence = Positions()
            for piece in texts[group[0]][:num_shared]:
                add(sequence, piece)
            for number in group:
                if shared is not None:
                    sequence.branch(number)
                for piece in texts[number][num_shared:]:
                    add(sequence, piece)
            sequences.append(sequence)
        traces = [
            _trace([p for p in pieces if isinstance(p, DocumentPiece)], rows, documents)
            for pieces in texts
        ]

        data = lay_out(
            sequences,
            padding_side=padding_side,
            padding_id=self.decoder_pad_id,
            line_length=line_length,
        )
        data.update(self._encoder_tensors(rows, documents, wanted & ~mask.numpy()))
        data["row_states_mask"] = mask
        if row_states is not None:
            data["row_states"] = row_states
        return RefragBatch(
            data,
            compression=self.compression,
            num_rows=rows.num_unique,
            num_slots=self.num_slots,
            trace=traces,
        )

    def slots_of_rows(self, row_sizes: np.ndarray) -> np.ndarray:
        """Slots that each row takes, given its encoder tokens (C,): none for an empty row."""
        return np.minimum(-(-row_sizes * self.num_slots // self.compression), self.num_slots)

    def _interleave(
        self, piece: DocumentPiece, unique: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Puts the slots of compressed rows between the tokens of expanded ones."""
        # The first slot of each row, less the place where it stands; the row's others follow it.
        shift = unique * self.num_slots - (np.cumsum(counts) - counts)
        slots = np.repeat(shift, counts) + np.arange(counts.sum())
        ids = np.full(len(slots), self.decoder_pad_id)
        if not piece.expanded.any():
            return ids, slots
        slot_rows = np.repeat(np.arange(len(counts)), counts)
        chosen = piece.expanded[piece.decoder_rows]
        tokens = piece.decoder_ids[chosen]
        order = np.argsort(np.concatenate([slot_rows, piece.decoder_rows[chosen]]), kind="stable")
        ids = np.concatenate([ids, tokens])
        slots = np.concatenate([slots, np.full(len(tokens), -1)])
        return ids[order], slots[order]

    def _encoder_tensors(
        self, rows: _Rows, documents: Sequence[PackedDocument], wanted: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Builds the encoder's sequences: the wanted rows, or the windows that hold one."""
        # Where no row is wanted, there are no windows to look for either.
        if self.context == "row" or not wanted.any():
            # The first row of each kind stands for all that share its tokens.
            sequence_of_row = np.where(rows.is_first & wanted[rows.unique], rows.unique, -1)
        else:
            windows = [cut_windows(d.row_sizes, self.max_encoder_tokens) for d in documents]
            first = np.cumsum([0, *(w.max(initial=-1) + 1 for w in windows)])
            window_of_row = np.concatenate(
                [
                    np.zeros(0, dtype=np.int64),
                    *(w + f for w, f in zip(windows, first[:-1], strict=True)),
                ]
            )
            window_wanted = np.zeros(first[-1], dtype=bool)
            window_wanted[window_of_row[wanted[rows.unique]]] = True
            sequence_of_row = np.where(window_wanted[window_of_row], window_of_row, -1)
        chosen = sequence_of_row[rows.token_rows] >= 0
        ids, row_ids = rows.token_ids[chosen], rows.unique[rows.token_rows[chosen]]
        keys = sequence_of_row[rows.token_rows[chosen]]
        _, starts, sequence, lengths = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        places = np.arange(len(ids)) - starts[sequence] + len(self.encoder_prefix)

        num_specials = len(self.encoder_prefix) + len(self.encoder_suffix)
        num_tokens = int(lengths.max()) + num_specials if lengths.size else 0
        input_ids_RT = np.full((len(lengths), num_tokens), self.encoder_pad_id, dtype=np.int64)
        row_ids_RT = np.full(input_ids_RT.shape, -1, dtype=np.int64)
        if lengths.size:
            input_ids_RT[:, : len(self.encoder_prefix)] = self.encoder_prefix
            input_ids_RT[sequence, places] = ids
            row_ids_RT[sequence, places] = row_ids
            after = (
                lengths[:, None] + len(self.encoder_prefix) + np.arange(len(self.encoder_suffix))
            )
            input_ids_RT[np.arange(len(lengths))[:, None], after] = self.encoder_suffix
        mask_RT = np.arange(num_tokens) < (lengths + num_specials)[:, None]
        return {
            "encoder_input_ids": torch.from_numpy(input_ids_RT),
            "encoder_attention_mask": torch.from_numpy(mask_RT.astype(np.int64)),
            "encoder_row_ids": torch.from_numpy(row_ids_RT),
        }


class _Rows:
    """All documents' rows one after another, and which of them are the same.

    Attributes:
        token_ids: (N,) encoder tokens of all documents.
        token_rows: (N,) row of each.
        sizes: Encoder tokens of each row.
        unique: Which of the batch's C rows each row is, numbered in order of appearance.
        is_first: True where a row is the first of its kind.
        num_unique: C.
    """

    def __init__(self, documents: Sequence[PackedDocument], *, share: bool) -> None:
        counts = [document.num_rows for document in documents]
        self._first = np.cumsum([0, *counts])
        none = np.zeros(0, dtype=np.int64)
        self.token_ids = np.concatenate([none, *(d.encoder_ids for d in documents)])
        self.token_rows = np.concatenate(
            [none, *(d.token_rows + f for d, f in zip(documents, self._first[:-1], strict=True))]
        )
        num_rows = int(self._first[-1])
        self.sizes = np.bincount(self.token_rows, minlength=num_rows)
        self.unique = np.arange(num_rows)
        if share and num_rows:
            table = np.full((num_rows, max(1, self.sizes.max())), -1, dtype=np.int64)
            starts = np.cumsum(self.sizes) - self.sizes
            table[self.token_rows, np.arange(len(self.token_ids)) - starts[self.token_rows]] = (
                self.token_ids
            )
            _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
            order = np.argsort(first, kind="stable")
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            self.unique = rank[inverse.reshape(-1)]
        self.num_unique = int(self.unique.max(initial=-1)) + 1
        self.is_first = np.zeros(num_rows, dtype=bool)
        self.is_first[np.unique(self.unique, return_index=True)[1]] = True

    def of_document(self, index: int) -> slice:
        """The rows of one document."""
        return slice(int(self._first[index]), int(self._first[index + 1]))


def _states_mask(
    row_states: torch.Tensor | None, mask: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    if row_states is None:
        if mask is not None:
            raise ValueError("row_states_mask was given without row_states")
        return torch.zeros(num_rows, dtype=torch.bool)
    if mask is None:
        mask = torch.ones(num_rows, dtype=torch.bool)
    for name, tensor in (("row_states", row_states), ("row_states_mask", mask)):
        if len(tensor) != num_rows:
            raise ValueError(f"{name} holds {len(tensor)} rows, but the texts have {num_rows}")
    return mask.bool().cpu()


def _trace(
    placed: list[DocumentPiece], rows: _Rows, documents: Sequence[PackedDocument]
) -> TextTrace:
    none = np.zeros(0, dtype=np.int64)
    bounds = [documents[piece.index].bounds for piece in placed]
    slices = [rows.of_document(piece.index) for piece in placed]
    vector, tokens, empty = (ROW_STATES.index(name) for name in ("vector", "tokens", "empty"))
    expanded = np.concatenate([none.astype(bool), *(piece.expanded for piece in placed)])
    sizes = np.concatenate([none, *(rows.sizes[s] for s in slices)])
    return TextTrace(
        np.concatenate([none, *(rows.unique[s] for s in slices)]),
        np.concatenate([none, *(np.full(len(b) - 1, n) for n, b in enumerate(bounds))]),
        np.concatenate([none.reshape(0, 2), *(np.stack([b[:-1], b[1:]], axis=1) for b in bounds)]),
        np.where(expanded, tokens, np.where(sizes > 0, vector, empty)),
        np.concatenate([none, *(documents[piece.index].lost for piece in placed)]),
        [piece.id for piece in placed],
    )
