"""Comparing an index with what a model gives now.

A stored state is taken for equal to a fresh one if each of its numbers differs by at most 2^-9 of
itself (two steps of float16) and 2^-11 of the row's largest number. It need not be the same to the
bit: the order in which an encoder adds up depends on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from refrag_lightning.retrieval.bm25 import Bm25, searched_texts, store_bm25
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.loading import load_models
from refrag_lightning.retrieval.progress import bar
from refrag_lightning.retrieval.store import PassageStore, doubled, unused
from refrag_lightning.retrieval.stored_rows import StoredRows

if TYPE_CHECKING:
    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.retrieval.dense import Embedder
    from refrag_lightning.text.tokenizer import RefragTokenizer

RELATIVE, OF_LARGEST = 2.0**-9, 2.0**-11
# Of numbers of vectors of length 1, which are stored in float32.
VECTOR_TOLERANCE = 1e-4


@dataclass
class Comparison:
    """Stored things of one kind against fresh ones.

    Attributes:
        what: The kind.
        compared: Texts that were compared.
        missing: Texts of passages without them.
        orphans: Stored ones that no passage needs.
        doubles: Texts that have them more than once.
        different: Texts whose stored ones are not the fresh ones.
        largest: The largest difference of two numbers.
        equal: Share of numbers that are the same to the bit.
    """

    what: str
    compared: int = 0
    missing: int = 0
    orphans: int = 0
    doubles: int = 0
    different: int = 0
    largest: float = 0.0
    equal: float = 1.0

    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        counts = {
            "texts have none": self.missing,
            "belong to no passage": self.orphans,
            "texts have them twice": self.doubles,
            "texts have others than the model gives": self.different,
        }
        return [f"{self.what}: {count} {text}" for text, count in counts.items() if count]


@dataclass
class VerifyReport:
    """What a comparison found.

    Attributes:
        passages: Passages in the index.
        wrong_passages: Ids of passages whose key is not that of their text.
        doubled_passages: Ids that stand there more than once.
        comparisons: Of row states at each rate, and of vectors.
        words: Whether what is kept for the search by words is what the passages give.
    """

    passages: int = 0
    wrong_passages: list[str] = field(default_factory=list)
    doubled_passages: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    words: bool = True

    def problems(self) -> list[str]:
        """What is wrong, a line each; empty for an index that is right."""
        found = []
        if self.wrong_passages:
            found.append(f"{len(self.wrong_passages)} passages have another text's key")
        if self.doubled_passages:
            found.append(f"{len(self.doubled_passages)} passages stand there twice")
        if not self.words:
            found.append("the search by words does not fit the passages")
        return found + [line for each in self.comparisons for line in each.problems()]


def verify_index(
    index: str | Path,
    model: str | None = None,
    *,
    rates: Sequence[int] | None = None,
    embedder: str | None = None,
    batch_tokens: int = 16_384,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
    progress: bool = True,
) -> VerifyReport:
    """Compares everything in an index with what it should be.

    Args:
        index: Its folder or address.
        model: The model whose states are compared with fresh ones; without one only passages and
            the search by words are looked at, and vectors with an embedder.
        rates: The compressions; the model's own if None.
        embedder: As in `build_index`: its vectors are compared too.
        batch_tokens: Encoder tokens of a batch, about.
        device: Where to compute.
        allow_base_mismatch: Warn about an encoder other than the model's instead of refusing it.
        progress: Whether to show progress bars on a terminal.

    Raises:
        OSError: There is no index, or no model.
        ValueError: The model gives no states.
    """
    store = PassageStore.open(index)
    models = load_models(
        model,
        rates=rates,
        embedder=embedder,
        device=device,
        allow_base_mismatch=allow_base_mismatch,
    )
    table = store.passage_table()
    ids, texts = table["id"].to_pylist(), table["text"].to_pylist()
    keys = table["text_key"].to_pylist()
    report = VerifyReport(
        passages=len(ids),
        wrong_passages=[
            name for name, text, key in zip(ids, texts, keys, strict=True) if text_key(text) != key
        ],
        doubled_passages=doubled(ids),
        words=_same_words(table, store),
    )
    for tokenizer in models.tokenizers:
        assert models.model is not None
        report.comparisons.append(
            _compare_states(store, models.model, tokenizer, batch_tokens, progress)
        )
    if models.embedder is not None:
        report.comparisons.append(_compare_vectors(store, models.embedder, progress))
    return report


def _compare_states(
    store: PassageStore,
    model: RefragModel,
    tokenizer: RefragTokenizer,
    batch_tokens: int,
    progress: bool,
) -> Comparison:
    from refrag_lightning.retrieval.encoding import batches_by_length
    from refrag_lightning.retrieval.states import encode_passages, state_key, state_settings

    key = state_key(state_settings(model, tokenizer))
    found = Comparison(f"row states at {tokenizer.compression}")
    texts = store.texts()
    _count(found, store.states_table(key).keys(), texts)
    equal = total = 0
    work = sum(map(len, texts.values()))
    with bar(found.what, total=work, shown=progress) as advance:
        for batch in batches_by_length(list(texts.values()), batch_tokens):
            fresh = encode_passages(model, tokenizer, batch)
            for old, new in zip(store.rows(key, batch), fresh, strict=True):
                if old is None:
                    continue
                found.compared += 1
                if not _same_layout(old, new):
                    found.different += 1
                    continue
                a, b = old.states.astype(np.float32), new.states.astype(np.float32)
                difference = np.abs(a - b)
                found.largest = max(found.largest, float(difference.max(initial=0)))
                found.different += not _within(difference, b)
                equal += int((a == b).sum())
                total += a.size
            advance(len(batch), work=sum(map(len, batch)))
    found.equal = equal / total if total else 1.0
    return found


def _same_layout(old: StoredRows, new: StoredRows) -> bool:
    return old.states.shape == new.states.shape and all(
        np.array_equal(getattr(old, name), getattr(new, name)) for name in ("ends", "sizes", "lost")
    )


def _within(difference: np.ndarray, fresh: np.ndarray) -> bool:
    """Whether states (C, m, E_row) differ by no more than the module says; no number is NaN."""
    largest = np.abs(fresh).max(axis=(1, 2), keepdims=True, initial=0)
    return bool((difference <= RELATIVE * np.abs(fresh) + OF_LARGEST * largest).all())


def _compare_vectors(store: PassageStore, embedder: Embedder, progress: bool) -> Comparison:
    found = Comparison(f"vectors of {embedder.name}")
    texts = store.texts_to_search()
    keys, vectors_NE = store.vectors(embedder.key())
    _count(found, keys, texts)
    known = [
        (texts[key], vector) for key, vector in zip(keys, vectors_NE, strict=True) if key in texts
    ]
    known.sort(key=lambda item: len(item[0]))
    equal = total = 0
    with bar(found.what, total=len(known), shown=progress) as advance:
        for start in range(0, len(known), 512):
            batch = known[start : start + 512]
            fresh_NE = embedder([text for text, _ in batch])
            difference_NE = np.abs(np.stack([vector for _, vector in batch]) - fresh_NE)
            found.compared += len(batch)
            found.largest = max(found.largest, float(difference_NE.max(initial=0)))
            found.different += int((~(difference_NE <= VECTOR_TOLERANCE).all(axis=1)).sum())
            equal += int((difference_NE == 0).sum())
            total += difference_NE.size
            advance(len(batch))
    found.equal = equal / total if total else 1.0
    return found


def _count(found: Comparison, keys: Sequence[str], texts: dict[str, str]) -> None:
    have = set(keys)
    found.missing = sum(key not in have for key in texts)
    found.orphans = len(unused(keys, texts))
    found.doubles = len(doubled(keys))


def _same_words(table: pa.Table, store: PassageStore) -> bool:
    """Whether what is kept of the search by words scores the first passages as a fresh one does."""
    kept, fresh = store_bm25(store, table=table), Bm25(searched_texts(table))
    queries = searched_texts(table.slice(0, 5))
    return kept.num_passages == table.num_rows and all(
        np.array_equal(kept.scores(query), fresh.scores(query)) for query in queries
    )
