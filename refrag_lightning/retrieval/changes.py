"""Bringing the passages of a store in line with documents: only what changed is split and written.

A document is unchanged if its key is, which is of its title, text, source and how it is split. All
passages of a document are written in one commit, so a store never holds a part of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from refrag_lightning.retrieval.keys import document_key
from refrag_lightning.retrieval.passages import Passage, PassageSplitter
from refrag_lightning.retrieval.sources import SourceDocument
from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.text import sentences

# Passages, or documents that go, which are written at once.
_COMMIT = 2000


@dataclass
class Changes:
    """What became of documents.

    Attributes:
        read: Documents that were read.
        kept: Those that stood in the store as they are.
        added: New ones.
        changed: Those that stood there with other content.
        removed: Those of the store that were not read, and went.
    """

    read: int = 0
    kept: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0


def apply_changes(
    store: PassageStore,
    documents: Iterable[SourceDocument],
    splitter: PassageSplitter,
    *,
    keep_others: bool = False,
    on_document: Callable[[], None] = lambda: None,
) -> Changes:
    """Writes new and changed documents into a store, and removes those that are no more.

    Args:
        store: The store.
        documents: All documents that it shall hold.
        splitter: Cuts them into passages.
        keep_others: Leave documents of the store that are not among them.
        on_document: Called after each document.

    Raises:
        ValueError: Passages of two documents would have the same id.
    """
    writer = _Writer(store, may_replace=not keep_others)
    before = set(writer.known)
    changes = Changes()
    seen: set[str] = set()
    for document in documents:
        key = document_key(
            document.title,
            document.text,
            document.source,
            splitter.words,
            splitter.overlap,
            sentences.VERSION,
        )
        changes.read += 1
        seen.add(document.id)
        if writer.known.get(document.id) == key:
            changes.kept += 1
        else:
            known = document.id in writer.known
            changes.changed += known
            changes.added += not known
            writer.put(document.id, key, splitter.split(document), seen)
        on_document()
    writer.flush()
    if not keep_others:
        gone = sorted(before - seen)
        store.remove_documents(gone)
        changes.removed = len(gone)
    return changes


class _Writer:
    """Collects passages for one commit, and sees to it that their ids are different.

    Args:
        store: The store.
        may_replace: Whether a document may take the id of a passage whose own document was not
            seen yet.

    Attributes:
        known: The key of each document that the store holds.
    """

    def __init__(self, store: PassageStore, *, may_replace: bool) -> None:
        self._store = store
        self._may_replace = may_replace
        # What two builders at one address wrote twice is written anew.
        store.remove_documents(store.doubled_documents())
        self.known = store.document_keys()
        self._owners = store.passage_documents()
        self._passages_of: dict[str, list[str]] = defaultdict(list)
        for passage, owner in self._owners.items():
            self._passages_of[owner].append(passage)
        self._passages: list[Passage] = []
        self._keys: dict[str, str] = {}
        self._replaced: list[str] = []

    def put(self, document: str, key: str, passages: list[Passage], seen: set[str]) -> None:
        """Takes the passages of a document, in the place of those it had."""
        self._forget(document)
        for passage in passages:
            owner = self._owners.get(passage.id)
            if owner is None:
                continue
            if owner in seen or not self._may_replace:
                raise ValueError(
                    f"the documents {owner!r} and {document!r} both have a passage with the id "
                    f"{passage.id!r}; give one of them another id"
                )
            # It is gone, or comes later and is then written anew.
            self._forget(owner)
        for passage in passages:
            self._owners[passage.id] = document
        self._passages += passages
        self._keys[document] = key
        if len(self._passages) >= _COMMIT or len(self._replaced) >= _COMMIT:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected."""
        self._store.put_documents(self._passages, self._keys, self._replaced)
        self._passages, self._keys, self._replaced = [], {}, []

    def _forget(self, document: str) -> None:
        if self.known.pop(document, None) is not None:
            self._replaced.append(document)
        for passage in self._passages_of.pop(document, ()):
            del self._owners[passage]
