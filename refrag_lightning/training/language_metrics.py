"""Sums of losses over targets, apart by task and rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

_NAME_BYTES = 32


class Figures(NamedTuple):
    """Means over the targets of one task at one rate.

    Attributes:
        nll: Cross-entropy in nats a target.
        accuracy: Share of the targets that are the most likely token.
        targets: How many there were.
    """

    nll: float
    accuracy: float
    targets: int


class TargetSums(Metric):
    """Losses of targets by task and rate, and the weighted loss of them all.

    Which tasks there are shows only in the data, and may differ between ranks. So each batch leaves
    a record of sums for each of its tasks, under the task's name in bytes, and ranks put their
    records together.
    """

    full_state_update = False
    records: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Records lie one after another in one dimension: a rank without any has an empty tensor.
        self.add_state("records", [], dist_reduce_fx="cat")

    def update(
        self,
        nll_P: Tensor,
        hits_P: Tensor,
        losses_P: Tensor,
        weights_P: Tensor,
        *,
        task_ids: Tensor,
        tasks: tuple[str, ...],
        rate: int,
    ) -> None:
        """Adds a batch.

        Args:
            nll_P: (P,) nats.
            hits_P: (P,) whether a target is the most likely token.
            losses_P: (P,) loss of each target, before its weight.
            weights_P: (P,) weight of each target in the mean loss.
            task_ids: (P,) index into `tasks`.
            tasks: Names, of at most 32 bytes.
            rate: Tokens a row.
        """
        ones_P = torch.ones_like(nll_P)
        columns = (nll_P, hits_P, losses_P * weights_P, weights_P, ones_P)
        # Metrics stand in for a rank without records by an empty float32 tensor.
        values_P5 = torch.stack([column.float() for column in columns], dim=-1)
        sums = values_P5.new_zeros((len(tasks), values_P5.shape[-1]))
        sums = sums.index_add(0, task_ids, values_P5)
        keys = torch.tensor([[float(rate), *_padded(task)] for task in tasks]).to(sums)
        self.records.append(torch.cat([keys, sums], dim=1).flatten())

    def compute(self) -> tuple[Tensor, dict[tuple[str, int], Figures]]:
        """The weighted mean loss, and the figures by task and rate; ranks agree on both."""
        records = self.records
        # After ranks were put together it is one tensor.
        joined = torch.cat(records) if isinstance(records, list) else records
        table = joined.cpu().double().view(-1, 1 + _NAME_BYTES + 5)
        totals: dict[tuple[str, int], Tensor] = {}
        for record in table:
            key = (_name(record[1 : 1 + _NAME_BYTES]), int(record[0]))
            totals[key] = totals.get(key, torch.zeros(5).double()) + record[1 + _NAME_BYTES :]
        figures = {
            key: Figures(float(sums[0] / sums[4]), float(sums[1] / sums[4]), int(sums[4]))
            for key, sums in sorted(totals.items())
            if sums[4] > 0
        }
        _, _, losses, weights, _ = table[:, 1 + _NAME_BYTES :].sum(0)
        return (losses / weights).float(), figures


def _padded(name: str) -> list[float]:
    code = name.encode()
    if len(code) > _NAME_BYTES:
        raise ValueError(f"the task {name!r} has a name of more than {_NAME_BYTES} bytes")
    return [float(byte) for byte in code.ljust(_NAME_BYTES, b"\0")]


def _name(code: Tensor) -> str:
    return bytes(int(byte) for byte in code).rstrip(b"\0").decode()
