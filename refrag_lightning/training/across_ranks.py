"""Means over every rank's share of a global batch.

Data-parallel training averages the ranks' gradients. If each rank gave the mean over its own
targets, a target on a rank with few of them would weigh more than one on a rank with many. So each
rank gives its sum, divided by the count of all ranks and multiplied by their number: the average of
that is the mean over the global batch, and one process with the same batch has the same gradient.

With an accumulated gradient this holds for each micro-batch; micro-batches weigh the same, as they
do on one process.
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
    means: Mapping[str, Tensor], counts: Mapping[str, Tensor | int]
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
