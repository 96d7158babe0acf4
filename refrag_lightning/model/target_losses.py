"""Losses on given target tokens, without ever holding all their logits at once.

A batch of 8,192 targets and a vocabulary of 150,000 would take 5 GB for the logits in float32, and
as much again for each of their softmax, gradient and teacher. Here the head is applied to some
targets at a time, and applied again in the backward pass (activation checkpointing; Chen et al.
2016, arXiv 1604.06174), so only one such slice exists at any time. The last slice is the first that
the backward pass comes to, so its logits are kept: nothing is computed twice where one slice is
all there is.

Shapes: P targets, C targets of a slice, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


class TargetLosses(NamedTuple):
    """What `target_losses` gives, each (P,) in float32.

    Attributes:
        nll_P: Negative log-likelihood of each target in nats.
        kl_P: KL(teacher || student) at each target in nats; None without a teacher.
        hits_P: 1 where the target is the student's most likely token, else 0; no gradient.
    """

    nll_P: Tensor
    kl_P: Tensor | None
    hits_P: Tensor


def target_losses(
    head: Head,
    student_PD: Tensor,
    targets_P: Tensor,
    *,
    teacher_PD: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> TargetLosses:
    """Losses of each target, from the final states that predict them.

    Args:
        head: Final states (C, D) to logits (C, V), such as `RefragModel.head`.
        student_PD: Final states at the positions that predict the targets, (P, D).
        targets_P: Token ids, (P,).
        teacher_PD: The teacher's final states for the same targets, (P, D_teacher). It gets no
            gradient.
        teacher_head: The teacher's head; `head` if None.
        temperature: Divides both sides' logits in the divergence, which is multiplied by its square
            so that its gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531).
        chunk_size: Targets whose logits exist at the same time.

    Returns:
        The losses; empty tensors, still connected to the states, without targets.

    Raises:
        ValueError: If the temperature is not positive, `chunk_size` is less than 1, or the numbers
            of states and targets differ.
    """
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive")
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    num_targets = targets_P.shape[0]
    for name, tensor in (("student_PD", student_PD), ("teacher_PD", teacher_PD)):
        if tensor is not None and tensor.shape[0] != num_targets:
            raise ValueError(f"{name} holds {tensor.shape[0]} states for {num_targets} targets")

    def of_slice(
        student_CD: Tensor, targets_C: Tensor, teacher_CD: Tensor | None
    ) -> tuple[Tensor, ...]:
        logits_CV = head(student_CD).float()
        nll_C = F.cross_entropy(logits_CV, targets_C, reduction="none")
        hits_C = (logits_CV.argmax(-1) == targets_C).float()
        if teacher_CD is None:
            return nll_C, hits_C
        with torch.no_grad():
            teacher_CV = (teacher_head or head)(teacher_CD).float() / temperature
            teacher_CV = F.log_softmax(teacher_CV, dim=-1)
        student_CV = F.log_softmax(logits_CV / temperature, dim=-1)
        kl_CV = F.kl_div(student_CV, teacher_CV, reduction="none", log_target=True)
        return nll_C, hits_C, kl_CV.sum(-1) * temperature**2

    slices = []
    # At least one slice, so that no targets give empty tensors.
    for start in range(0, max(num_targets, 1), chunk_size):
        part = slice(start, start + chunk_size)
        teacher_CD = None if teacher_PD is None else teacher_PD[part].detach()
        arguments = (student_PD[part], targets_P[part], teacher_CD)
        is_last = start + chunk_size >= num_targets
        if torch.is_grad_enabled() and not is_last:
            slices.append(
                checkpoint(of_slice, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            slices.append(of_slice(*arguments))
    nll_P, hits_P, *kl = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return TargetLosses(nll_P, kl[0] if kl else None, hits_P.detach())
