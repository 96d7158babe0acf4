"""RefragTokenizer: prompts with `<doc>` blocks to a `RefragBatch`, for one encoder and decoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refrag_lightning.hub import EncoderLayers
from refrag_lightning.text import saving
from refrag_lightning.text.assemble import Assembler, Context
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.build import BatchBuilding
from refrag_lightning.text.documents import Part, parse
from refrag_lightning.text.expansion import Expand
from refrag_lightning.text.limits import special_tokens
from refrag_lightning.text.lines import PaddingSide
from refrag_lightning.text.packing import ChunkBy
from refrag_lightning.text.plain import PlainTokenizer
from refrag_lightning.text.segments import Message, render, render_chat
from refrag_lightning.text.settings import check_settings, sorted_rates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[Message]

_NO_LIMIT = 1 << 62


class RefragTokenizer(BatchBuilding):
    """Turns prompts into batches: text to decoder tokens, documents to rows of encoder tokens.

    Args:
        encoder: The encoder's tokenizer; the decoder's, the same object, where the encoder is made
            of its layers. None where documents are only ever read as text: each is one row then,
            and every row must be expanded.
        decoder: The decoder's tokenizer.
        compression: Tokens a row.
        rates: Every compression that `at` may be asked for, this one among them; it alone by
            default.
        chunk_by: What a row is: so many of the encoder's tokens, of the decoder's as in the paper,
            or one sentence.
        max_sentence: With `chunk_by="sentence"`, the multiple of `compression` from which on a
            sentence is split.
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
        encoder: PreTrainedTokenizerBase | None,
        decoder: PreTrainedTokenizerBase,
        *,
        compression: int,
        rates: Sequence[int] | None = None,
        chunk_by: ChunkBy = "encoder",
        max_sentence: int = 2,
        context: Context = "row",
        num_slots: int = 1,
        header: str = "[{id}] {title}\n",
        footer: str = "\n",
        max_encoder_length: int | None = None,
        padding_side: PaddingSide = "left",
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.compression = compression
        self.rates = sorted_rates(rates, compression)
        self.chunk_by = chunk_by
        self.max_sentence = max_sentence
        self.context = context
        self.num_slots = num_slots
        self.header = header
        self.footer = footer
        self.padding_side = padding_side
        self.max_encoder_length = max_encoder_length
        check_settings(self.settings)
        self.plain_decoder = PlainTokenizer(decoder)
        self.plain_template = PlainTokenizer(decoder, control=True)
        self._plain_encoder = None
        prefix, suffix, max_tokens = (), (), _NO_LIMIT  # type: tuple[int, ...], tuple[int, ...], int
        if encoder is not None:
            self.max_encoder_length = max_encoder_length or encoder.model_max_length
            # A row of the decoder's own tokens has the ids that the decoder would read.
            shared = encoder is decoder
            self._plain_encoder = (
                self.plain_decoder if shared else PlainTokenizer(encoder, leading_space=True)
            )
            prefix, suffix = special_tokens(encoder)
            max_tokens = self.max_encoder_length - len(prefix) - len(suffix)
        if self.rates[-1] > max_tokens:
            raise ValueError(
                f"a row of compression ({self.rates[-1]}) tokens does not fit the encoder, which "
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
            encoder_pad_id=(encoder.pad_token_id if encoder is not None else None) or 0,
            decoder_pad_id=pad_id or 0,
        )
        self._at = {compression: self}

    @classmethod
    def from_encoder_decoder(
        cls,
        encoder: str | EncoderLayers | Mapping[str, Any] | None,
        decoder: str,
        *,
        compression: int,
        chat_template: str | None = None,
        **settings: Any,
    ) -> RefragTokenizer:
        """Loads both tokenizers by Hugging Face name or folder.

        Args:
            encoder: The encoder's name or folder, or the layers of a causal language model (see
                `EncoderLayers`), or None; see the class.
            decoder: The decoder's name or folder.
            compression: Tokens a row.
            chat_template: In place of the decoder's own; Jinja.
            **settings: The constructor's other settings.

        Raises:
            ModelNotFoundError: If a name is neither a folder, nor an offline copy, nor on the Hub.
        """
        encoder_tokenizer, decoder_tokenizer, max_length = saving.by_name(encoder, decoder)
        if settings.get("max_encoder_length") is None:
            settings["max_encoder_length"] = max_length
        if chat_template is not None:
            decoder_tokenizer.chat_template = chat_template
        return cls(encoder_tokenizer, decoder_tokenizer, compression=compression, **settings)

    def at(self, compression: int) -> RefragTokenizer:
        """The same tokenizer at another of its rates; the tokenizers beneath are shared.

        Raises:
            ValueError: If `compression` is none of `rates`.
        """
        if compression not in self.rates:
            raise ValueError(f"compression ({compression}) must be one of rates ({self.rates})")
        if compression not in self._at:
            other = copy.copy(self)
            other.compression = compression
            other.assembler = replace(self.assembler, compression=compression)
            self._at[compression] = other
        return self._at[compression]

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
            expand: Which rows stand as their own decoder tokens: `none`, `all`, a share drawn at
                random (a number from 0 to 1), or for each text one of these or the indices of its
                rows (for a single text, its indices).
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

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Turns decoder token ids (N,) back into text."""
        return str(self.decoder.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """Turns decoder token ids (B, N) back into texts."""
        return list(self.decoder.batch_decode(ids, skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes both tokenizers and the settings into a folder."""
        saving.write(Path(folder), self.encoder, self.decoder, self.settings)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, chat_template: str | None = None, **overrides: Any
    ) -> RefragTokenizer:
        """Loads what `save_pretrained` wrote.

        Args:
            folder: The folder.
            chat_template: In place of the saved one; Jinja.
            **overrides: Settings that take the place of the saved ones. A `compression` that is
                none of the saved rates stands alone, unless `rates` are given too.

        Raises:
            FileNotFoundError: If the folder holds no tokenizer of this kind.
        """
        encoder, decoder, settings = saving.read(Path(folder))
        if overrides.get("compression") not in (None, *(settings.get("rates") or ())):
            settings["rates"] = None
        if chat_template is not None:
            decoder.chat_template = chat_template
        return cls(encoder, decoder, **{**settings, **overrides})

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's settings, as they are saved."""
        return {
            "compression": self.compression,
            "rates": self.rates,
            "chunk_by": self.chunk_by,
            "max_sentence": self.max_sentence,
            "context": self.context,
            "num_slots": self.num_slots,
            "header": self.header,
            "footer": self.footer,
            "max_encoder_length": self.max_encoder_length,
            "padding_side": self.padding_side,
        }
