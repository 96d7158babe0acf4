"""From segments to a batch: what of a `RefragTokenizer` tokenizes, packs rows and assembles."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from refrag_lightning.text.assemble import Assembler, DocumentPiece, Piece, TrainedPiece
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.expansion import Expand, expansion_masks
from refrag_lightning.text.lines import PaddingSide
from refrag_lightning.text.packing import (
    ChunkBy,
    PackedDocument,
    as_text_only,
    pack,
    rows_of_tokens,
)
from refrag_lightning.text.plain import After, Encoded, PlainTokenizer
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.settings import check_choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_LOST_SHARE = 0.01


class BatchBuilding:
    """The methods of `RefragTokenizer` that build batches; its attributes are documented there."""

    compression: int
    chunk_by: ChunkBy
    max_sentence: int
    padding_side: PaddingSide
    opening_ids: np.ndarray
    assembler: Assembler
    encoder: PreTrainedTokenizerBase | None
    plain_decoder: PlainTokenizer
    plain_template: PlainTokenizer
    _plain_encoder: PlainTokenizer | None

    @property
    def plain_encoder(self) -> PlainTokenizer:
        """What reads documents for the encoder.

        Raises:
            ValueError: If there is no encoder.
        """
        if self._plain_encoder is None:
            raise ValueError("this tokenizer has no encoder (encoder=None), so it packs no rows")
        return self._plain_encoder

    def build(
        self,
        segments: Sequence[Sequence[Segment]],
        *,
        expand: Expand = "none",
        row_states: torch.Tensor | None = None,
        row_states_mask: torch.Tensor | None = None,
        padding_side: PaddingSide | None = None,
        line_length: int | None = None,
        text_only: bool = False,
        groups: Sequence[int] | None = None,
    ) -> RefragBatch:
        """Builds a batch from each text's segments; both ways of calling end here.

        Where a segment is to be trained, the batch has `labels`: its tokens' ids at their own
        places.

        Args:
            segments: The segments of each text.
            expand: As in `__call__`, and so are the following arguments.
            row_states: As in `__call__`.
            row_states_mask: As in `__call__`.
            padding_side: As in `__call__`.
            line_length: Packs several texts on a line of at most so many positions, without
                attention between them; `segment_ids` say which text stands where. A text that is
                longer makes all lines of the batch as long as itself.
            text_only: Every document stands as its text, and none is cut into rows: what `expand`
                as `all` gives, without the encoder's tokenizer.
            groups: For each text a number; texts of the same number share the segments that they
                all begin with, up to the first that is trained. The shared documents are expanded
                as the first text's are. `branch_ids` say which position belongs to which text.

        Raises:
            ValueError: As in `__call__`; or there is no encoder and a row is not expanded.
        """
        padding_side = padding_side or self.padding_side
        check_choice("padding_side", padding_side)
        unique = dict.fromkeys(
            segment.text for text in segments for segment in text if segment.document is not None
        )
        index = {text: number for number, text in enumerate(unique)}
        documents = [as_text_only(text) for text in unique] if text_only else self.pack([*unique])
        expanded = expansion_masks(
            [
                [documents[index[s.text]].num_rows for s in text if s.document is not None]
                for text in segments
            ],
            "all" if text_only else expand,
        )
        if self.encoder is None and not all(mask.all() for text in expanded for mask in text):
            raise ValueError(
                "without an encoder documents are read as text only: give expand='all'"
            )
        shared = None if groups is None else shared_beginnings(segments, groups)
        for group, num_shared in shared or ():
            count = sum(s.document is not None for s in segments[group[0]][:num_shared])
            for number in group[1:]:
                expanded[number][:count] = expanded[group[0]][:count]
        texts: list[list[Piece]] = []
        for text, chosen, read in zip(
            segments, expanded, self.decoder_tokens(segments, expanded), strict=True
        ):
            has_template = any(segment.kind == "template" for segment in text)
            pieces: list[Piece] = [] if has_template else [self.opening_ids]
            masks = iter(chosen)
            for segment, (ids, _, ends) in zip(text, read, strict=True):
                if segment.document is None:
                    pieces.append(TrainedPiece(ids) if segment.train else ids)
                    continue
                mask = next(masks)
                bounds = documents[index[segment.text]].bounds
                pieces.append(
                    DocumentPiece(
                        index=index[segment.text],
                        id=segment.document.id,
                        expanded=mask,
                        decoder_ids=ids,
                        decoder_rows=rows_of_tokens(bounds, ends),
                    )
                )
            texts.append(pieces)
        if shared is not None:
            # A text's pieces are its segments, and where no template opens it the opening ids.
            extra = [len(texts[g[0]]) - len(segments[g[0]]) for g, _ in shared]
            shared = [
                (group, num_shared + more)
                for (group, num_shared), more in zip(shared, extra, strict=True)
            ]
        return self.assembler(
            texts,
            documents,
            padding_side=padding_side,
            row_states=row_states,
            row_states_mask=row_states_mask,
            line_length=line_length,
            shared=shared,
        )

    def pack(self, texts: Sequence[str]) -> list[PackedDocument]:
        """Tokenizes documents with the encoder's tokenizer and cuts them into rows.

        Warns where more than 1 % of a document's characters are lost to the unknown token. Without
        an encoder a document is one row without encoder tokens.
        """
        if self.encoder is None:
            return [as_text_only(text) for text in texts]
        encoded = self.plain_encoder(texts)
        by_decoder = self.chunk_by == "decoder"
        decoded = self.plain_decoder(texts) if by_decoder else [None] * len(texts)
        packed = [
            pack(
                text,
                encoder,
                compression=self.compression,
                chunk_by=self.chunk_by,
                decoder=decoder,
                unknown_id=self.plain_encoder.unknown_id,
                max_row_tokens=self.assembler.max_encoder_tokens,
                max_sentence=self.max_sentence,
            )
            for text, encoder, decoder in zip(texts, encoded, decoded, strict=True)
        ]
        for text, document in zip(texts, packed, strict=True):
            lost = int(document.lost.sum())
            if lost > _LOST_SHARE * len(text):
                warnings.warn(
                    f"the encoder's tokenizer cannot read {lost} of the {len(text)} characters "
                    f"of the document that starts with {text[:40]!r}",
                    stacklevel=2,
                )
        return packed

    def decoder_tokens(
        self,
        segments: Sequence[Sequence[Segment]],
        expanded: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> list[list[Encoded]]:
        """The decoder's tokens of each segment, every distinct one read once.

        A segment is tokenized apart, as what stands before it has it: an artificial leading space
        stands at a text's beginning and where the tokenizer puts one behind an added token, and
        never behind a document, whether that stands as rows or as text.

        Args:
            segments: The segments of each text.
            expanded: For each text and document a mask over its rows: one without expanded rows is
                not tokenized, and has no tokens. All are by default.
        """
        none = np.zeros(0, dtype=np.int64)
        found = [[Encoded(none, none, none)] * len(text) for text in segments]
        wanted = [
            (place, number)
            for number, text in enumerate(segments)
            for place in _read_places(text, None if expanded is None else expanded[number])
        ]
        by_place = self.plain_decoder.depends_on_place
        # What stands before a segment is known when the one before it has been read.
        turns = groupby(sorted(wanted), key=itemgetter(0)) if by_place else [(0, wanted)]
        known: dict[tuple[bool, After], dict[str, Encoded]] = {}
        for _, turn in turns:
            places: dict[tuple[bool, After], list[tuple[int, int]]] = {}
            for place, number in turn:
                segment = segments[number][place]
                after: After = "text"
                if by_place:
                    after = segment.after or self._after(segments[number], found[number], place)
                places.setdefault((segment.kind == "template", after), []).append((place, number))
            for (is_template, after), members in places.items():
                tokenizer = self.plain_template if is_template else self.plain_decoder
                read = known.setdefault((is_template, after), {})
                texts = dict.fromkeys(segments[number][place].text for place, number in members)
                new = [text for text in texts if text not in read]
                read.update(zip(new, tokenizer(new, after), strict=True))
                for place, number in members:
                    found[number][place] = read[segments[number][place].text]
        return found

    def _after(self, text: Sequence[Segment], read: Sequence[Encoded], place: int) -> After:
        """What stands before a segment, whose text's tokens are known up to there."""
        while place and not text[place - 1].text:
            place -= 1
        if not place:
            return "nothing"
        if text[place - 1].document is not None:
            return "text"
        # Both tokenizers know the same added tokens.
        return self.plain_decoder.behind(read[place - 1])


