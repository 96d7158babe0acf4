"""Stores made by hand for the tests of search."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refrag_lightning.retrieval.keys import document_key
from refrag_lightning.retrieval.passages import Passage
from refrag_lightning.retrieval.store import PassageStore


def store_of(folder: Path, texts: dict[str, str | tuple[str, str]]) -> PassageStore:
    """A store with one passage a document; a value is a text, or a title and a text."""
    store = PassageStore.create(folder)
    put(store, texts)
    return store


def put(
    store: PassageStore, texts: dict[str, str | tuple[str, str]], replaced: Sequence[str] = ()
) -> None:
    """Adds such documents to a store."""
    passages = []
    for name, value in texts.items():
        title, text = ("", value) if isinstance(value, str) else value
        passages.append(Passage(name, name, title, text, 0, len(text), "by hand"))
    keys = {passage.id: document_key(passage.title, passage.text) for passage in passages}
    store.put_documents(passages, keys, replaced)


class TableEmbedder:
    """Gives each text the vector that a table has for it, at unit length."""

    name = "a table"

    def __init__(self, table: dict[str, Sequence[float]]) -> None:
        self.table = table

    def key(self) -> str:
        return "table"

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        vectors = np.array([self.table[text] for text in texts], dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
