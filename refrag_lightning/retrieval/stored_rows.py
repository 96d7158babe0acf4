"""StoredRows: what is kept of a text's rows, and how it stands in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("text_key", pa.string()),
        ("num_rows", pa.int32()),
        ("states", pa.large_binary()),
        ("layout", pa.binary()),
    ]
)


@dataclass(frozen=True)
class StoredRows:
    """The row states of a text, and how it is cut into rows, so that nobody tokenizes it again.

    Attributes:
        states: (C, m, E_row) float16, before the projector; zeros for a row without tokens.
        ends: (C,) int32, one past the last character of each row.
        sizes: (C,) int32, encoder tokens of each row.
        lost: (C,) int32, characters of each row that the encoder could not read.
    """

    states: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    lost: np.ndarray


def as_table(text_keys: Sequence[str], rows: Sequence[StoredRows]) -> pa.Table:
    """Writes the rows of texts as a table in `SCHEMA`."""
    layouts = [np.stack([item.ends, item.sizes, item.lost]).astype("<i4") for item in rows]
    columns = [
        pa.array(list(text_keys), pa.string()),
        pa.array([len(item.states) for item in rows], pa.int32()),
        pa.array([item.states.astype("<f2").tobytes() for item in rows], pa.large_binary()),
        pa.array([layout.tobytes() for layout in layouts], pa.binary()),
    ]
    return pa.table(columns, schema=SCHEMA)


def read_table(
    table: pa.Table | pa.RecordBatch, settings: Mapping[str, Any]
) -> Iterator[tuple[str, StoredRows]]:
    """Yields what `as_table` wrote: text keys and rows, as views of the table's memory.

    Args:
        table: The table.
        settings: The settings of its states, for their shape.
    """
    shape = settings["num_slots"], settings["row_size"]
    for key, num_rows, states, layout in zip(
        table["text_key"].to_pylist(),
        table["num_rows"].to_pylist(),
        table["states"],
        table["layout"],
        strict=True,
    ):
        ends, sizes, lost = np.frombuffer(layout.as_buffer(), dtype="<i4").reshape(3, num_rows)
        data = np.frombuffer(states.as_buffer(), dtype="<f2").reshape(num_rows, *shape)
        yield key, StoredRows(data, ends, sizes, lost)