def _read_places(text: Sequence[Segment], expanded: Sequence[np.ndarray] | None) -> Iterator[int]:
    """The segments of a text that the decoder's tokenizer reads."""
    masks = iter(expanded or ())
    for place, segment in enumerate(text):
        if segment.document is None or expanded is None or next(masks).any():
            yield place


def shared_beginnings(
    segments: Sequence[Sequence[Segment]], groups: Sequence[int]
) -> list[tuple[list[int], int]] | None:
    """Which texts stand together, and how many segments they share at their beginning.

    Args:
        segments: The segments of each text.
        groups: For each text a number; only texts of the same number may share.

    Returns:
        The texts of each beginning and how many segments it has, each text once; None where no two
        texts share anything.
    """
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    shared: list[tuple[list[int], int]] = []
    for texts in members.values():
        length = 0
        for column in zip(*(segments[number] for number in texts), strict=False):
            if column[0].train or any(segment != column[0] for segment in column[1:]):
                break
            length += 1
        # A target is predicted from the position before it: that has to be the text's own too.
        while length and any(
            len(segments[n]) == length or segments[n][length].train for n in texts
        ):
            length -= 1
        shared += [(texts, length)] if length else [([number], 0) for number in texts]
    return shared if any(len(texts) > 1 for texts, _ in shared) else None
