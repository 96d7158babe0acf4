"""What an index holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.retrieval.text_tables import STATES, VECTORS


@dataclass(frozen=True)
class StatesInfo:
    """The row states of one encoder at one rate.

    Attributes:
        key: The key of their settings.
        settings: What they depend on; see `states.state_settings`.
        texts: Texts that have states.
        missing: Texts of passages that have none.
        bytes: On disk.
    """

    key: str
    settings: dict[str, Any]
    texts: int
    missing: int
    bytes: int


@dataclass(frozen=True)
class VectorsInfo:
    """The vectors of one embedder.

    Attributes:
        key: Its key.
        name: Its name.
        size: Numbers a vector.
        texts: Texts, titles with them, that have a vector.
        missing: Those of passages that have none.
        bytes: On disk.
    """

    key: str
    name: str
    size: int
    texts: int
    missing: int
    bytes: int


@dataclass(frozen=True)
class IndexInfo:
    """What an index holds.

    Attributes:
        uri: Where it is.
        version: Its number of commits of passages.
        documents: Documents.
        passages: Passages.
        texts: Distinct texts of passages.
        characters: Of all passages.
        settings: How documents were split by the last build.
        states: The row states, by encoder and rate.
        vectors: The vectors, by embedder.
        bytes: Of everything on disk; of the tables alone where the index is no local folder.
    """

    uri: str
    version: int
    documents: int
    passages: int
    texts: int
    characters: int
    settings: dict[str, Any]
    states: list[StatesInfo]
    vectors: list[VectorsInfo]
    bytes: int


def index_info(store: PassageStore) -> IndexInfo:
    """Counts what a store holds."""
    settings = store.settings()
    texts, searched = store.texts(), store.texts_to_search()
    states = []
    for key in store.state_keys():
        table = store.states_table(key)
        have = set(table.keys())
        missing = sum(name not in have for name in texts)
        states.append(
            StatesInfo(key, settings[STATES + key], len(have), missing, table.num_bytes())
        )
    vectors = []
    for key in store.vector_keys():
        table = store.vectors_table(key)
        have = set(table.keys())
        missing = sum(name not in have for name in searched)
        about = settings[VECTORS + key]
        vectors.append(
            VectorsInfo(key, about["name"], about["size"], len(have), missing, table.num_bytes())
        )
    if store.local_path is None:
        size = store.num_bytes() + sum(table.num_bytes() for table in store.text_tables())
    else:
        size = sum(path.stat().st_size for path in store.local_path.rglob("*") if path.is_file())
    passages = store.passage_table()
    return IndexInfo(
        uri=store.uri,
        version=store.version,
        documents=len(pc.unique(passages["document_id"])),
        passages=passages.num_rows,
        texts=len(texts),
        characters=pc.sum(pc.utf8_length(passages["text"])).as_py() or 0,
        settings=settings.get("passages") or {},
        states=sorted(states, key=lambda each: each.settings["compression"]),
        vectors=vectors,
        bytes=size,
    )
