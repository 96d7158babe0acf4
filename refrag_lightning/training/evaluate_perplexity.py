"""PerplexityEvaluation: log-perplexity of continuations, by how their context is read.

python -m refrag_lightning test --config configs/eval/perplexity.yaml --model FOLDER
"""

from __future__ import annotations

from typing import Any, cast

import torch

from refrag_lightning.data.examples import TextBatch
from refrag_lightning.data.perplexity import Cell, PerplexityDataModule
from refrag_lightning.evaluation.gap import NUM_DRAWS, ValueTable
from refrag_lightning.evaluation.perplexity import Grid, perplexity_report
from refrag_lightning.model.losses import target_losses
from refrag_lightning.model.reading import naming_texts
from refrag_lightning.training.evaluation import Evaluation


class PerplexityEvaluation(Evaluation):
    """Measures nats a token on a grid of contexts and continuations (REFRAG's Table 1).

    Args:
        init_from: Folder of the model, or of the run that made it.
        num_draws: Draws of the bootstrap.
        seed: Of the bootstrap.
        dtype: Of the model's weights, such as bfloat16; float32 if None.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """

    def __init__(
        self,
        init_from: str,
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
        dtype: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        super().__init__(
            init_from=init_from,
            num_draws=num_draws,
            seed=seed,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
        )
        self._grid: Grid | None = None

    def configure_model(self) -> None:
        """Loads the model, and works out the grid.

        Raises:
            ValueError: If the data asks for rows of a model that has none.
        """
        super().configure_model()
        if self._grid is not None:
            return
        data = cast(PerplexityDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        if "compressed" in data.readings and not self.reader.has_rows:
            raise ValueError(
                f"{self.init_from} has no rows: leave compressed out of the data's readings "
                f"({data.readings})"
            )
        self._grid = Grid(
            cells=[cell.task for cell in data.cells()],
            rates=self.rates,
            continuations=data.continuations,
            num_windows=data.num_windows,
        )
        self.table = ValueTable(2 * len(data.continuations))

    @property
    def grid(self) -> Grid:
        """What is measured."""
        assert self._grid is not None
        return self._grid

    def test_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures each text of a batch at each continuation's length."""
        model: Any = self.reader.model
        task_of_text_B = batch.text_ids.new_zeros(batch.num_texts)
        tasks = task_of_text_B.scatter(0, batch.text_ids, batch.task_ids).tolist()
        names = [f"{n} ({batch.tasks[task]})" for n, task in zip(batch.ids, tasks, strict=True)]
        with naming_texts(names, "ask for smaller contexts or continuations"):
            hidden_ND = model.hidden(batch.student).flatten(0, 1)
        losses = target_losses(model.head, hidden_ND[batch.predicting], batch.targets)
        # The targets of a text stand side by side: the place of each among them.
        counts_B = torch.bincount(batch.text_ids, minlength=batch.num_texts)
        place_P = torch.arange(len(batch.targets), device=counts_B.device)
        place_P = place_P - (counts_B.cumsum(0) - counts_B)[batch.text_ids]
        columns = []
        for length in self.grid.continuations:
            kept_P = place_P < length
            nats_P = torch.where(kept_P, losses.nll_P.float(), 0.0)
            zeros_B = torch.zeros(batch.num_texts, device=nats_P.device)
            columns.append(zeros_B.index_add(0, batch.text_ids, nats_P))
            columns.append(zeros_B.index_add(0, batch.text_ids, kept_P.float()))
        index = [
            self.grid.index(batch.tasks[task], batch.compression, int(name.rpartition("-")[2]))
            for task, name in zip(tasks, batch.ids, strict=True)
        ]
        values = torch.stack([column.cpu().double() for column in columns], dim=1)
        self.table.update(torch.tensor(index), values)

    def on_test_epoch_end(self) -> None:
        """Writes the report into the run folder."""
        index, values = self.table.compute()
        self.table.reset()
        data = cast(PerplexityDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        report, figures = perplexity_report(
            self.grid.series(index, values, Cell.of),
            self.settings(
                data=type(data.sources["train"]).__name__,
                windows=data.num_windows,
                contexts=data.contexts,
                continuations=data.continuations,
            ),
            num_draws=self.num_draws,
            seed=self.table_seed,
        )
        self.finish(report, figures)
