"""Tokenizers by name, loaded once for all tests of text/."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refrag_lightning.hub import resolve
from refrag_lightning.text.plain import Encoded, PlainTokenizer
from refrag_lightning.text.tokenizer import RefragTokenizer

ENCODERS = ("tiny/encoder", "tiny/encoder-cased")
DECODERS = ("tiny/decoder", "tiny/gemma", "tiny/llama3")


@cache
def hugging_face(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(name, weights=False).path)


@cache
def plain(name: str, *, leading_space: bool = False) -> PlainTokenizer:
    return PlainTokenizer(hugging_face(name), leading_space=leading_space)


@cache
def refrag(
    encoder: str = "tiny/encoder",
    decoder: str = "tiny/decoder",
    *,
    compression: int = 4,
    **settings: Any,
) -> RefragTokenizer:
    return RefragTokenizer(
        hugging_face(encoder), hugging_face(decoder), compression=compression, **settings
    )


def encoded(*offsets: tuple[int, int], ids: list[int] | None = None) -> Encoded:
    """Tokens written by hand; their ids count from 10 unless given."""
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    numbers = np.arange(len(spans)) + 10 if ids is None else np.asarray(ids, dtype=np.int64)
    return Encoded(numbers, spans[:, 0], spans[:, 1])
