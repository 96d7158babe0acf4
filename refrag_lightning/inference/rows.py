"""Rows of documents: from memory, from an index by the document's text, or encoded now.

Where the states of a document's rows are known, the encoder's tokenizer is not asked again: the
index keeps beside them where the rows end and how many tokens each has, and that is all that a
batch needs.

Shape suffixes as in `text/batch.py`: C rows, m slots a row.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from refrag_lightning.inference.trace import RowOrigin
from refrag_lightning.text.assemble import Context
from refrag_lightning.text.build import BatchBuilding
from refrag_lightning.text.packing import PackedDocument

if TYPE_CHECKING:
    from refrag_lightning.model import RefragModel
    from refrag_lightning.retrieval.stored_rows import StoredRows
    from refrag_lightning.text.tokenizer import RefragTokenizer

MEMORY_BYTES = 256 << 20


class RowStore(Protocol):
    """What holds row states by text; a `PassageStore` is one."""

    def rows(self, key: str, texts: Sequence[str]) -> Sequence[StoredRows | None]:
        """The rows of each text under a state key; None where they are not stored."""
        ...


@dataclass(frozen=True)
class DocumentRows:
    """The rows of a document, and their states.

    Attributes:
        packed: Where the rows end. Its `encoder_ids` are not the document's: they stand for tokens
            that nobody reads any more.
        states: (C, m, E_row), before the projector.
    """

    packed: PackedDocument
    states: Tensor

    @classmethod
    def of(
        cls, ends: np.ndarray, sizes: np.ndarray, lost: np.ndarray, states: Tensor
    ) -> DocumentRows:
        """Rows from what is known of each.

        Args:
            ends: (C,) one past its last character.
            sizes: (C,) its encoder tokens.
            lost: (C,) characters that the encoder could not read.
            states: (C, m, E_row).
        """
        bounds = np.concatenate([[0], ends]).astype(np.int64)
        token_rows = np.repeat(np.arange(len(sizes)), sizes)
        packed = PackedDocument(np.zeros_like(token_rows), token_rows, bounds, np.asarray(lost))
        return cls(packed, states)

    @property
    def num_bytes(self) -> int:
        """Memory that the states take."""
        return self.states.element_size() * self.states.numel()

    def head(self, num_rows: int) -> DocumentRows:
        """The first rows alone; their states stay those of the whole document."""
        packed = self.packed
        kept = packed.token_rows < num_rows
        return DocumentRows(
            replace(
                packed,
                encoder_ids=packed.encoder_ids[kept],
                token_rows=packed.token_rows[kept],
                bounds=packed.bounds[: num_rows + 1],
                lost=packed.lost[:num_rows],
            ),
            self.states[:num_rows],
        )


class KnownRows(BatchBuilding):
    """Builds batches as a tokenizer does, of documents that are packed already.

    Args:
        tokenizer: The tokenizer.
        packed: The documents, by their text.
        context: Whether rows are told apart by their tokens (`row`) or by their place (`document`);
            the tokenizer's own if None. Where all states are known, the place is enough.
    """

    def __init__(
        self,
        tokenizer: RefragTokenizer,
        packed: Mapping[str, PackedDocument],
        *,
        context: Context | None = None,
    ) -> None:
        self.compression = tokenizer.compression
        self.chunk_by = tokenizer.chunk_by
        self.max_sentence = tokenizer.max_sentence
        self.padding_side = tokenizer.padding_side
        self.opening_ids = tokenizer.opening_ids
        self.assembler = tokenizer.assembler
        if context is not None:
            self.assembler = replace(tokenizer.assembler, context=context)
        self.encoder = tokenizer.encoder
        self.plain_decoder = tokenizer.plain_decoder
        self.plain_template = tokenizer.plain_template
        self._plain_encoder = None
        self._packed = packed

    def pack(self, texts: Sequence[str]) -> list[PackedDocument]:
        """The packed documents of these texts."""
        return [self._packed[text] for text in texts]


class RowMemory:
    """Rows of the documents that were read last, by rate and text.

    Args:
        num_bytes: Most memory that their states take; 0 keeps nothing.
    """

    def __init__(self, num_bytes: int = MEMORY_BYTES) -> None:
        self.num_bytes = num_bytes
        self.used = 0
        self._rows: OrderedDict[tuple[int, str], DocumentRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, rate: int, text: str) -> DocumentRows | None:
        """A document's rows, if they are there; it becomes the one that was read last."""
        rows = self._rows.get((rate, text))
        if rows is not None:
            self._rows.move_to_end((rate, text))
        return rows

    def put(self, rate: int, text: str, rows: DocumentRows) -> None:
        """Remembers a document; those that were not read for longest go."""
        if (rate, text) in self._rows:
            self.used -= self._rows.pop((rate, text)).num_bytes
        self._rows[rate, text] = rows
        self.used += rows.num_bytes
        while self.used > self.num_bytes:
            _, gone = self._rows.popitem(last=False)
            self.used -= gone.num_bytes

    def clear(self) -> None:
        """Forgets everything."""
        self._rows.clear()
        self.used = 0


