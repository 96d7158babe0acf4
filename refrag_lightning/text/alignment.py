"""Alignment of two tokenizers' tokens over one text.

An anchor (i, j) says that token i of one side and token j of the other end at the same character.
A span is what lies between two successive anchors: the shortest stretches of text that both sides
cut out with whole tokens. Anchors come from one look-up over both lists of offsets, in time linear
in tokens and characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Alignment:
    """Which span each token of both sides lies in.

    Attributes:
        encoder_spans: (M,) span of each encoder token (or row), or -1 after the last anchor.
        decoder_spans: (N,) span of each decoder token, or -1 after the last anchor.
        num_spans: P. Every span holds at least one token of each side.
    """

    encoder_spans: np.ndarray
    decoder_spans: np.ndarray
    num_spans: int

    @property
    def coverage(self) -> float:
        """Share of the decoder tokens that lie in a span."""
        return float(np.mean(self.decoder_spans >= 0)) if self.decoder_spans.size else 0.0

    @property
    def granularity(self) -> float:
        """Share of the decoder tokens that lie in a span of at most two tokens a side."""
        if not self.decoder_spans.size:
            return 0.0
        encoder_counts = np.bincount(self.encoder_spans[self.encoder_spans >= 0])
        decoder_counts = np.bincount(self.decoder_spans[self.decoder_spans >= 0])
        fine = (encoder_counts <= 2) & (decoder_counts <= 2)
        return float(decoder_counts[fine].sum() / self.decoder_spans.size)


def anchors(encoder_ends: np.ndarray, decoder_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the tokens of two sides that end at the same character.

    Of tokens that share an end (a character split between tokens), the last one counts.

    Args:
        encoder_ends: (M,) past-last character of each token, never falling.
        decoder_ends: (N,) the same for the other side.

    Returns:
        Two rising index arrays (P,): anchor p is the pair of their p-th entries.
    """
    size = 1 + max(encoder_ends[-1:].max(initial=0), decoder_ends[-1:].max(initial=0))
    last = np.full((2, size), -1, dtype=np.int64)
    # Where an index stands twice, NumPy keeps the last value.
    last[0, encoder_ends] = np.arange(len(encoder_ends))
    last[1, decoder_ends] = np.arange(len(decoder_ends))
    last[:, 0] = -1  # a token that covers no character of its own ends nowhere
    both = (last >= 0).all(axis=0)
    return last[0, both], last[1, both]


def align(encoder_ends: np.ndarray, decoder_ends: np.ndarray) -> Alignment:
    """Aligns two tokenizations of one text, given their past-last characters (M,) and (N,)."""
    encoder_anchors, decoder_anchors = anchors(encoder_ends, decoder_ends)
    return Alignment(
        _spans_between(encoder_anchors, len(encoder_ends)),
        _spans_between(decoder_anchors, len(decoder_ends)),
        len(encoder_anchors),
    )


def align_rows(decoder_rows: np.ndarray, num_rows: int) -> Alignment:
    """Aligns rows with the decoder tokens that belong to them.

    A row without a decoder token joins the next one that has some.

    Args:
        decoder_rows: (N,) row of each decoder token, never falling.
        num_rows: Number of rows.
    """
    filled, decoder_spans = np.unique(decoder_rows, return_inverse=True)
    return Alignment(_spans_between(filled, num_rows), decoder_spans, len(filled))


def _spans_between(last_of_span: np.ndarray, num_tokens: int) -> np.ndarray:
    spans = np.searchsorted(last_of_span, np.arange(num_tokens), side="left")
    return np.where(spans < len(last_of_span), spans, -1)


def ends_by_decoding(
    text: str, ids: Sequence[int], decode: Callable[[list[int]], str]
) -> np.ndarray:
    """Recovers past-last characters (N,) for a tokenizer that has no offsets.

    Token n ends where the decoding of tokens 0…n does, if that is a prefix of the text; a token
    whose prefix ends inside a character ends with that character. Quadratic in N.

    Raises:
        ValueError: If decoding all tokens does not give the text back.
    """
    prefixes = [decode(list(ids[: n + 1])) for n in range(len(ids))]
    ends = [len(prefix) if text.startswith(prefix) else -1 for prefix in prefixes]
    if ends and prefixes[-1] != text:
        raise ValueError(
            f"a tokenizer without offsets must decode its tokens back to the text, but gave "
            f"{prefixes[-1][:40]!r} for {text[:40]!r}"
        )
    for n in range(len(ends) - 2, -1, -1):
        if ends[n] < 0 or ends[n] > ends[n + 1]:
            ends[n] = ends[n + 1]
    return np.asarray(ends, dtype=np.int64)


def anchors_by_decoding(
    text: str,
    encoder_ids: Sequence[int],
    encoder_decode: Callable[[list[int]], str],
    decoder_ids: Sequence[int],
    decoder_decode: Callable[[list[int]], str],
) -> tuple[np.ndarray, np.ndarray]:
    """Finds anchors without offsets: pairs of token prefixes that decode to the same string.

    The reference that `anchors` is tested against. It applies where both decodings give the text
    back letter by letter, and takes quadratic time. Two prefix lengths match where the decoded
    strings match, so the dynamic programme over all pairs reduces to one merge of the two lists.

    Returns:
        As `anchors`.
    """
    ends = []
    for ids, decode in ((encoder_ids, encoder_decode), (decoder_ids, decoder_decode)):
        prefixes = (decode(list(ids[: n + 1])) for n in range(len(ids)))
        ends.append({p: n for n, p in enumerate(prefixes) if p and text.startswith(p)})
    shared = sorted(ends[0].keys() & ends[1].keys(), key=len)
    pairs = [(ends[0][prefix], ends[1][prefix]) for prefix in shared]
    pairs_P2 = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return pairs_P2[:, 0], pairs_P2[:, 1]
