"""Packing: a document's encoder tokens to rows, and rows to characters and decoder tokens.

The rows' character spans tile the document: row n ends where its last token does, a gap goes to
the next row and the tail to the last one. A token of the other side belongs to the row that holds
its last character, so any set of rows has disjoint tokens and all rows have the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refrag_lightning.text.plain import Encoded
from refrag_lightning.text.sentences import sentence_ends

ChunkBy = Literal["encoder", "decoder", "sentence"]


@dataclass(frozen=True)
class PackedDocument:
    """A document's encoder tokens and rows (C rows here are this document's alone).

    Attributes:
        encoder_ids: (N,) encoder token ids, without special tokens.
        token_rows: (N,) row of each token, never falling.
        bounds: (C + 1,) row n covers the characters from bounds[n] to bounds[n + 1].
        lost: (C,) characters of each row that the encoder read as its unknown token, or not at
            all; white space does not count.
    """

    encoder_ids: np.ndarray
    token_rows: np.ndarray
    bounds: np.ndarray
    lost: np.ndarray

    @property
    def num_rows(self) -> int:
        """C."""
        return len(self.bounds) - 1

    @property
    def row_sizes(self) -> np.ndarray:
        """(C,) encoder tokens of each row. Only a document without any token has an empty row."""
        return np.bincount(self.token_rows, minlength=self.num_rows)


def pack(
    text: str,
    encoder: Encoded,
    *,
    compression: int,
    chunk_by: ChunkBy = "encoder",
    decoder: Encoded | None = None,
    unknown_id: int | None = None,
    max_row_tokens: int | None = None,
    max_sentence: int = 2,
) -> PackedDocument:
    """Cuts a document into rows of `compression` tokens, or of one sentence.

    A document that is not empty, but of which the encoder reads no token, is one empty row.

    Args:
        text: The document.
        encoder: Its encoder tokens.
        compression: Tokens a row; the last row may be shorter.
        chunk_by: Whose tokens are counted. With `decoder`, a row that no encoder token ends in
            joins the next one (at the end of the document the one before), and a row of more than
            `max_row_tokens` encoder tokens is split. With `sentence`, a row is one sentence; one of
            more than `max_sentence` * compression encoder tokens is split into parts as equal as
            can be, and one without a token joins its neighbour likewise.
        decoder: The document's decoder tokens; needed with `chunk_by="decoder"`.
        unknown_id: The encoder's unknown token, for counting lost characters.
        max_row_tokens: Most encoder tokens that a row may have.
        max_sentence: The multiple of `compression` that a sentence may be long.

    Raises:
        ValueError: If `compression` is less than 1.
    """
    if compression < 1:
        raise ValueError(f"compression ({compression}) must be at least 1")
    if not text:
        bounds, token_rows = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    elif chunk_by == "encoder" or not encoder.ids.size:
        bounds = _bounds(text, encoder.ends, compression)
        token_rows = np.arange(len(encoder.ids)) // compression
    else:
        if chunk_by == "sentence":
            counted = np.concatenate([[0], sentence_ends(text)])
            longest = max_sentence * compression
            max_row_tokens = longest if max_row_tokens is None else min(longest, max_row_tokens)
        else:
            assert decoder is not None
            counted = _bounds(text, decoder.ends, compression)
        filled, token_rows = np.unique(rows_of_tokens(counted, encoder.ends), return_inverse=True)
        bounds = np.concatenate([[0], counted[filled[:-1] + 1], [len(text)]])
        if max_row_tokens is not None:
            parts = _parts(token_rows, max_row_tokens, equal=chunk_by == "sentence")
            bounds, token_rows = _split_rows(bounds, token_rows, encoder.ends, parts)
    lost = _lost(text, encoder, bounds, unknown_id)
    return PackedDocument(encoder.ids, token_rows, bounds, lost)


def as_text_only(text: str) -> PackedDocument:
    """A document as one row without encoder tokens, where no encoder is there to read it."""
    none = np.zeros(0, dtype=np.int64)
    bounds = np.unique([0, len(text)])
    return PackedDocument(none, none, bounds, np.zeros(len(bounds) - 1, dtype=np.int64))


def rows_of_tokens(bounds: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Gives each token the row that holds its last character.

    Args:
        bounds: (C + 1,) row boundaries in characters, never falling.
        ends: (N,) past-last character of each token.

    Returns:
        (N,) rows, never falling where `ends` never falls.
    """
    last_character = np.maximum(ends - 1, 0)
    rows = np.searchsorted(bounds[1:], last_character, side="right")
    return np.minimum(rows, max(len(bounds) - 2, 0))


def cut_windows(row_sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Cuts a document at row edges into windows of at most `max_tokens` tokens, greedily.

    Returns:
        (C,) window of each row.
    """
    windows = np.zeros(len(row_sizes), dtype=np.int64)
    totals = np.cumsum(row_sizes)
    start, used = 0, 0
    while start < len(row_sizes):
        stop = int(np.searchsorted(totals, used + max_tokens, side="right"))
        assert stop > start, "a row is longer than a window"
        windows[stop:] += 1
        used, start = int(totals[stop - 1]), stop
    return windows


def _bounds(text: str, ends: np.ndarray, compression: int) -> np.ndarray:
    inner = ends[compression - 1 : -1 : compression]
    return np.concatenate([[0], inner, [len(text)]])


def _parts(token_rows: np.ndarray, max_tokens: int, *, equal: bool) -> np.ndarray:
    """Cuts rows of more than `max_tokens` tokens: each token's part of its row, (N,).

    The parts are as long as they may be and a rest, or as few but as equal as can be.
    """
    first_tokens = np.searchsorted(token_rows, token_rows, side="left")
    rank = np.arange(len(token_rows)) - first_tokens
    if not equal:
        return rank // max_tokens
    sizes = np.bincount(token_rows)[token_rows]
    return rank * -(-sizes // max_tokens) // sizes


def _split_rows(
    bounds: np.ndarray, token_rows: np.ndarray, ends: np.ndarray, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    split = np.unique(np.stack([token_rows, parts]), axis=1, return_inverse=True)[1].reshape(-1)
    last_tokens = np.flatnonzero(np.diff(split, append=split[-1] + 1))
    row_ends = bounds[1:][token_rows[last_tokens]]
    is_last_part = np.diff(token_rows[last_tokens], append=token_rows[-1] + 1) > 0
    new_ends = np.where(is_last_part, row_ends, ends[last_tokens])
    return np.concatenate([[0], new_ends]), split


def _lost(text: str, encoder: Encoded, bounds: np.ndarray, unknown_id: int | None) -> np.ndarray:
    """Counts each row's characters that no known token covers, white space aside."""
    known = encoder.ids != (-1 if unknown_id is None else unknown_id)
    depth = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(depth, encoder.starts[known], 1)
    np.add.at(depth, encoder.ends[known], -1)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lost = (np.cumsum(depth)[:-1] <= 0) & ~is_white_space(characters)
    return np.diff(np.concatenate([[0], np.cumsum(lost)])[bounds])


def is_white_space(characters: np.ndarray) -> np.ndarray:
    """Whether each of the code points (N,) is white space, (N,)."""
    return _IS_SPACE[np.minimum(characters, len(_IS_SPACE) - 1)]


# U+3000 is the last white space character of Unicode; the entry behind it stands for the others.
_IS_SPACE = np.asarray([chr(code).isspace() for code in range(0x3002)])
