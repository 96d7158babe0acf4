"""Building an index: documents to passages, passages to row states and vectors, only what changed.

Every step finds out from the store what is missing, and writes in commits that are whole or not
there. So a build can be killed at any moment: the index opens with what was committed, and the next
build does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from refrag_lightning.retrieval.bm25 import store_bm25
from refrag_lightning.retrieval.changes import Changes, apply_changes
from refrag_lightning.retrieval.loading import IndexModels, load_models
from refrag_lightning.retrieval.passages import PassageSplitter
from refrag_lightning.retrieval.place import builder_lock, make_folder
from refrag_lightning.retrieval.progress import bar
from refrag_lightning.retrieval.sources import read_documents
from refrag_lightning.retrieval.store import PassageStore

_VECTORS_A_COMMIT = 512


@dataclass
class BuildReport(Changes):
    """What a build did; see also `Changes`.

    Attributes:
        passages: Passages that the index holds now.
        encoded: Row states computed, in texts; at several rates each counts.
        encoding_seconds: How long that took.
        embedded: Vectors computed.
        embedding_seconds: How long that took.
        lost: Texts of which the encoder could not read more than 1 % of the characters.
        swept: States and vectors removed since no passage needs them any more.
        seconds: The whole build, without loading the model.
    """

    passages: int = 0
    encoded: int = 0
    encoding_seconds: float = 0.0
    embedded: int = 0
    embedding_seconds: float = 0.0
    lost: int = 0
    swept: int = 0
    seconds: float = 0.0

    @property
    def passages_per_second(self) -> float:
        """Row states computed a second, in texts; 0 where there were none."""
        return self.encoded / self.encoding_seconds if self.encoded else 0.0


def build_index(
    index: str | Path,
    paths: Sequence[str],
    model: str | None = None,
    *,
    rates: Sequence[int] | None = None,
    words: int = 100,
    overlap: int = 0,
    embedder: str | None = None,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
    follow_links: bool = False,
    max_mb: float = 64,
    batch_tokens: int = 16_384,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
    keep_others: bool = False,
    prune: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Makes an index of documents, or brings one up to date.

    Args:
        index: Its folder or address.
        paths: The documents; see `sources.read_documents`.
        model: The model folder or run folder whose encoder gives row states. Without one the index
            can be searched, and rows are encoded when they are needed.
        rates: The compressions that row states are stored for; the model's own if None.
        words: See `PassageSplitter`.
        overlap: See `PassageSplitter`.
        embedder: What gives vectors for dense search: the name of an embedding model, `none`, or
            None for the model's encoder, if there is a model.
        text_field: See `sources.read_documents`.
        title_field: See `sources.read_documents`.
        id_field: See `sources.read_documents`.
        follow_links: See `sources.read_documents`.
        max_mb: See `sources.read_documents`.
        batch_tokens: Encoder tokens of a batch, about.
        device: Where to compute.
        allow_base_mismatch: Warn about an encoder other than the model's instead of refusing it.
        keep_others: Leave the documents of the index that are not among these; they go otherwise.
        prune: Remove states at other rates and of other encoders, and vectors of other embedders,
            which stay otherwise.
        progress: Whether to show progress bars on a terminal.

    Raises:
        ValueError: A setting or a document is not right.
        OSError: Something is not found, or another build of this index is running.
    """
    splitter = PassageSplitter(words, overlap)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens ({batch_tokens}) must be at least 1")
    # The first document is read before anything is loaded or made, for wrong paths to show soon.
    documents = read_documents(
        paths,
        text_field=text_field,
        title_field=title_field,
        id_field=id_field,
        follow_links=follow_links,
        max_mb=max_mb,
    )
    documents = chain([next(documents)], documents)
    models = load_models(
        model,
        rates=rates,
        embedder=embedder,
        device=device,
        allow_base_mismatch=allow_base_mismatch,
    )
    make_folder(index)
    with builder_lock(index):
        begun = time.monotonic()
        store = PassageStore.create(index)
        with bar("reading", total=None, shown=progress, unit="documents") as advance:
            changes = apply_changes(
                store, documents, splitter, keep_others=keep_others, on_document=advance
            )
        # Before the rest, so that what stood there twice is computed anew.
        swept = store.sweep()
        states = _add_states(store, models, batch_tokens=batch_tokens, progress=progress)
        vectors = _add_vectors(store, models, progress=progress)
        if prune:
            _prune(store, models)
        store.describe("passages", {"words": words, "overlap": overlap})
        store.compact()
        if store.local_path is not None and len(store):
            store_bm25(store)
        return BuildReport(
            **asdict(changes),
            **states,
            **vectors,
            swept=swept,
            passages=len(store),
            seconds=time.monotonic() - begun,
        )


def _add_states(
    store: PassageStore, models: IndexModels, *, batch_tokens: int, progress: bool
) -> dict[str, Any]:
    if models.model is None:
        return {}
    from refrag_lightning.retrieval.encoding import add_missing_states

    begun, encoded, lost = time.monotonic(), 0, 0
    for tokenizer in models.tokenizers:
        done = add_missing_states(
            store, models.model, tokenizer, batch_tokens=batch_tokens, progress=progress
        )
        encoded, lost = encoded + done[0], lost + done[1]
    return {"encoded": encoded, "lost": lost, "encoding_seconds": time.monotonic() - begun}


def _add_vectors(store: PassageStore, models: IndexModels, *, progress: bool) -> dict[str, Any]:
    if models.embedder is None:
        return {}
    from refrag_lightning.retrieval.dense import embed_missing

    begun = time.monotonic()
    missing = len(store.missing_vectors(models.embedder.key()))
    with bar("vectors", total=missing, shown=progress) as advance:
        embedded = embed_missing(
            store, models.embedder, batch_size=_VECTORS_A_COMMIT, on_batch=advance
        )
    return {"embedded": embedded, "embedding_seconds": time.monotonic() - begun}


def _prune(store: PassageStore, models: IndexModels) -> None:
    """Removes states and vectors that these models do not give; without a model all states."""
    kept = set()
    if models.model is not None:
        from refrag_lightning.retrieval.states import state_key, state_settings

        kept = {state_key(state_settings(models.model, each)) for each in models.tokenizers}
    for key in set(store.state_keys()) - kept:
        store.drop_states(key)
    for key in set(store.vector_keys()) - ({models.embedder.key()} if models.embedder else set()):
        store.drop_vectors(key)
