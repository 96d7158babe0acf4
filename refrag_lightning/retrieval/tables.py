"""One Lance table of the store: rows found by a key, and written in commits that are atomic.

Lance writes data files first and a manifest last, which is renamed into place: a table opens at the
last commit that was finished, whenever a writer was killed. What the killed one left lies in files
that no manifest names, until `compact` removes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

# A list in a filter is read in linear time, but as one expression; a table of which more is wanted
# is read whole.
_MOST_KEYS = 2000
# Without an index Lance reads all keys for a look-up: 3 ms for 2,000 texts, as with one.
_ROWS_FOR_INDEX = 50_000
# A commit leaves a file, and reading many small ones is slow; deleted rows stay in theirs. All of a
# small table is written anew after a change, of a large one (in bytes) only for so many files, or
# so many rows in the files for each that counts.
_SMALL = 256 << 20
_MOST_FILES = 8
_MOST_DELETED = 1.25


class KeyedTable:
    """A table whose rows have a key each; it is made when something is first put into it.

    Args:
        connection: The database.
        name: The table's name.
        schema: Its columns.
        key: The column of the key.
    """

    def __init__(self, connection: DBConnection, name: str, schema: pa.Schema, key: str) -> None:
        self.name = name
        self.schema = schema
        self.key = key
        self._connection = connection
        self._table: Table | None = None

    @property
    def table(self) -> Table | None:
        """The Lance table, or None where there is none yet."""
        if self._table is None:
            self._table = open_table(self._connection, self.name)
        return self._table

    def create(self) -> Table:
        """The Lance table, made if there is none."""
        if self.table is None:
            self._table = self._connection.create_table(self.name, schema=self.schema)
        assert self._table is not None
        return self._table

    def drop(self) -> None:
        """Removes the table."""
        if self.table is not None:
            self._connection.drop_table(self.name)
        self._table = None

    @property
    def version(self) -> int:
        """A number that rises with every commit; 0 where there is no table."""
        return 0 if self.table is None else int(self.table.version)

    def num_bytes(self) -> int:
        """Bytes of its rows on disk, deleted ones counted."""
        return 0 if self.table is None else int(self._stats()["total_bytes"])

    def _stats(self) -> dict[str, Any]:
        assert self.table is not None
        stats: Any = self.table.stats()  # a dictionary, whatever its annotation says
        return dict(stats)

    def __len__(self) -> int:
        return 0 if self.table is None else int(self.table.count_rows())

    # ---- reading -----------------------------------------------------------------------------

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows.

        Args:
            columns: Which columns; all if None.
        """
        return self._query(columns, None)

    def keys(self) -> list[str]:
        """The key of every row."""
        keys: list[str] = self.rows([self.key])[self.key].to_pylist()
        return keys

    def pairs(self, keys: str, values: str) -> dict[str, str]:
        """One column by another."""
        rows = self.rows([keys, values])
        return dict(zip(rows[keys].to_pylist(), rows[values].to_pylist(), strict=True))

    def lookup(self, keys: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of some keys, in any order; keys without a row are passed over.

        One query, whatever the number of keys.
        """
        wanted = list(dict.fromkeys(keys))
        if len(wanted) <= _MOST_KEYS:
            return self._query(columns, wanted)
        chosen = [*dict.fromkeys([self.key, *(columns or self.schema.names)])]
        rows = self._query(chosen, None)
        rows = rows.filter(pc.is_in(rows[self.key], pa.array(wanted, pa.string())))
        return rows.select(list(columns)) if columns is not None else rows

    def _query(self, columns: Sequence[str] | None, keys: list[str] | None) -> pa.Table:
        try:
            return self._ask(columns, keys)
        except (RuntimeError, OSError, ValueError):
            # A builder may have taken the table away, or the version that was just looked at.
            self._table = None
            return self._ask(columns, keys)

    def _ask(self, columns: Sequence[str] | None, keys: list[str] | None) -> pa.Table:
        chosen = list(columns) if columns is not None else self.schema.names
        empty = pa.schema([self.schema.field(name) for name in chosen]).empty_table()
        if self.table is None or (keys is not None and not keys):
            return empty
        query = self.table.search().select(chosen)
        if keys is not None:
            query = query.where(f"{self.key} IN ({quoted(keys)})")
        found: pa.Table = query.to_arrow()
        return found.select(chosen)

    # ---- writing -----------------------------------------------------------------------------

    def append(self, rows: pa.Table) -> None:
        """Adds rows in one commit."""
        if rows.num_rows:
            self.create().add(rows)

    def upsert(self, rows: pa.Table) -> None:
        """Adds rows in one commit, each in the place of the one that has its key."""
        merge = self.create().merge_insert(self.key)
        merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def replace(self, rows: pa.Table, column: str, values: Sequence[str]) -> None:
        """Removes the rows that have one of `values` in `column` and adds others, in one commit."""
        if not rows.num_rows:
            self.delete(column, values)
            return
        if self.table is None or not values:
            self.append(rows)
            return
        merge = self.table.merge_insert(self.key)
        merge = merge.when_matched_update_all().when_not_matched_insert_all()
        merge.when_not_matched_by_source_delete(f"{column} IN ({quoted(values)})").execute(rows)

    def delete(self, column: str, values: Iterable[str]) -> None:
        """Removes the rows that have one of `values` in `column`."""
        wanted = list(dict.fromkeys(values))
        if self.table is None:
            return
        for start in range(0, len(wanted), _MOST_KEYS):
            self.table.delete(f"{column} IN ({quoted(wanted[start : start + _MOST_KEYS])})")

    def compact(self, *, force: bool = False, alone: bool = False) -> None:
        """Joins small files, and removes old versions and what killed writers left.

        A large table is left as it is while it has few files and few deleted rows, and one that
        did not change always.

        Args:
            force: Join and remove in a large table too.
            alone: Whether no other process writes, as is known under a lock. What is left over of
                unfinished commits goes only then, or when it is a week old.
        """
        if self.table is None:
            return
        if len(self.table.list_versions()) == 1:
            return
        stats = self._stats()
        files, mean = (stats["fragment_stats"][k] for k in ("num_fragments", "lengths"))
        written = files * mean["mean"]
        small = stats["total_bytes"] <= _SMALL
        if not (small or files > _MOST_FILES or written > _MOST_DELETED * len(self) or force):
            return
        if len(self) >= _ROWS_FOR_INDEX and not list(self.table.list_indices()):
            self.table.create_scalar_index(self.key)
        with warnings.catch_warnings():
            # That readers of old versions fail: those here look for the newest one first.
            warnings.simplefilter("ignore", UserWarning)
            self.table.optimize(cleanup_older_than=timedelta(0), delete_unverified=alone)


def open_table(connection: DBConnection, name: str) -> Any:
    """Opens a table; None where there is none, or only the folder of one never finished."""
    try:
        return connection.open_table(name)
    except (ValueError, FileNotFoundError):
        return None


def quoted(values: Iterable[str]) -> str:
    """Texts as a list in SQL."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
