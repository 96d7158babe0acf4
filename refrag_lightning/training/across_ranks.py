"""Means over all targets of an optimiser's step: of every rank, and of every micro-batch.

Data-parallel training averages the ranks' gradients. If each rank gave the mean over its own
targets, a target on a rank with few of them would weigh more than one on a rank with many. So each
rank gives its sum, divided by the count of all ranks and multiplied by their number: the average of
that is the mean over the global batch, and one process with the same batch has the same gradient.

With an accumulated gradient the same holds over the micro-batches of a step, which Lightning
averages too. The counts of those to come are known because `data/loaders.py` fetches the batches of
a step together; so there is one gradient, whole at any time, for several losses with counts of
their own, and nothing is left to be done to it before it is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def num_ranks() -> int:
    """Processes that train together; 1 where nothing was set up."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in the ranks' order; all ranks have to call it.

    Args:
        value: Anything that can be pickled.
    """
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def global_means(
    means: Mapping[str, Tensor], counts: Mapping[str, Tensor | float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Turns means over this rank's targets into shares of the means over all ranks' targets.

    One all-reduce for all of them; nothing waits for the device.

    Args:
        means: Name -> mean over this rank's targets, a scalar with a gradient. Every rank has to
            give the same names.
        counts: Name -> how many targets, or their summed weight, the mean is of.

    Returns:
        The shares, whose average over the ranks is the global mean, with the gradient that goes
        with it; and the global means themselves, without gradient. On one rank both are `means`.
    """
    alone = {name: mean.detach() for name, mean in means.items()}
    if num_ranks() == 1:
        return dict(means), alone
    values_N = torch.stack([value.double() for value in alone.values()])
    counts_N = torch.stack([_scalar(counts[name], values_N.device) for name in alone])
    table_2N = torch.stack([values_N * counts_N, counts_N])
    torch.distributed.all_reduce(table_2N)
    totals_N = table_2N[1].clamp(min=1e-8)
    shares_N = (counts_N * num_ranks() / totals_N).float()
    shares = {
        name: mean * share for (name, mean), share in zip(means.items(), shares_N, strict=True)
    }
    wholes_N = (table_2N[0] / totals_N).float()
    return shares, dict(zip(alone, wholes_N, strict=True))


class AccumulatedStep:
    """The micro-batches of an optimiser's step: what their losses share, and what is logged.

    Args:
        totals: Name of a loss -> how many targets, or their summed weight, all micro-batches have
            on this rank. Every rank has to give the same names.
        num_batches: What Lightning divides each micro-batch's loss by.
        device: Where to work.
    """

    def __init__(
        self, totals: Mapping[str, Tensor | float], *, num_batches: int, device: torch.device
    ) -> None:
        self.num_batches = num_batches
        totals_N = torch.stack([_scalar(total, device) for total in totals.values()])
        if num_ranks() > 1:
            torch.distributed.all_reduce(totals_N)
        self._totals = dict(zip(totals, totals_N, strict=True))
        # Name -> sum of what is averaged, and of its weight: over all ranks, and on this one.
        self._sums: dict[str, Tensor] = {}
        self._figures: dict[str, Tensor] = {}

    def means(
        self, means: Mapping[str, Tensor], counts: Mapping[str, Tensor | float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A micro-batch's `global_means`, for the whole step.

        Args:
            means: Name -> mean over this rank's targets of the micro-batch, with a gradient.
            counts: Name -> how many targets, or their summed weight, the mean is of.

        Returns:
            The shares, whose average over ranks and micro-batches is the mean over the step; and
            the means over the step's micro-batches so far, of all ranks, without gradient.
        """
        device = next(iter(self._totals.values())).device
        counts_N = torch.stack([_scalar(counts[name], device) for name in means])
        values_N = torch.stack([mean.detach().double() for mean in means.values()])
        table_2N = torch.stack([values_N * counts_N, counts_N])
        if num_ranks() > 1:
            torch.distributed.all_reduce(table_2N)
        shares, wholes = {}, {}
        for number, (name, mean) in enumerate(means.items()):
            share = counts_N[number] * num_ranks() * self.num_batches
            shares[name] = mean * (share / self._totals[name].clamp(min=1e-8)).float()
            wholes[name] = _add(self._sums, name, table_2N[:, number])
        return shares, wholes

    def figures(
        self, figures: Mapping[str, Any], weights: Mapping[str, Tensor | float]
    ) -> tuple[dict[str, Any], dict[str, Tensor | float]]:
        """Figures of this rank over the step's micro-batches so far, and their weights.

        Args:
            figures: Name -> scalar of a micro-batch. Micro-batches may have different names.
            weights: Name -> what the scalar is the mean of. One that is left out is taken as that
                of the whole step.

        Returns:
            The means, also of names that this micro-batch lacks, and their summed weights.
        """
        alone = {name: value for name, value in figures.items() if name not in weights}
        for name, weight in weights.items():
            if name in figures:
                device = next(iter(self._totals.values())).device
                weight = _scalar(weight, device)
                value = _scalar(figures[name], device)
                _add(self._figures, name, torch.stack([value * weight, weight]))
        means = {name: _ratio(sums_2) for name, sums_2 in self._figures.items()}
        summed: dict[str, Tensor | float] = {
            name: sums_2[1] for name, sums_2 in self._figures.items()
        }
        return alone | means, summed


def _add(table: dict[str, Tensor], name: str, sums_2: Tensor) -> Tensor:
    table[name] = table[name] + sums_2 if name in table else sums_2
    return _ratio(table[name])


def _ratio(sums_2: Tensor) -> Tensor:
    return (sums_2[0] / sums_2[1].clamp(min=1e-8)).float()


def mean_over_ranks(
    values: Mapping[str, Tensor | float],
    weights: Mapping[str, Tensor | float],
    *,
    device: torch.device,
) -> dict[str, Tensor]:
    """Weighted means over the ranks that have a value of a name; all ranks have to call it.

    Args:
        values: Name -> scalar. Ranks may have different names.
        weights: Name -> weight of this rank's value; 1 where there is none.
        device: Where the collective works.

    Returns:
        Name -> mean, for every name of any rank; the same on each.
    """
    names = sorted(set().union(*gather(sorted(values))))
    zero = torch.zeros(2, dtype=torch.float64, device=device)
    rows = []
    for name in names:
        row = zero
        if name in values:
            value = _scalar(values[name], device)
            weight = _scalar(weights.get(name, 1.0), device)
            row = torch.stack([value * weight, weight])
        rows.append(row)
    table_N2 = torch.stack(rows)
    if num_ranks() > 1:
        torch.distributed.all_reduce(table_N2)
    means_N = table_N2[:, 0] / table_N2[:, 1].clamp(min=1e-8)
    return dict(zip(names, means_N.float(), strict=True))


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A float64 scalar; a number is filled in on the device, which waits for nothing."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
