"""PassageStore: passages, their row states and their vectors, as Lance tables in one place.

- `passages`: `id`, `document_id`, `title`, `text`, `source`, `start`, `end`, `text_key`,
  `document_key`.
- `states_<key>`, one for each rate and encoder: `text_key`, `num_rows`, `states` ((C, m, E_row)
  numbers in float16), `layout` (see `stored_rows`).
- `embeddings_<key>`, one for each embedder: `text_key` (of title and text, which search looks at
  together), `vector` ((E,) numbers in float32).
- `settings`: `name`, `value` in JSON.

States and vectors belong to texts and not to passages: a passage that stands in two documents has
one state, and a document that moves keeps its own. States are bytes, which Lance stores as they
are: of 2,000 passages of 17 rows of MiniLM, 26.21 MB hold 26.11 MB of numbers. Lists of float16
took 1.4 times as long to read and 2.5 times to write, lists of vectors twice as long to read.

The place is a folder, or an address such as `s3://bucket/index`, whose credentials are found as
AWS' own tools find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from refrag_lightning.retrieval.bm25 import searched_texts
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.passages import Passage
from refrag_lightning.retrieval.place import builder_lock, connect, local_path, make_folder
from refrag_lightning.retrieval.tables import KeyedTable, open_table
from refrag_lightning.retrieval.text_tables import TextTables

FORMAT = 1
_PASSAGES = pa.schema(
    [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("source", pa.string()),
        ("text_key", pa.string()),
        ("document_key", pa.string()),
    ]
)
_PASSAGE_FIELDS = _PASSAGES.names[:7]


class PassageStore(TextTables):
    """Passages with their row states and vectors; made by `create` or `open`.

    Reading sees what was committed last, by whatever process. Writing is for one builder at a time;
    see `lock`.

    Attributes:
        uri: Where it is.
        local_path: The folder, or None where it is none.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.local_path = local_path(uri)
        super().__init__(connect(uri))
        self._passages = KeyedTable(self._connection, "passages", _PASSAGES, "id")

    @classmethod
    def create(cls, uri: str | Path) -> PassageStore:
        """Opens the store at a place, and makes an empty one if there is none.

        Raises:
            ValueError: The place holds a store in another format.
            OSError: Nothing can be written there.
        """
        if cls.exists(uri):
            return cls.open(uri)
        make_folder(uri)
        store = cls(str(uri))
        store._passages.create()
        # The last step: a store without it counts as none.
        store.set("format", FORMAT)
        return store

    @classmethod
    def open(cls, uri: str | Path) -> PassageStore:
        """Opens a store.

        Args:
            uri: A folder or an address.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is in another format.
        """
        if not cls.exists(uri):
            raise FileNotFoundError(
                f"there is no index at {str(uri)!r}; `python -m refrag_lightning index build "
                f"--index {uri} --paths ... --model ...` makes one"
            )
        store = cls(str(uri))
        found = store.get_setting("format")
        if found != FORMAT:
            raise ValueError(
                f"the index at {str(uri)!r} has the format {found}, and this version reads {FORMAT}"
            )
        return store

    @staticmethod
    def exists(uri: str | Path) -> bool:
        """Whether there is a store at a place."""
        folder = local_path(uri)
        # Connecting makes the folder.
        if folder is not None and not folder.is_dir():
            return False
        settings = open_table(connect(uri), "settings")
        return settings is not None and settings.count_rows() > 0

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other builders away; see `place.builder_lock`."""
        return builder_lock(self.uri)

    @property
    def version(self) -> int:
        """A number that rises whenever passages were added or removed, for caches."""
        return self._passages.version

    def num_bytes(self) -> int:
        """Bytes of the passages on disk, without states and vectors."""
        return self._passages.num_bytes()

    # ---- passages ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of passages."""
        return len(self._passages)

    def passage_table(self) -> pa.Table:
        """All passages, in the order of their ids, with the columns that the module names."""
        return self._passages.rows().sort_by("id")

    def passages(self) -> Iterator[Passage]:
        """Yields all passages, in the order of their ids."""
        for row in self.passage_table().select(_PASSAGE_FIELDS).to_pylist():
            yield Passage(**row)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages of some ids, in the ids' order, by one query.

        Raises:
            ValueError: There is no passage of an id.
        """
        rows = self._passages.lookup(ids, _PASSAGE_FIELDS).to_pylist()
        found = {row["id"]: Passage(**row) for row in rows}
        if missing := [name for name in ids if name not in found]:
            raise ValueError(f"the index {self.uri!r} has no passage {missing[0]!r}")
        return [found[name] for name in ids]

    def document_keys(self) -> dict[str, str]:
        """The key of each document by its id: what its passages were made from."""
        return self._passages.pairs("document_id", "document_key")

    def passage_documents(self) -> dict[str, str]:
        """The id of each passage's document, by the passage's id."""
        return self._passages.pairs("id", "document_id")

    def doubled_documents(self) -> list[str]:
        """Ids of documents of which a passage stands there twice; see `sweep`."""
        owners = self.passage_documents()
        return list({owners[name] for name in doubled(self._passages.keys())})

    def put_documents(
        self,
        passages: Sequence[Passage],
        document_keys: Mapping[str, str],
        replaced: Sequence[str] = (),
    ) -> None:
        """Writes all passages of some documents, in one commit.

        Args:
            passages: The passages.
            document_keys: The key of each document, by its id.
            replaced: Ids of the documents whose earlier passages go.
        """
        columns: dict[str, list[Any]] = {
            name: [getattr(passage, name) for passage in passages] for name in _PASSAGE_FIELDS
        }
        columns["text_key"] = [text_key(passage.text) for passage in passages]
        columns["document_key"] = [document_keys[passage.document_id] for passage in passages]
        rows = pa.table([columns[name] for name in _PASSAGES.names], schema=_PASSAGES)
        self._passages.replace(rows, "document_id", replaced)

    def remove_documents(self, ids: Sequence[str]) -> None:
        """Removes all passages of some documents."""
        self._passages.delete("document_id", ids)

    def texts(self) -> dict[str, str]:
        """Every distinct text of a passage, by its key."""
        return self._passages.pairs("text_key", "text")

    def texts_to_search(self) -> dict[str, str]:
        """Every distinct text that search looks at (title and text together), by its key."""
        found = searched_texts(self._passages.rows(["title", "text"]))
        return {text_key(text): text for text in dict.fromkeys(found)}

    # ---- upkeep ------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Removes states and vectors that no passage's text uses, and doubles; gives their number.

        Doubles come of two builders at an address, where there is no lock. All copies go, and are
        computed anew.
        """
        removed = 0
        for tables, used in (
            (map(self.states_table, self.state_keys()), self.texts()),
            (map(self.vectors_table, self.vector_keys()), self.texts_to_search()),
        ):
            for table in tables:
                gone = unused(table.keys(), used) + doubled(table.keys())
                table.delete("text_key", gone)
                removed += len(gone)
        return removed

    def compact(self, *, force: bool = False) -> None:
        """Joins small files and removes what old versions hold, where there is much of either.

        A local store has to be locked.

        Args:
            force: Also where there is little.
        """
        for table in (self._passages, *self.text_tables(), self._settings):
            table.compact(force=force, alone=self.local_path is not None)


def unused(keys: Sequence[str], used: Mapping[str, Any]) -> list[str]:
    """The distinct keys that are not among those that are used."""
    return [key for key in dict.fromkeys(keys) if key not in used]


def doubled(keys: Sequence[str]) -> list[str]:
    """The keys that stand there more than once, each once."""
    counts = pc.value_counts(pa.array(keys, pa.string()))
    several = pc.greater(counts.field("counts"), 1)
    found: list[str] = counts.field("values").filter(several).to_pylist()
    return found
