"""Pipelines on tiny models, and an index of row states in memory, for the tests of inference/."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.model import RefragModel
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.retrieval.keys import state_key
from refrag_lightning.retrieval.states import encode_passages, state_settings
from refrag_lightning.retrieval.stored_rows import StoredRows
from refrag_lightning.text.documents import Document
from refrag_lightning.text.tokenizer import RefragTokenizer

SEINE = "The Seine flows through Paris, and on to the sea at Le Havre."
RHINE = "The Rhine comes from the Alps. It passes Basel, Cologne and Rotterdam on its way."
PO = "The Po is the longest river of Italy."
RIVERS = (
    Document(SEINE, title="Seine", attributes={"source": "rivers.txt"}),
    Document(RHINE, title="Rhine"),
    Document(PO),
)
QUESTION = "Where does the Seine flow?"


@cache
def parts(
    decoder: str = "tiny/decoder", encoder: str = "tiny/encoder", context: str = "row"
) -> tuple[RefragModel, RefragTokenizer]:
    """A model of random weights that runs at the rates 4 and 8, and its tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"compression": 4, "rates": [4, 8], "context": context}
    model = RefragModel.from_encoder_decoder(encoder, decoder, **shape)
    _shake(model.decoder)
    model.set_trainable(["projector", "decoder"])  # so that the decoder is saved
    return model.requires_grad_(False), RefragTokenizer.from_encoder_decoder(
        encoder, decoder, **shape
    )


@cache
def plain_parts(decoder: str = "tiny/decoder") -> tuple[PlainModel, RefragTokenizer]:
    """A causal language model alone, and its tokenizer."""
    tokenizer = RefragTokenizer.from_encoder_decoder(None, decoder, compression=1)
    model = PlainModel.from_pretrained(decoder)
    _shake(model.decoder)
    return model, tokenizer


@torch.no_grad()
def _shake(decoder: Any) -> None:
    """Gives a tiny decoder larger weights: with its own it says the last token again and again."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.normal_(std=0.4, generator=generator)
        elif "post_" in name and "gemma" in decoder.config.model_type:
            parameter.fill_(8.0)  # what a layer adds, beside Gemma's large embeddings


def pipeline(decoder: str = "tiny/decoder", *, context: str = "row", **options: Any) -> Any:
    """A new pipeline on `parts`."""
    return RefragPipeline(*parts(decoder, context=context), **options)


class MemoryStore:
    """Row states by text as an index holds them, in memory.

    Attributes:
        asked: The texts of each question.
    """

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self._rows: dict[tuple[str, str], StoredRows] = {}

    def add(self, model: RefragModel, tokenizer: RefragTokenizer, texts: list[str]) -> None:
        """Encodes texts as an index does."""
        key = state_key(state_settings(model, tokenizer))
        for text, stored in zip(texts, encode_passages(model, tokenizer, texts), strict=True):
            self._rows[key, text] = stored

    def rows(self, key: str, texts: list[str]) -> list[StoredRows | None]:
        """The rows of texts, or None."""
        self.asked.append(list(texts))
        return [self._rows.get((key, text)) for text in texts]


class LayoutStore:
    """An index that has every text, with states that are zeros: where nobody looks at states."""

    def __init__(self, model: RefragModel, tokenizer: RefragTokenizer) -> None:
        self._shape = (model.config.num_slots, model.config.row_size)
        self._tokenizer = tokenizer

    def rows(self, key: str, texts: list[str]) -> list[StoredRows]:
        """How the texts are cut into rows."""
        return [
            StoredRows(
                np.zeros((document.num_rows, *self._shape), dtype=np.float16),
                document.bounds[1:],
                document.row_sizes,
                document.lost,
            )
            for document in self._tokenizer.pack(texts)
        ]


def real_ids(batch: Any, line: int = 0) -> list[int | None]:
    """What the decoder reads on a line: token ids, and None where a vector stands."""
    real = batch["attention_mask"][line].bool()
    pairs = zip(
        batch["input_ids"][line][real].tolist(), batch["slot_ids"][line][real].tolist(), strict=True
    )
    return [token if slot < 0 else None for token, slot in pairs]
