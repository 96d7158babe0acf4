"""Evaluation: the base of the modules that only measure, run by `test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refrag_lightning.evaluation.gap import NUM_DRAWS
from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading, readings_of
from refrag_lightning.evaluation.report import Report
from refrag_lightning.model.load import load
from refrag_lightning.plain_text import say
from refrag_lightning.text.tokenizer import RefragTokenizer
from refrag_lightning.training.base import RefragLightningModule


class Evaluation(RefragLightningModule):
    """Base of the evaluations.

    Args:
        init_from: Folder of the model, or of the run that made it.
        rates: Tokens a row; all that the model has if None.
        num_draws: Draws of the bootstrap.
        seed: Of the bootstrap and of the control with a random projector.
        dtype: Of the models' weights; float32 if None.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """

    def __init__(
        self,
        init_from: str,
        rates: list[int] | None = None,
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
        dtype: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        super().__init__()
        self.init_from = init_from
        self.wanted_rates = rates
        self.num_draws = num_draws
        self.table_seed = seed
        self.dtype_name = dtype
        self.allow_base_mismatch = allow_base_mismatch
        self.left_out: list[str] = []
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """The model and its tokenizer, loaded when first asked for."""
        if self._reader is None:
            self._reader = self.load_reader(self.init_from)
        return self._reader

    @property
    def tokenizer(self) -> RefragTokenizer:  # type: ignore[override]
        """The model's tokenizer; the data module takes it from here."""
        return self.reader.tokenizer

    @property
    def rates(self) -> list[int]:
        """Tokens a row that are measured.

        Raises:
            ValueError: If the model has rows, but not at a rate asked for.
        """
        own = list(self.tokenizer.rates)
        wanted = self.wanted_rates or own
        missing = sorted(set(wanted).difference(own))
        if missing and self.reader.has_rows:
            raise ValueError(f"rates ({missing}) are not among the model's ({own})")
        return wanted

    def load_reader(self, folder: str) -> Reader:
        """Loads a model, all of it frozen."""
        options: dict[str, Any] = {"dtype": self.dtype_name}
        if self.allow_base_mismatch:
            options["allow_base_mismatch"] = True
        model, tokenizer = load(folder, **options)
        return Reader(model.requires_grad_(False).eval(), tokenizer, seed=self.table_seed)

    def configure_model(self) -> None:
        """Puts the model where Lightning moves it to the device."""
        if self.model is None:
            self.model = self.reader.model

    def possible(self, kinds: list[str]) -> list[Reading]:
        """The readings of these names that the model can read; notes the others in `left_out`."""
        readings = readings_of(kinds, self.rates)
        for reading in readings:
            if not self.reader.can_read(reading) and reading.name not in self.left_out:
                self.left_out.append(reading.name)
        return [reading for reading in readings if self.reader.can_read(reading)]

    def settings(self, **further: Any) -> dict[str, Any]:
        """What a report says of how it came about."""
        settings = {"model": self.init_from, "rates": self.rates, **further}
        settings |= {"precision": str(self.trainer.precision), "seed": self.table_seed}
        settings |= {"bootstrap draws": self.num_draws}
        if self.left_out:
            settings["left out"] = f"{', '.join(self.left_out)}: the model has no such rows"
        return settings

    def finish(self, report: Report, figures: dict[str, float]) -> None:
        """Logs the figures as `test/…`; the first rank prints and writes the report.

        Args:
            report: The report.
            figures: By name.
        """
        if not self.trainer.is_global_zero:
            return
        # Not through self.log: the figures stand in the report, and Lightning would print them all
        # once more, in a column for each loader.
        for logger in self.trainer.loggers:
            logger.log_metrics({f"test/{name}": value for name, value in figures.items()}, step=0)
        folder = Path(self.trainer.default_root_dir)
        files = report.write(folder)
        report.log(self.trainer.loggers, folder)
        say(f"\n{report.text()}\n\nreport: {files[1]}\n")
