"""metrics.csv of a run."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from refrag_lightning.cache import replace_file


class MetricsCSV(Logger):
    """Appends a row to `<folder>/metrics.csv` whenever something is logged, and flushes it.

    Lightning's own CSV logger keeps up to 100 rows in memory, which a killed run loses, and
    rewrites the file in place when a metric comes up for the first time. Here the file is replaced
    by a complete one in that case.

    A metrics.csv that is there already is gone on with.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns = ["epoch", "step"]
        self._looked = False

    @property
    def name(self) -> str:
        """No name of its own: the folder says it."""
        return ""

    @property
    def version(self) -> str:
        """No version of its own: the folder says it."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder; Lightning's `trainer.log_dir`."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: they are in the folder's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row.

        Args:
            metrics: Name -> value.
            step: The optimiser steps done.
        """
        if not self._looked and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), self._columns)
        self._looked = True
        row = {**metrics, "step": step}
        new = [name for name in row if name not in self._columns]
        if new or not self.path.exists():
            self._columns += new
            self._rewrite()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.path, self._columns, read_rows(self.path))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, name -> value as text, "" for none; no rows if there is no file.

    Args:
        path: The file.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.readlines()
    # A row that was cut short when the process was killed would be one of other numbers.
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def drop_rows(path: Path, *, from_step: int) -> None:
    """Takes the rows away that a run will log again when it goes on from a checkpoint.

    A row is logged with the number of the optimiser steps before its batch, a validation with that
    of the step that it follows, so what led to the checkpoint of step n has numbers below n.

    Args:
        path: The file; nothing is done where there is none.
        from_step: The checkpoint's optimiser steps.
    """
    rows = read_rows(path)
    if not rows:
        return
    kept = [r for r in rows if (r.get("step") or "").isdecimal() and int(r["step"]) < from_step]
    _write(path, list(rows[0]), kept)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    with replace_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
