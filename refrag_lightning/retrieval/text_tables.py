"""What a store holds for texts: row states at each rate, vectors of each embedder; and settings."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from refrag_lightning.retrieval import stored_rows
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.stored_rows import StoredRows
from refrag_lightning.retrieval.tables import KeyedTable

if TYPE_CHECKING:
    from lancedb.db import DBConnection

STATES, VECTORS = "states_", "embeddings_"
_NAME = re.compile(r"[\w.-]+\Z", re.ASCII)
_SETTINGS = pa.schema([("name", pa.string()), ("value", pa.string())])


class TextTables:
    """The methods of `PassageStore` about states, vectors and settings.

    Args:
        connection: The database.
    """

    def __init__(self, connection: DBConnection) -> None:
        self._connection = connection
        self._settings = KeyedTable(connection, "settings", _SETTINGS, "name")
        self._by_name: dict[str, KeyedTable] = {}
        self._state_settings: dict[str, Any] = {}  # read once: of one key they never change
        self._missing: set[str] = set()

    def texts(self) -> dict[str, str]:
        """Every distinct text of a passage, by its key."""
        raise NotImplementedError

    def texts_to_search(self) -> dict[str, str]:
        """Every distinct text that search looks at (title and text together), by its key."""
        raise NotImplementedError

    # ---- row states --------------------------------------------------------------------------

    def rows(self, key: str, texts: Sequence[str]) -> list[StoredRows | None]:
        """What is stored of the rows of texts, by one query.

        Args:
            key: The key of the states' settings (`keys.state_key`).
            texts: The texts; those of passages, letter for letter.

        Returns:
            For each text its rows, or None where none are stored.
        """
        if key not in self._state_settings:
            settings = self.get_setting(STATES + key)
            if settings is None:
                self._warn_of_other_states(key)
                return [None] * len(texts)
            self._state_settings[key] = settings
        settings = self._state_settings[key]
        wanted = [text_key(text) for text in texts]
        found = dict(stored_rows.read_table(self.states_table(key).lookup(wanted), settings))
        return [found.get(name) for name in wanted]

    def _warn_of_other_states(self, key: str) -> None:
        """Says once that the states are another model's, or of a time that knew other settings."""
        if key not in self._missing and self.state_keys():
            warnings.warn(
                "the index holds row states, but none of this model at this rate, so documents are "
                "encoded anew each time: bring it up to date with `python -m refrag_lightning "
                "index build --index ... --paths ... --model ...`, as it was built",
                stacklevel=3,
            )
        self._missing.add(key)

    def state_keys(self) -> list[str]:
        """The keys of the states that are stored."""
        return self._keys(STATES)

    def missing_states(self, key: str) -> list[str]:
        """The distinct texts of passages that have no states of a key."""
        have = set(self.states_table(key).keys())
        return [text for name, text in self.texts().items() if name not in have]

    def add_states(
        self,
        key: str,
        settings: Mapping[str, Any],
        texts: Sequence[str],
        rows: Sequence[StoredRows],
    ) -> None:
        """Stores the rows of texts that have none, in one commit.

        Args:
            key: The key of the settings.
            settings: What `states.state_settings` gave.
            texts: The texts.
            rows: The rows of each.
        """
        self.describe(STATES + key, dict(settings))
        table = stored_rows.as_table([text_key(text) for text in texts], rows)
        self.states_table(key).append(table)

    def states_table(self, key: str) -> KeyedTable:
        """The table of the states of a key."""
        return self._table(STATES + key, stored_rows.SCHEMA)

    # ---- vectors for search ------------------------------------------------------------------

    def vectors(self, key: str) -> tuple[list[str], np.ndarray]:
        """The stored vectors of an embedder.

        Args:
            key: The embedder's key.

        Returns:
            The texts' keys, rising, and their vectors (N, E) in float32.
        """
        rows = self.vectors_table(key).rows()
        if not rows.num_rows:
            return [], np.zeros((0, 0), dtype=np.float32)
        rows = rows.sort_by("text_key")
        size = rows.schema.field("vector").type.list_size
        values = rows["vector"].combine_chunks().flatten().to_numpy()
        return rows["text_key"].to_pylist(), values.reshape(-1, size)

    def vector_keys(self) -> list[str]:
        """The keys of the embedders whose vectors are stored."""
        return self._keys(VECTORS)

    def missing_vectors(self, key: str) -> list[str]:
        """The distinct texts, titles with them, that have no vector of an embedder."""
        have = set(self.vectors_table(key).keys())
        return [text for name, text in self.texts_to_search().items() if name not in have]

    def add_vectors(
        self, key: str, text_keys: Sequence[str], vectors: np.ndarray, *, name: str = ""
    ) -> None:
        """Stores the vectors of texts that have none, in one commit.

        Args:
            key: The embedder's key: letters, digits, `_`, `.` and `-`.
            text_keys: The keys of the texts, titles with them.
            vectors: (N, E).
            name: What to call the embedder where the index is described.
        """
        num, size = vectors.shape
        assert num == len(text_keys), (num, len(text_keys))
        if self.get_setting(VECTORS + key) is None:
            self.set(VECTORS + key, {"name": name, "size": size})
        table = self.vectors_table(key)
        values = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns = [
            pa.array(list(text_keys), pa.string()),
            pa.FixedSizeListArray.from_arrays(values, size),
        ]
        table.append(pa.table(columns, schema=table.schema))

    def vectors_table(self, key: str) -> KeyedTable:
        """The table of the vectors of an embedder."""
        size = (self.get_setting(VECTORS + key) or {"size": 1})["size"]
        schema = pa.schema([("text_key", pa.string()), ("vector", pa.list_(pa.float32(), size))])
        return self._table(VECTORS + key, schema)

    def text_tables(self) -> list[KeyedTable]:
        """The tables of all states and all vectors."""
        states = [self.states_table(key) for key in self.state_keys()]
        return states + [self.vectors_table(key) for key in self.vector_keys()]

    def drop_states(self, key: str) -> None:
        """Removes all states of a key."""
        self.states_table(key).drop()
        self._settings.delete("name", [STATES + key])

    def drop_vectors(self, key: str) -> None:
        """Removes all vectors of an embedder."""
        self.vectors_table(key).drop()
        self._settings.delete("name", [VECTORS + key])

    # ---- settings ----------------------------------------------------------------------------

    def get_setting(self, name: str) -> Any:
        """A setting, as plain data; None where it was never set."""
        rows = self._settings.lookup([name], ["value"])
        return json.loads(rows["value"][0].as_py()) if rows.num_rows else None

    def settings(self) -> dict[str, Any]:
        """Every setting, by its name."""
        pairs = self._settings.pairs("name", "value")
        return {name: json.loads(value) for name, value in pairs.items()}

    def set(self, name: str, value: Any) -> None:
        """Sets a setting, in one commit."""
        text = json.dumps(value, sort_keys=True)
        self._settings.upsert(pa.table([[name], [text]], schema=_SETTINGS))

    def describe(self, name: str, value: Any) -> None:
        """Sets a setting if it has another value."""
        if self.get_setting(name) != value:
            self.set(name, value)

    def _keys(self, prefix: str) -> list[str]:
        names = sorted(name for name in self.settings() if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def _table(self, name: str, schema: pa.Schema) -> KeyedTable:
        if not _NAME.match(name):
            raise ValueError(f"{name!r} cannot be a table's name: letters, digits, '_', '.', '-'")
        table = self._by_name.get(name)
        if table is None or table.schema != schema:
            table = self._by_name[name] = KeyedTable(self._connection, name, schema, "text_key")
        return table
