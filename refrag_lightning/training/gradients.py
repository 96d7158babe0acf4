"""Clipping of gradients, whole or in shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_by_norm(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales the gradients down to a total norm of `max_norm`.

    Args:
        parameters: Any mix of whole parameters and shards. All ranks of the shards have to call it.
        max_norm: The largest norm; None leaves the gradients as they are.

    Returns:
        The total norm before, a plain scalar, the same on every rank.
    """
    shards = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    local = [shard.to_local() for shard in shards]
    # Of a shard each rank has its own part; what is whole is the same on every rank.
    square = nn.utils.get_total_norm(local).square()
    torch.distributed.all_reduce(square, group=shards[0].device_mesh.get_group())
    if whole:
        square = square + nn.utils.get_total_norm(whole).square()
    norm = square.sqrt()
    if max_norm is not None:
        # As torch.nn.utils.clip_grad_norm_ has it.
        torch._foreach_mul_([*local, *whole], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def clip_by_value(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Cuts every number of the gradients to between -`limit` and `limit`."""
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.clamp_(-limit, limit)
