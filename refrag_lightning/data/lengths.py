"""How many positions the decoder reads of each context, measured once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from refrag_lightning.cache import build_folder, cache_dir
from refrag_lightning.data.examples import Example, context_lengths
from refrag_lightning.text import sentences
from refrag_lightning.text.tokenizer import RefragTokenizer

# Part of the cache's key: raise it when the same key and tokenizer give other lengths.
_VERSION = 3
_FILE = "lengths.npy"
_AT_ONCE = 64


def cached_lengths(
    contexts: Iterator[Sequence[Example]], tokenizer: RefragTokenizer, key: dict[str, Any]
) -> np.ndarray:
    """Positions of each context with the examples behind it (N,), rows counted as rows.

    Args:
        contexts: The examples of each; read only where the cache does not know them.
        tokenizer: The tokenizer, at the rate to count at.
        key: Plain data that changes whenever the examples may have.
    """
    fingerprints = [tokenizer.plain_decoder.fingerprint]
    if tokenizer.encoder is not None:
        fingerprints.append(tokenizer.plain_encoder.fingerprint)
    parts = {
        "version": _VERSION,
        "examples": key,
        "tokenizers": fingerprints,
        "settings": tokenizer.settings,
        "template": str(tokenizer.decoder.chat_template),
    }
    if tokenizer.chunk_by == "sentence":
        parts["sentences"] = sentences.VERSION
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_dir() / "data" / f"lengths-{name}"
    build_folder(folder, lambda part: _measure(contexts, tokenizer, part / _FILE))
    return np.load(folder / _FILE)


def first_too_long(
    contexts: Iterable[Sequence[Example]], tokenizer: RefragTokenizer, window: int
) -> tuple[str, int] | None:
    """The first context with an example of more positions than a decoder has.

    Args:
        contexts: The examples of each context.
        tokenizer: The tokenizer, at the rate that takes the most positions.
        window: Positions of the decoder.

    Returns:
        The example's id and its positions, or None.
    """
    for examples in contexts:
        for example in examples:
            (length,) = context_lengths([[example]], tokenizer).tolist()
            if length > window:
                return example.id, length
    return None


def _measure(contexts: Iterator[Sequence[Example]], tokenizer: RefragTokenizer, path: Path) -> None:
    lengths = [np.zeros(0, dtype=np.int64)]
    while chunk := list(islice(contexts, _AT_ONCE)):
        lengths.append(context_lengths(chunk, tokenizer))
    np.save(path, np.concatenate(lengths))
