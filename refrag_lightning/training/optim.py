"""AdamW with one learning rate a part, and warm-up followed by a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def part_of(name: str) -> str:
    """The part a parameter belongs to: `model.projector.linear.weight` -> `projector`.

    The query of attention pooling (`model.pool.query`) belongs to the projector.
    """
    pieces = name.split(".")
    part = pieces[1] if pieces[0] == "model" and len(pieces) > 2 else pieces[0]
    return "projector" if part == "pool" else part


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float | Mapping[str, float],
    weight_decay: float,
) -> list[dict]:
    """Groups the parameters that train by part and by whether they decay.

    Biases, norms, scalars and other parameters of fewer than two dimensions do not decay.

    Args:
        named_parameters: (name, parameter) pairs; frozen ones are left out.
        lr: One learning rate for everything, or one a part (see `part_of`).
        weight_decay: Of matrices.

    Returns:
        AdamW parameter groups in a fixed order, each with a `name` such as `projector/decay`.

    Raises:
        ValueError: If nothing trains, if a part that trains has no learning rate, or if a learning
            rate names a part that is not there.
    """
    # An optimiser's kernel takes whole parameters or shards, not both at once.
    members: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    parts: set[str] = set()
    for name, parameter in named_parameters:
        part = part_of(name)
        parts.add(part)
        if parameter.requires_grad:
            key = (part, parameter.ndim >= 2, isinstance(parameter, DTensor))
            members.setdefault(key, []).append(parameter)
    if not members:
        raise ValueError("nothing trains: every parameter of the model is frozen")
    if isinstance(lr, Mapping):
        unknown = sorted(set(lr) - parts)
        if unknown:
            raise ValueError(f"lr names {unknown[0]!r}, the model's parts are {sorted(parts)}")
        missing = sorted({part for part, *_ in members} - set(lr))
        if missing:
            raise ValueError(f"lr has no rate for {missing[0]!r}, which trains (lr: {dict(lr)})")
    return [
        {
            "params": parameters,
            "name": f"{part}/{'decay' if decays else 'no_decay'}",
            "lr": lr[part] if isinstance(lr, Mapping) else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (part, decays, _), parameters in members.items()
    ]


def adamw(groups: list[dict], *, betas: tuple[float, float], eps: float = 1e-8) -> AdamW:
    """AdamW over `groups`, in one fused kernel where the devices have one (CPU and CUDA)."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(groups, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"} or None)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, floor: float) -> float:
    """The factor on the learning rate at `step`, counted from 0.

    It rises in equal steps to 1 at step `warmup_steps`, then falls along half a cosine
    (Loshchilov and Hutter, SGDR, 2017) to `floor` at `total_steps`, and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(warmup: int | float, *, total_steps: int) -> int:
    """Steps of warm-up: `warmup` itself, or that share of `total_steps` if it is a fraction.

    Raises:
        ValueError: If `warmup` is negative, or a float above 1.
    """
    if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
        raise ValueError(f"warmup ({warmup}) must be a number of steps or a share between 0 and 1")
    return round(warmup * total_steps) if isinstance(warmup, float) else warmup


class WarmupCosine(LambdaLR):
    """`warmup_cosine` as a scheduler stepped once an optimiser step.

    Args:
        optimizer: The optimiser.
        warmup: Steps (int) or share of `total_steps` (float).
        total_steps: Optimiser steps of the whole run.
        floor: Factor at the end.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup: int | float,
        total_steps: int,
        floor: float,
    ) -> None:
        steps = warmup_steps(warmup, total_steps=total_steps)

        def factor(step: int) -> float:
            return warmup_cosine(step, warmup_steps=steps, total_steps=total_steps, floor=floor)

        super().__init__(optimizer, factor)

    def apply(self, base_lrs: list[float]) -> None:
        """Sets the rates of the present step from `base_lrs`, whatever a checkpoint restored."""
        self.base_lrs = list(base_lrs)
        rates = [
            base * factor(self.last_epoch)
            for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(self.optimizer.param_groups, base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        self._last_lr = rates
