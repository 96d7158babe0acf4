"""Sampling for each request of a batch by its own settings and its own random numbers.

Drawing from a softmax is the same as adding Gumbel noise to its logits and taking the largest
(Gumbel 1954; Maddison et al. 2014). Each request adds noise from a generator of its own, so what
is drawn for it does not depend on who else is in the batch, and the batch is decoded greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from refrag_lightning.inference.request import Sampling


class Sampler:
    """Changes one request's scores so that the largest is the token to take.

    Args:
        sampling: The request's settings.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._steps = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        self.seed: int | None = None
        if sampling.repetition_penalty != 1:
            penalty = float(sampling.repetition_penalty)
            self._steps.append(RepetitionPenaltyLogitsProcessor(penalty))
        if sampling.is_greedy:
            return
        if sampling.temperature != 1:
            self._steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._steps.append(TopPLogitsWarper(sampling.top_p))
        # On the CPU: the same seed gives the same answer on every device.
        self._generator = torch.Generator()
        if sampling.seed is None:
            # 53 bits: JSON readers keep whole numbers up to there.
            self.seed = torch.Generator().seed() % (1 << 53)
        else:
            self.seed = sampling.seed
        self._generator.manual_seed(self.seed)

    @property
    def is_idle(self) -> bool:
        """Whether the scores stay as they are."""
        return not self._steps and self._generator is None

    def __call__(self, tokens_1N: Tensor, scores_1V: Tensor) -> Tensor:
        """The changed scores (1, V) after the answer's tokens so far (1, N)."""
        scores_1V = self._steps(cast(Any, tokens_1N), cast(Any, scores_1V))
        if self._generator is None:
            return scores_1V
        # -log of an exponential variable has the Gumbel distribution.
        waits = torch.empty(scores_1V.shape).exponential_(generator=self._generator)
        smallest = torch.finfo(waits.dtype).tiny
        return scores_1V - waits.clamp_(min=smallest).log_().to(scores_1V.device)


class BatchSampler(LogitsProcessor):
    """The samplers of a batch, for transformers' `generate` with `do_sample=False`.

    Args:
        samplers: One for each request.
        is_done: Says whether a request's answer is over, so that its scores do not matter.
    """

    def __init__(self, samplers: Sequence[Sampler], is_done: Callable[[int], bool]) -> None:
        self._samplers = samplers
        self._is_done = is_done

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The changed scores (B, V) after the answers' tokens so far (B, N)."""
        for line, sampler in enumerate(self._samplers):
            if not sampler.is_idle and not self._is_done(line):
                one = slice(line, line + 1)
                scores[one] = sampler(input_ids[one], scores[one])
        return scores
