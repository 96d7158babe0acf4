"""Decoding a batch: transformers' `generate`, each token handed over as it comes.

Requests of a batch start together and end apart: by a token that ends the answer, by a stop string,
by their own number of tokens, or because they were cancelled. The batch ends with the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from refrag_lightning.inference.sampling import BatchSampler, Sampler
from refrag_lightning.inference.writing import TextWriter
from refrag_lightning.model.answering import answer_settings

if TYPE_CHECKING:
    from refrag_lightning.model.plain import PlainModel
    from refrag_lightning.model.refrag import RefragModel


@dataclass(frozen=True)
class Line:
    """One request's line of a batch.

    Attributes:
        writer: Takes its tokens.
        sampler: Chooses them.
        is_cancelled: Asked before each token is taken.
    """

    writer: TextWriter
    sampler: Sampler
    is_cancelled: Callable[[], bool]


@torch.no_grad()
def decode(
    model: RefragModel | PlainModel,
    batch: Mapping[str, Tensor],
    lines: Sequence[Line],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    on_prefill: Callable[[], None] = lambda: None,
    on_token: Callable[[int], None] = lambda line: None,
    on_finish: Callable[[int], None] = lambda line: None,
) -> None:
    """Answers the requests of a batch.

    Args:
        model: The model.
        batch: Its tensors, on the model's device.
        lines: What becomes of each request's tokens; each writer has its `finish` afterwards.
        max_new_tokens: Most tokens of the longest answer.
        end_ids: Tokens that end an answer; transformers pads behind them.
        on_prefill: Called when the prompt is read.
        on_token: Called with the line when a token was taken, before its text is said.
        on_finish: Called with the line when its answer is over; others may go on.
    """
    watch = _Watch(lines, on_token, on_finish)
    model.generate(
        **batch,
        # The pipeline's window, which may be another one, was looked at.
        checks_window=False,
        # The samplers draw, each for its request.
        generation_config=answer_settings(end_ids, max_new_tokens=max_new_tokens),
        logits_processor=LogitsProcessorList(
            [
                _Prefill(on_prefill),
                BatchSampler([line.sampler for line in lines], watch.is_done),
            ]
        ),
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    for line in lines:
        assert line.writer.finish is not None


class _Watch(StoppingCriteria):
    """Hands tokens to the writers, and says which lines are over."""

    def __init__(
        self,
        lines: Sequence[Line],
        on_token: Callable[[int], None],
        on_finish: Callable[[int], None],
    ) -> None:
        self._lines = lines
        self._on_token = on_token
        self._on_finish = on_finish

    def is_done(self, line: int) -> bool:
        return self._lines[line].writer.finish is not None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        for number, (line, token) in enumerate(zip(self._lines, tokens, strict=True)):
            if line.writer.finish is not None:
                continue
            if line.is_cancelled():
                line.writer.end("cancelled")
            else:
                self._on_token(number)
                line.writer.write(token)
            if line.writer.finish is not None:
                self._on_finish(number)
        done = [line.writer.finish is not None for line in self._lines]
        return torch.tensor(done, device=input_ids.device)


class _Prefill(LogitsProcessor):
    """Tells when the first token's logits are there."""

    def __init__(self, on_prefill: Callable[[], None]) -> None:
        self._on_prefill: Callable[[], None] | None = on_prefill

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._on_prefill is not None:
            if scores.device.type == "cuda":
                torch.cuda.synchronize(scores.device)
            self._on_prefill()
            self._on_prefill = None
        return scores
