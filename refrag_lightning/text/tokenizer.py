"""RefragTokenizer: prompts with `<doc>` blocks to a `RefragBatch`, for one encoder and decoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from refrag_lightning.hub import resolve
from refrag_lightning.text.assemble import (
    Assembler,
    Context,
    DocumentPiece,
    PaddingSide,
    Piece,
)
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.documents import Part, parse
from refrag_lightning.text.expansion import Expand, expansion_masks
from refrag_lightning.text.limits import num_positions, special_tokens
from refrag_lightning.text.packing import ChunkBy, PackedDocument, pack, rows_of_tokens
from refrag_lightning.text.plain import PlainTokenizer
from refrag_lightning.text.segments import Message, Segment, render, render_chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[Message]

SETTINGS_FILE = "refrag_tokenizer.json"
_LOST_SHARE = 0.01


class RefragTokenizer:
    """Turns prompts into batches: text to decoder tokens, documents to rows of encoder tokens.

    Args:
        encoder: The encoder's tokenizer.
        decoder: The decoder's tokenizer.
        compression: Tokens a row.
        chunk_by: Whose tokens are counted: the encoder's, or the decoder's as in the paper.
        context: What the encoder reads at once: a row alone (the paper), or a window of its
            document, cut at row edges.
        num_slots: Vectors a row; a row's tokens are shared out among them in order.
        header: Stands before each document, with `{id}` and `{title}` filled in.
        footer: Stands after each document.
        max_encoder_length: Most tokens of an encoder sequence, special tokens counted; the
            encoder tokenizer's own limit by default.
        padding_side: Where shorter texts are padded: `left` for generation, `right` also works.

    Raises:
        ValueError: If a setting is not one of its values, or a row does not fit the encoder.
    """

    def __init__(
        self,
        encoder: PreTrainedTokenizerBase,
        decoder: PreTrainedTokenizerBase,
        *,
        compression: int,
        chunk_by: ChunkBy = "encoder",
        context: Context = "row",
        num_slots: int = 1,
        header: str = "[{id}] {title}\n",
        footer: str = "\n",
        max_encoder_length: int | None = None,
        padding_side: PaddingSide = "left",
    ) -> None:
        _check_choice("chunk_by", chunk_by, ChunkBy)
        _check_choice("context", context, Context)
        _check_choice("padding_side", padding_side, PaddingSide)
        if not 1 <= num_slots <= compression:
            raise ValueError(f"num_slots ({num_slots}) must be 1 to compression ({compression})")
        if num_slots > 1 and chunk_by == "decoder":
            raise ValueError(f"num_slots ({num_slots}) must be 1 with chunk_by='decoder'")
        self.encoder = encoder
        self.decoder = decoder
        self.compression = compression
        self.chunk_by = chunk_by
        self.context = context
        self.num_slots = num_slots
        self.header = header
        self.footer = footer
        self.padding_side = padding_side
        self.max_encoder_length = max_encoder_length or encoder.model_max_length
        self.plain_encoder = PlainTokenizer(encoder, leading_space=True)
        self.plain_decoder = PlainTokenizer(decoder)
        self.plain_template = PlainTokenizer(decoder, control=True)
        prefix, suffix = special_tokens(encoder)
        max_tokens = self.max_encoder_length - len(prefix) - len(suffix)
        if compression > max_tokens:
            raise ValueError(
                f"a row of compression ({compression}) tokens does not fit the encoder, which "
                f"reads {max_tokens} tokens beside its special ones"
            )
        opening, _ = special_tokens(decoder)
        self.opening_ids = np.asarray(opening, dtype=np.int64)
        pad_id = decoder.pad_token_id if decoder.pad_token_id is not None else decoder.eos_token_id
        self.assembler = Assembler(
            compression=compression,
            num_slots=num_slots,
            context=context,
            max_encoder_tokens=max_tokens,
            encoder_prefix=prefix,
            encoder_suffix=suffix,
            encoder_pad_id=encoder.pad_token_id or 0,
            decoder_pad_id=pad_id or 0,
        )

    @classmethod
    def from_encoder_decoder(
        cls, encoder: str, decoder: str, *, compression: int, **settings: Any
    ) -> RefragTokenizer:
        """Loads both tokenizers by Hugging Face name or folder.

        Args:
            encoder: The encoder's name or folder.
            decoder: The decoder's name or folder.
            compression: Tokens a row.
            **settings: The constructor's other settings.

        Raises:
            ModelNotFoundError: If a name is neither a folder, nor an offline copy, nor on the Hub.
        """
        from transformers import AutoConfig, AutoTokenizer

        encoder_path = resolve(encoder, weights=False).path
        encoder_tokenizer = AutoTokenizer.from_pretrained(encoder_path)
        decoder_tokenizer = AutoTokenizer.from_pretrained(resolve(decoder, weights=False).path)
        if settings.get("max_encoder_length") is None:
            positions = num_positions(AutoConfig.from_pretrained(encoder_path))
            settings["max_encoder_length"] = min(positions, encoder_tokenizer.model_max_length)
        return cls(encoder_tokenizer, decoder_tokenizer, compression=compression, **settings)

    def __call__(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[Part]],
        *,
        expand: Expand = "none",
        row_states: torch.Tensor | None = None,
        row_states_mask: torch.Tensor | None = None,
        padding_side: PaddingSide | None = None,
        strict: bool = True,
    ) -> RefragBatch:
        """Tokenizes prompts.

        Args:
            texts: One prompt or several; each a text, in which `<doc>` blocks are parsed, or a
                list of strings and documents.
            expand: Which rows stand as their own decoder tokens: `none`, `all`, or for each text
                the indices of its rows (for a single text, its indices).
            row_states: (C, m, E) states of the batch's rows, as `RefragModel.encode` gives them
                for the same texts; those rows are not encoded again.
            row_states_mask: (C,) True where `row_states` holds a row's states; all by default.
            padding_side: Overrides the tokenizer's own.
            strict: Whether a broken `<doc>` tag is an error; otherwise it is text.

        Raises:
            DocumentSyntaxError: If a tag is broken and `strict`.
            ValueError: If `expand` names a row that a text does not have, or the states do not
                fit the rows.
        """
        if isinstance(texts, str):
            texts = [texts]
        segments = [
            render(
                parse(text, strict=strict) if isinstance(text, str) else text,
                header=self.header,
                footer=self.footer,
            )
            for text in texts
        ]
        return self.build(
            segments,
            expand=expand,
            row_states=row_states,
            row_states_mask=row_states_mask,
            padding_side=padding_side,
        )

    def apply_chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        add_generation_prompt: bool = True,
        expand: Expand = "none",
        row_states: torch.Tensor | None = None,
        row_states_mask: torch.Tensor | None = None,
        padding_side: PaddingSide | None = None,
        strict: bool = True,
        **template_options: Any,
    ) -> RefragBatch:
        """Tokenizes conversations with the decoder's chat template.

        Args:
            conversations: One list of messages (`role`, `content`) or several.
            add_generation_prompt: Whether the template opens an answer at the end.
            expand: As in `__call__`, and so are the other arguments.
            row_states: As in `__call__`.
            row_states_mask: As in `__call__`.
            padding_side: As in `__call__`.
            strict: As in `__call__`.
            **template_options: Passed to the template.

        Raises:
            ValueError: If there is no template, it refuses the conversation, or drops a message.
        """
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]  # type: ignore[list-item,assignment]
        segments = [
            render_chat(
                self.decoder,
                conversation,  # type: ignore[arg-type]
                header=self.header,
                footer=self.footer,
                add_generation_prompt=add_generation_prompt,
                strict=strict,
                **template_options,
            )
            for conversation in conversations
        ]
        return self.build(
            segments,
            expand=expand,
            row_states=row_states,
            row_states_mask=row_states_mask,
            padding_side=padding_side,
        )

    def build(
        self,
        segments: Sequence[Sequence[Segment]],
        *,
        expand: Expand = "none",
        row_states: torch.Tensor | None = None,
        row_states_mask: torch.Tensor | None = None,
        padding_side: PaddingSide | None = None,
    ) -> RefragBatch:
        """Builds a batch from each text's segments; both ways of calling end here."""
        padding_side = padding_side or self.padding_side
        _check_choice("padding_side", padding_side, PaddingSide)
        unique = dict.fromkeys(
            segment.text for text in segments for segment in text if segment.document is not None
        )
        index = {text: number for number, text in enumerate(unique)}
        documents = self.pack(list(unique))
        expanded = expansion_masks(
            [
                [documents[index[s.text]].num_rows for s in text if s.document is not None]
                for text in segments
            ],
            expand,
        )
        plain = self._tokenize(segments, expanded)
        none = np.zeros(0, dtype=np.int64)
        texts: list[list[Piece]] = []
        for text, chosen in zip(segments, expanded, strict=True):
            has_template = any(segment.kind == "template" for segment in text)
            pieces: list[Piece] = [] if has_template else [self.opening_ids]
            masks = iter(chosen)
            for segment in text:
                if segment.document is None:
                    pieces.append(plain[segment.kind == "template", segment.text][0])
                    continue
                mask = next(masks)
                ids, ends = plain[False, segment.text] if mask.any() else (none, none)
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
        return self.assembler(
            texts,
            documents,
            padding_side=padding_side,
            row_states=row_states,
            row_states_mask=row_states_mask,
        )

    def pack(self, texts: Sequence[str]) -> list[PackedDocument]:
        """Tokenizes documents with the encoder's tokenizer and cuts them into rows.

        Warns where more than 1 % of a document's characters are lost to the unknown token.
        """
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

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Turns decoder token ids (N,) back into text."""
        return str(self.decoder.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """Turns decoder token ids (B, N) back into texts."""
        return list(self.decoder.batch_decode(ids, skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes both tokenizers and the settings into a folder."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder / "encoder_tokenizer")
        self.decoder.save_pretrained(folder / "decoder_tokenizer")
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> RefragTokenizer:
        """Loads what `save_pretrained` wrote.

        Args:
            folder: The folder.
            **overrides: Settings that take the place of the saved ones.

        Raises:
            FileNotFoundError: If the folder holds no tokenizer of this kind.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not (folder / SETTINGS_FILE).is_file():
            found = f"it has no {SETTINGS_FILE}" if folder.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"{str(folder)!r} is no model folder: {found}")
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        return cls(
            AutoTokenizer.from_pretrained(folder / "encoder_tokenizer"),
            AutoTokenizer.from_pretrained(folder / "decoder_tokenizer"),
            **{**settings, **overrides},
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's settings, as they are saved."""
        return {
            "compression": self.compression,
            "chunk_by": self.chunk_by,
            "context": self.context,
            "num_slots": self.num_slots,
            "header": self.header,
            "footer": self.footer,
            "max_encoder_length": self.max_encoder_length,
            "padding_side": self.padding_side,
        }

    def _tokenize(
        self, segments: Sequence[Sequence[Segment]], expanded: Sequence[Sequence[np.ndarray]]
    ) -> dict[tuple[bool, str], tuple[np.ndarray, np.ndarray]]:
        """Tokenizes every distinct text once, of the documents only those with expanded rows.

        Returns:
            (whether it is a template, text) -> ids (N,) and past-last characters (N,).
        """
        wanted: dict[bool, dict[str, None]] = {False: {}, True: {}}
        for text, chosen in zip(segments, expanded, strict=True):
            masks = iter(chosen)
            for segment in text:
                if segment.document is None or next(masks).any():
                    wanted[segment.kind == "template"][segment.text] = None
        return {
            (is_template, text): (encoded.ids, encoded.ends)
            for is_template, tokenizer in ((False, self.plain_decoder), (True, self.plain_template))
            for text, encoded in zip(
                wanted[is_template], tokenizer(list(wanted[is_template])), strict=True
            )
        }


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} ({value!r}) must be one of {get_args(choices)}")