@dataclass
class ReadRows:
    """What `RowReader.read` found.

    Attributes:
        rows: The rows of each text.
        origins: Where they come from.
        lookup_seconds: Time for memory and index.
        encoding_seconds: Time for the encoder and its tokenizer.
    """

    rows: dict[str, DocumentRows]
    origins: dict[str, RowOrigin]
    lookup_seconds: float = 0.0
    encoding_seconds: float = 0.0


class RowReader:
    """Gets rows of documents: from memory, else from an index, else from the encoder.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        store: The index, if there is one.
        memory_bytes: As in `RowMemory`.
    """

    def __init__(
        self,
        model: RefragModel,
        tokenizer: RefragTokenizer,
        *,
        store: RowStore | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.memory = RowMemory(memory_bytes)
        self._keys: dict[int, str] = {}

    def read(self, texts: Sequence[str], rate: int) -> ReadRows:
        """The rows of documents: one question to the index for all, one encoder call for the rest.

        Args:
            texts: The documents.
            rate: Tokens a row.

        Raises:
            ValueError: If a text cannot be tokenized, or the index holds states of another shape.
        """
        started = time.perf_counter()
        found = ReadRows({}, {})
        missing = []
        for text in dict.fromkeys(texts):
            rows = self.memory.get(rate, text)
            if rows is None:
                missing.append(text)
            else:
                found.rows[text], found.origins[text] = rows, "memory"
        if missing and self.store is not None:
            missing = self._from_store(missing, rate, found)
        looked_up = time.perf_counter()
        if missing:
            for text, rows in zip(missing, self._encode(missing, rate), strict=True):
                found.rows[text], found.origins[text] = rows, "encoded"
            _synchronize(self.device)
        for text, origin in found.origins.items():
            if origin != "memory":
                self.memory.put(rate, text, found.rows[text])
        found.lookup_seconds = looked_up - started
        found.encoding_seconds = time.perf_counter() - looked_up if missing else 0.0
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def key(self, rate: int) -> str:
        """The state key of a rate: what the index files the states of this model under."""
        if rate not in self._keys:
            from refrag_lightning.retrieval.keys import state_key
            from refrag_lightning.retrieval.states import state_settings

            # Digests the encoder's weights, so it is worked out once.
            self._keys[rate] = state_key(state_settings(self.model, self.tokenizer.at(rate)))
        return self._keys[rate]

    def _from_store(self, texts: Sequence[str], rate: int, found: ReadRows) -> list[str]:
        """Looks texts up in the index; returns those that it does not hold."""
        assert self.store is not None
        shape = (self.model.config.num_slots, self.model.config.row_size)
        missing = []
        for text, stored in zip(texts, self.store.rows(self.key(rate), texts), strict=True):
            if stored is None:
                missing.append(text)
                continue
            if stored.states.shape != (len(stored.ends), *shape):
                raise ValueError(
                    f"the index holds states of shape {stored.states.shape} for the text that "
                    f"starts with {text[:40]!r}, where {(len(stored.ends), *shape)} is expected"
                )
            # A copy: what is stored is a read-only view of all that was read with it.
            states = torch.from_numpy(stored.states.copy()).to(self.device)
            rows = DocumentRows.of(stored.ends, stored.sizes, stored.lost, states)
            found.rows[text], found.origins[text] = rows, "store"
        return missing

    def _encode(self, texts: Sequence[str], rate: int) -> list[DocumentRows]:
        from refrag_lightning.retrieval.states import encode_documents

        documents, states, rows = encode_documents(self.model, self.tokenizer.at(rate), texts)
        return [
            DocumentRows.of(
                document.bounds[1:],
                document.row_sizes,
                document.lost,
                states[torch.from_numpy(own).to(states.device)],
            )
            for document, own in zip(documents, rows, strict=True)
        ]


def _synchronize(device: torch.device) -> None:
    """Waits for a GPU, so that times say when its work was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
