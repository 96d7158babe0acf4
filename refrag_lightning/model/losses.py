"""Losses and measures on tensors, computed in float32, each with its reduction stated.

Shapes: N and M tokens or vectors in all, P spans or pairs, V vocabulary, D hidden.

`target_losses` (in `target_losses.py`) is the one for token targets of whole texts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refrag_lightning.model.target_losses import TargetLosses, target_losses

__all__ = [
    "TargetLosses",
    "argmax_cross_entropy",
    "explained_variance",
    "nearest_embedding",
    "next_token_loss",
    "segment_mean",
    "span_kld",
    "target_losses",
]


def segment_mean(x_ND: Tensor, ids_N: Tensor, num_segments: int) -> Tensor:
    """Mean of the vectors of each segment.

    Args:
        x_ND: Vectors, (N, D).
        ids_N: Segment of each vector, (N,), in [0, num_segments); -1 leaves a vector out.
        num_segments: P.

    Returns:
        Means (P, D) in float32; zeros for a segment without vectors.
    """
    # One spare segment takes what is left out, so no boolean index has to wait for the device.
    index = torch.where(ids_N >= 0, ids_N, num_segments)
    sums = x_ND.new_zeros((num_segments + 1, x_ND.shape[-1]), dtype=torch.float32)
    sums = sums.index_add(0, index, x_ND.float())
    counts = torch.zeros(num_segments + 1, device=x_ND.device)
    counts = counts.index_add(0, index, torch.ones_like(index, dtype=torch.float32))
    return (sums / counts.clamp(min=1)[:, None])[:-1]


def span_kld(
    student_logits_PV: Tensor,
    teacher_logits_PV: Tensor,
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
) -> Tensor:
    """Kullback-Leibler divergence between two next-token distributions.

    `forward` is KL(teacher || student), which covers the teacher's modes; `reverse` is
    KL(student || teacher), which keeps to one. The result is multiplied by temperature squared,
    so that its gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_logits_PV: (P, V).
        teacher_logits_PV: (P, V).
        temperature: Divides both sides' logits.
        direction: `forward` or `reverse`.

    Returns:
        Scalar: sum over the vocabulary, mean over the pairs ("batchmean"), times temperature
        squared; 0 (with gradient 0) where there is no pair.

    Raises:
        ValueError: A temperature that is not positive, or an unknown direction.
    """
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction ({direction!r}) must be one of forward, reverse")
    student = F.log_softmax(student_logits_PV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits_PV.float() / temperature, dim=-1)
    target, other = (teacher, student) if direction == "forward" else (student, teacher)
    pair_P = F.kl_div(other, target, log_target=True, reduction="none").sum(-1)
    return _mean(pair_P) * temperature**2


def argmax_cross_entropy(student_logits_PV: Tensor, teacher_logits_PV: Tensor) -> Tensor:
    """Cross-entropy of the student against the teacher's most likely token.

    Args:
        student_logits_PV: (P, V).
        teacher_logits_PV: (P, V).

    Returns:
        Scalar: mean over the pairs; 0 where there is none.
    """
    pair_P = F.cross_entropy(
        student_logits_PV.float(), teacher_logits_PV.argmax(-1), reduction="none"
    )
    return _mean(pair_P)


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of each position's logits against the next position's label.

    Args:
        logits_BSV: (B, S, V).
        labels_BS: (B, S), not shifted; `ignore_index` where no loss is taken.
        ignore_index: The label that is left out.

    Returns:
        Scalar: mean over the labels that count; 0 (with gradient 0) where none does.
    """
    logits = logits_BSV[:, :-1].flatten(0, 1).float()
    labels = labels_BS[:, 1:].flatten()
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def explained_variance(mse: Tensor, mse_of_mean: Tensor) -> Tensor:
    """Share of the variance that a prediction explains: 1 - MSE / MSE(mean).

    Args:
        mse: Error of the prediction, a scalar.
        mse_of_mean: Error of always predicting the mean embedding, a scalar.
    """
    return 1 - mse / mse_of_mean


@torch.no_grad()
def nearest_embedding(vectors_PD: Tensor, table_VD: Tensor, *, slice_size: int = 8192) -> Tensor:
    """The row of a table that lies nearest to each vector (Euclidean).

    Args:
        vectors_PD: (P, D).
        table_VD: (V, D), the embedding outputs of the vocabulary.
        slice_size: Rows of the table compared at once; no (P, V, D) tensor is built, and no more
            than (P, slice_size) distances stand at a time.

    Returns:
        Indices (P,); the lowest index where several are equally near.
    """
    vectors = vectors_PD.float()
    best = vectors.new_full((vectors.shape[0],), float("inf"))
    ids = torch.zeros(vectors.shape[0], dtype=torch.long, device=vectors.device)
    # Autocast would round the distances to bfloat16.
    with torch.autocast(vectors.device.type, enabled=False):
        for start in range(0, table_VD.shape[0], slice_size):
            rows = table_VD[start : start + slice_size].float()
            # |v - t|^2 = |v|^2 - 2 v.t + |t|^2, and |v|^2 does not change the order.
            distances = torch.addmm(rows.square().sum(-1), vectors, rows.T, alpha=-2)
            value, index = distances.min(dim=-1)
            closer = value < best
            best = torch.where(closer, value, best)
            ids = torch.where(closer, index + start, ids)
    return ids


def _mean(values_P: Tensor) -> Tensor:
    return values_P.sum() / max(len(values_P), 1)
