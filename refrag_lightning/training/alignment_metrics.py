"""What is measured of an alignment, on held-out text and beside students that know nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from refrag_lightning.model.losses import explained_variance

STUDENTS = {
    "student": "projected vectors",
    "zero": "zero vectors",
    "mean": "the mean embedding",
    "shuffled": "shuffled vectors",
}
"""What is measured, and what each reads. All but the first know nothing of the place they stand
at: the zero vector, the decoder's mean embedding, the projected vectors of other places."""


def replaced(student_BSD: Tensor, slot_ids_BS: Tensor, *, by: str, mean_D: Tensor) -> Tensor:
    """The student's input with other vectors at its slots.

    Args:
        student_BSD: (B, S, D) what the decoder reads.
        slot_ids_BS: (B, S), -1 where no vector stands.
        by: `student` (nothing changes) or another of `STUDENTS`.
        mean_D: (D,) the decoder's mean embedding.
    """
    if by == "student":
        return student_BSD
    at_slots_BS = slot_ids_BS >= 0
    other_BSD = torch.zeros_like(student_BSD)
    if by == "mean":
        other_BSD = mean_D.to(student_BSD.dtype).expand_as(student_BSD)
    elif by == "shuffled":
        vectors_ND = student_BSD[at_slots_BS]
        # Each place gets a vector from half a batch away, so none keeps its own.
        other_BSD = other_BSD.masked_scatter(
            at_slots_BS[..., None], vectors_ND.roll(len(vectors_ND) // 2, dims=0)
        )
    return torch.where(at_slots_BS[..., None], other_BSD, student_BSD)


class AlignmentMetrics(Metric):
    """Sums over batches and ranks, so that every span counts the same.

    `compute` gives

    - `mse`: mean over spans and dimensions;
    - `explained_variance`: 1 - MSE / MSE of the mean embedding;
    - `r2`: the same against the mean of the measured text's own span means, which is harder to
      beat, since frequent tokens lie far from the vocabulary's mean;
    - `nearest`: share of one-token spans whose vector lies nearest to the right embedding;
    - `kld`: nats a span;
    - `ce`: nats a span, against the teacher's most likely token;
    - `top1`: share of spans after which student and teacher expect the same token;
    - `coverage`: share of the decoder tokens that lie in a span;
    - `granularity`: share of the decoder tokens in spans of at most two tokens a side.

    What no span counted for is left out.
    """

    full_state_update = False
    error: Tensor
    mean_error: Tensor
    teacher_sum: Tensor
    teacher_square: Tensor
    spans: Tensor
    nearest: Tensor
    one_token: Tensor
    kld: Tensor
    ce: Tensor
    top1: Tensor
    pairs: Tensor
    coverage: Tensor
    granularity: Tensor
    tokens: Tensor
    _STATES = (
        "error",
        "mean_error",
        "teacher_sum",
        "teacher_square",
        "spans",
        "nearest",
        "one_token",
        "kld",
        "ce",
        "top1",
        "pairs",
        "coverage",
        "granularity",
        "tokens",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self._STATES:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        student_PD: Tensor,
        teacher_PD: Tensor,
        mean_D: Tensor,
        *,
        nearest_hits: Tensor,
        num_one_token: Tensor,
        kld: Tensor,
        ce: Tensor,
        top1_hits: Tensor,
        num_pairs: int,
        coverage: float,
        granularity: float,
        num_tokens: int,
    ) -> None:
        """Adds a batch.

        Args:
            student_PD: (P, D) span means of the student's vectors.
            teacher_PD: (P, D) span means of the decoder's embeddings.
            mean_D: (D,) the decoder's mean embedding.
            nearest_hits: Number of one-token spans with the right nearest embedding.
            num_one_token: Number of one-token spans.
            kld: Mean KLD over the pairs, in nats.
            ce: Mean cross-entropy over the pairs, in nats.
            top1_hits: Number of pairs whose most likely tokens agree.
            num_pairs: Spans that the decoder read.
            coverage: Share of the decoder tokens in a span.
            granularity: Share of them in spans of at most two tokens a side.
            num_tokens: Decoder tokens.
        """
        # Not in place: after a validation the sums may be inference tensors.
        self.error = self.error + (student_PD - teacher_PD).square().mean(-1).sum().double()
        self.mean_error = self.mean_error + (mean_D - teacher_PD).square().mean(-1).sum().double()
        self.teacher_sum = self.teacher_sum + teacher_PD.double().sum(0)
        self.teacher_square = self.teacher_square + teacher_PD.double().square().mean(-1).sum()
        self.spans = self.spans + len(student_PD)
        self.nearest = self.nearest + nearest_hits
        self.one_token = self.one_token + num_one_token
        self.kld = self.kld + kld.double() * num_pairs
        self.ce = self.ce + ce.double() * num_pairs
        self.top1 = self.top1 + top1_hits
        self.pairs = self.pairs + num_pairs
        self.coverage = self.coverage + coverage * num_tokens
        self.granularity = self.granularity + granularity * num_tokens
        self.tokens = self.tokens + num_tokens

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, each a scalar."""
        figures = {}
        if self.spans > 0:
            figures["mse"] = self.error / self.spans
            figures["explained_variance"] = explained_variance(self.error, self.mean_error)
            own_mean = (self.teacher_sum / self.spans).square().mean()
            variance = self.teacher_square / self.spans - own_mean
            figures["r2"] = explained_variance(figures["mse"], variance)
        if self.one_token > 0:
            figures["nearest"] = self.nearest / self.one_token
        if self.pairs > 0:
            figures["kld"] = self.kld / self.pairs
            figures["ce"] = self.ce / self.pairs
            figures["top1"] = self.top1 / self.pairs
        if self.tokens > 0:
            figures["coverage"] = self.coverage / self.tokens
            figures["granularity"] = self.granularity / self.tokens
        return {name: value.float() for name, value in figures.items()}


def report(figures: dict[str, dict[str, Tensor]], *, first: dict[str, Tensor] | None) -> str:
    """A table of the students, one a line.

    Args:
        figures: For each student what `AlignmentMetrics.compute` gave.
        first: The student's figures on the validation text before the first step, if known.
    """
    columns = ("explained_variance", "r2", "nearest", "kld", "top1")
    lines = [f"{'student reads':<22}" + "".join(f"{name:>20}" for name in columns)]
    for name, row in figures.items():
        lines.append(_line(STUDENTS[name], row, columns))
    if first is not None:
        lines.append(_line("before step 1 (val)", first, columns))
    return "\n".join(lines)


def _line(label: str, figures: dict[str, Tensor], columns: tuple[str, ...]) -> str:
    cells = (f"{figures[c].item():>20.3f}" if c in figures else f"{'-':>20}" for c in columns)
    return f"{label:<22}" + "".join(cells)
