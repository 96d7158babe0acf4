"""AlignmentBatch and Aligner: text to pairs of batches with the spans that they share.

The student reads a piece as projected vectors, one for each encoder token (`spans="token"`) or for
each row of `compression` tokens (`spans="row"`); the teacher reads it as the decoder's own tokens.
Spans say which positions of the two stand for the same characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from refrag_lightning.text.alignment import Alignment, align, align_rows
from refrag_lightning.text.assemble import Assembler, DocumentPiece, Piece
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.packing import PackedDocument, rows_of_tokens
from refrag_lightning.text.tokenizer import RefragTokenizer

COLUMNS = ("encoder_ids", "token_rows", "row_spans", "decoder_ids", "decoder_spans")
"""What an aligned piece consists of: encoder tokens, the row of each, the span of each row,
decoder tokens, the span of each."""

Example = dict[str, np.ndarray]


_MOVABLE = (RefragBatch, torch.Tensor)


class NoSpansError(ValueError):
    """Not one span of the text is common to both tokenizers, so there is nothing to learn."""


@dataclass
class AlignmentBatch:
    """A batch for alignment (P spans in all).

    Attributes:
        student: Every document compressed, padded on the right.
        teacher: The same texts in decoder tokens, padded on the right.
        student_spans: (B, S) span of each of the student's positions, or -1.
        teacher_spans: (B, S') span of each of the teacher's positions, or -1.
        student_last: (P,) last position of each span, counted over the flattened (B, S).
        teacher_last: (P,) the same for the teacher, over (B, S').
        one_token: (P,) True where a span is one vector and one decoder token.
        spans_of_texts: Spans of each text; a text's are numbered after those of the texts before.
        num_tokens: Decoder tokens, padding not counted.
        coverage: Share of the decoder tokens that lie in a span.
        granularity: Share of the decoder tokens in spans of at most two tokens a side.
    """

    student: RefragBatch
    teacher: RefragBatch
    student_spans: torch.Tensor
    teacher_spans: torch.Tensor
    student_last: torch.Tensor
    teacher_last: torch.Tensor
    one_token: torch.Tensor
    spans_of_texts: tuple[int, ...]
    num_tokens: int
    coverage: float
    granularity: float

    @property
    def num_spans(self) -> int:
        """P."""
        return len(self.student_last)

    @property
    def num_texts(self) -> int:
        """B."""
        return len(self.spans_of_texts)

    def to(self, device: Any, *, non_blocking: bool = False) -> AlignmentBatch:
        """Moves every tensor to `device`."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AlignmentBatch:
        """Pins every tensor's memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, function: Callable[[Any], Any]) -> AlignmentBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: function(v) for n, v in values.items() if isinstance(v, _MOVABLE)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Aligner:
    """Cuts texts into pieces, aligns them, and builds batches of them.

    Attributes:
        tokenizer: The model's tokenizer.
        spans: One vector for each encoder token, or for each row.
        max_tokens: Most encoder tokens of a piece.
    """

    tokenizer: RefragTokenizer
    spans: Literal["token", "row"]
    max_tokens: int

    def pieces(self, text: str) -> list[str]:
        """Cuts a text into pieces of at most `max_tokens` encoder tokens, before white space.

        Only a stretch of `max_tokens` tokens without white space is cut inside.
        """
        (encoded,) = self.tokenizer.plain_encoder([text])
        starts = encoded.starts
        spaced = np.asarray([s > 0 and text[s - 1].isspace() for s in starts.tolist()], dtype=bool)
        cuts, first = [0], 0
        while first + self.max_tokens < len(starts):
            stop = first + self.max_tokens
            words = np.flatnonzero(spaced[first + 1 : stop + 1])
            first = first + 1 + int(words[-1]) if words.size else stop
            # The space before a word goes with it: most decoders read " word" as one token.
            cuts.append(max(int(starts[first]) - int(spaced[first]), cuts[-1]))
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if a < b]

    def examples(self, text: str) -> list[Example]:
        """Aligns each piece of a text; pieces without a span are left out."""
        pieces = self.pieces(text)
        decoded = self.tokenizer.plain_decoder(pieces)
        examples = []
        if self.spans == "token":
            for encoder, decoder in zip(self.tokenizer.plain_encoder(pieces), decoded, strict=True):
                alignment = align(encoder.ends, decoder.ends)
                examples.append((encoder.ids, np.arange(len(encoder.ids)), alignment, decoder.ids))
        else:
            for document, decoder in zip(self.tokenizer.pack(pieces), decoded, strict=True):
                rows = rows_of_tokens(document.bounds, decoder.ends)
                alignment = align_rows(rows, document.num_rows)
                examples.append((document.encoder_ids, document.token_rows, alignment, decoder.ids))
        return [
            {
                "encoder_ids": encoder_ids,
                "token_rows": token_rows,
                "row_spans": alignment.encoder_spans,
                "decoder_ids": decoder_ids,
                "decoder_spans": alignment.decoder_spans,
            }
            for encoder_ids, token_rows, alignment, decoder_ids in examples
            if alignment.num_spans and encoder_ids.size
        ]

    @property
    def assembler(self) -> Assembler:
        """Builds the batches; for token spans with rows of one token.

        A model that reads each row alone has its tokens' states from rows of `compression` tokens,
        so the windows are no longer than that.
        """
        assembler = self.tokenizer.assembler
        if self.spans == "row":
            return assembler
        max_tokens = assembler.max_encoder_tokens
        if self.tokenizer.context == "row":
            max_tokens = self.tokenizer.compression
        return replace(
            assembler,
            compression=1,
            num_slots=1,
            context="document",
            max_encoder_tokens=max_tokens,
        )

    def collate(self, examples: Sequence[Example]) -> AlignmentBatch:
        """Builds a batch of examples.

        Raises:
            NoSpansError: If there is not one span in the batch.
        """
        assembler = self.assembler
        opening = self.tokenizer.opening_ids
        documents: list[PackedDocument] = []
        students: list[list[Piece]] = []
        teachers: list[list[Piece]] = []
        student_spans: list[np.ndarray] = []
        teacher_spans: list[np.ndarray] = []
        spans_of_texts: list[int] = []
        for number, example in enumerate(examples):
            num_rows = len(example["row_spans"])
            none = np.zeros(0, dtype=np.int64)
            document = PackedDocument(
                example["encoder_ids"],
                example["token_rows"],
                bounds=np.zeros(num_rows + 1, dtype=np.int64),
                lost=np.zeros(num_rows, dtype=np.int64),
            )
            documents.append(document)
            place = DocumentPiece(number, "", np.zeros(num_rows, dtype=bool), none, none)
            students.append([opening, place])
            teachers.append([opening, example["decoder_ids"]])
            slots = assembler.slots_of_rows(document.row_sizes)
            before = np.full(len(opening), -1)
            num_spans = sum(spans_of_texts)
            for spans, mine in (
                (student_spans, np.repeat(example["row_spans"], slots)),
                (teacher_spans, example["decoder_spans"]),
            ):
                spans.append(np.concatenate([before, np.where(mine >= 0, mine + num_spans, -1)]))
            spans_of_texts.append(int(example["decoder_spans"].max(initial=-1)) + 1)
        num_spans = sum(spans_of_texts)
        if not num_spans:
            raise NoSpansError(f"none of the {len(examples)} texts of a batch has a span")
        student_BS, teacher_BS = _padded(student_spans), _padded(teacher_spans)
        alignment = Alignment(student_BS.ravel(), np.concatenate(teacher_spans), num_spans)
        counts = [np.bincount(s[s >= 0], minlength=num_spans) for s in (student_BS, teacher_BS)]
        return AlignmentBatch(
            student=assembler(students, documents, padding_side="right"),
            teacher=assembler(teachers, [], padding_side="right"),
            student_spans=torch.from_numpy(student_BS),
            teacher_spans=torch.from_numpy(teacher_BS),
            student_last=torch.from_numpy(_last_places(student_BS, num_spans)),
            teacher_last=torch.from_numpy(_last_places(teacher_BS, num_spans)),
            one_token=torch.from_numpy((counts[0] == 1) & (counts[1] == 1)),
            spans_of_texts=tuple(spans_of_texts),
            num_tokens=sum(map(len, teacher_spans)),
            coverage=alignment.coverage,
            granularity=alignment.granularity,
        )


def _padded(spans: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.full((len(spans), max(len(values) for values in spans)), -1, dtype=np.int64)
    for row, values in zip(padded, spans, strict=True):
        row[: len(values)] = values
    return padded


def _last_places(spans_BS: np.ndarray, num_spans: int) -> np.ndarray:
    last = np.zeros(num_spans + 1, dtype=np.int64)
    # Where a span stands twice, NumPy keeps the last place; what has no span goes to a spare entry.
    last[spans_BS.ravel()] = np.arange(spans_BS.size)
    return last[:-1]
