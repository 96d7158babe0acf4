"""Filling a store with the row states that it lacks, in batches of passages of like length."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from refrag_lightning.retrieval.keys import state_key
from refrag_lightning.retrieval.progress import bar
from refrag_lightning.retrieval.states import encode_passages, state_settings
from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.retrieval.stored_rows import StoredRows

if TYPE_CHECKING:
    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.text.tokenizer import RefragTokenizer

# A kill loses what was computed since the last commit, and each commit leaves a file to be joined.
COMMIT_TEXTS = 512
COMMIT_SECONDS = 5.0
COMMIT_BYTES = 64 << 20
# Of English in the vocabulary of BERT; only batches' sizes depend on it.
_CHARACTERS_A_TOKEN = 4
_LOST_SHARE = 0.01


def add_missing_states(
    store: PassageStore,
    model: RefragModel,
    tokenizer: RefragTokenizer,
    *,
    batch_tokens: int,
    progress: bool = False,
) -> tuple[int, int]:
    """Computes the states of the texts that have none, and stores them.

    Whatever ends it, what was computed before the last commit stays; an exception loses nothing.

    Args:
        store: The store.
        model: The model.
        tokenizer: Its tokenizer, at the rate that is wanted.
        batch_tokens: Encoder tokens of a batch, about.
        progress: Whether to show a bar on a terminal.

    Returns:
        How many texts got states, and of how many the encoder could not read more than 1 % of the
        characters.
    """
    settings = state_settings(model, tokenizer)
    key = state_key(settings)
    texts = store.missing_states(key)
    lost = 0
    waiting: list[str] = []
    rows: list[StoredRows] = []

    def commit() -> None:
        if waiting:
            store.add_states(key, settings, waiting, rows)
        waiting.clear()
        rows.clear()

    last = time.monotonic()
    what, total = f"rows of {tokenizer.compression}", sum(map(len, texts))
    with bar(what, total=total, shown=progress) as advance:
        try:
            for batch in batches_by_length(texts, batch_tokens):
                with warnings.catch_warnings():
                    # A line for each would bury the rest; they are counted instead.
                    warnings.filterwarnings("ignore", message="the encoder's tokenizer cannot read")
                    encoded = encode_passages(model, tokenizer, batch)
                lost += sum(
                    int(item.lost.sum()) > _LOST_SHARE * len(text)
                    for text, item in zip(batch, encoded, strict=True)
                )
                waiting += batch
                rows += encoded
                size = sum(item.states.nbytes for item in rows)
                late = time.monotonic() - last >= COMMIT_SECONDS
                if len(waiting) >= COMMIT_TEXTS or size >= COMMIT_BYTES or late:
                    commit()
                    last = time.monotonic()
                advance(len(batch), work=sum(map(len, batch)))
        finally:
            commit()
    return len(texts), lost


def batches_by_length(texts: Sequence[str], batch_tokens: int) -> Iterator[list[str]]:
    """Cuts texts into batches of like length, the longest texts first.

    So little is padded, and a batch that does not fit in memory shows at once.

    Args:
        texts: The texts.
        batch_tokens: Most encoder tokens of a batch, by four characters a token; a longer text is
            a batch by itself.
    """
    limit = batch_tokens * _CHARACTERS_A_TOKEN
    batch: list[str] = []
    used = 0
    # Of equal length by the text itself, so that the batches are the same every time.
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        if batch and used + len(text) > limit:
            yield batch
            batch, used = [], 0
        batch.append(text)
        used += len(text)
    if batch:
        yield batch
