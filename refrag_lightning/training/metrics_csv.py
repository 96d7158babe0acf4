"""metrics.csv of a run."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(Logger):
    """Appends a row to `<folder>/metrics.csv` whenever something is logged, and flushes it.

    Lightning's own CSV logger keeps up to 100 rows in memory, which a killed run loses, and
    rewrites the file in place when a metric comes up for the first time. Here the file is replaced
    by a complete one in that case.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns = ["epoch", "step"]

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
        row = {**metrics, "step": step}
        new = [name for name in row if name not in self._columns]
        if new or not self.path.exists():
            self._columns += new
            self._rewrite()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
