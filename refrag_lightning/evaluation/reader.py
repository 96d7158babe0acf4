"""Reader: a model with its tokenizer, asked for likelihoods and answers under any reading.

Shape suffixes as in `text/batch.py`; P targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refrag_lightning.evaluation.readings import (
    Kind,
    Reading,
    RowBank,
    Segments,
    build,
    control_projectors,
    documents_of,
    projector_of,
)
from refrag_lightning.model import RefragModel
from refrag_lightning.model.answering import answer
from refrag_lightning.model.losses import target_losses
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

Banks = dict[int, RowBank]
"""Row states by rate."""


class Likelihood(NamedTuple):
    """What the targets of B texts cost.

    Attributes:
        nats_B: Their negative log-likelihood in each text.
        targets_B: How many they are.
        hits_B: How many of them are the most likely token.
        positions_B: Positions that the decoder reads before the first of them.
    """

    nats_B: Tensor
    targets_B: Tensor
    hits_B: Tensor
    positions_B: Tensor


class Reader:
    """A model and its tokenizer.

    Args:
        model: A REFRAG model, or a causal language model alone, which has no rows.
        tokenizer: Its tokenizer.
        seed: Of the control with a random projector.
    """

    def __init__(
        self, model: RefragModel | PlainModel, tokenizer: RefragTokenizer, *, seed: int = 0
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self._controls: dict[Kind, torch.nn.Module] = {}

    @property
    def has_rows(self) -> bool:
        """Whether the model can read rows."""
        return isinstance(self.model, RefragModel)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def difference(self, other: Reader, *, documents: bool) -> str | None:
        """What keeps another model from reading the same segments as it learnt, or None.

        Args:
            other: The other model.
            documents: Whether it is to read documents.
        """
        mine, its = self.tokenizer, other.tokenizer
        if mine.plain_decoder.fingerprint != its.plain_decoder.fingerprint:
            return "tokenizer"
        if mine.decoder.chat_template != its.decoder.chat_template:
            return "chat template"
        if documents and (mine.header, mine.footer) != (its.header, its.footer):
            return "header or footer around documents"
        return None

    def can_read(self, reading: Reading) -> bool:
        """Whether a reading is possible for the model, at a rate that it has."""
        if not self.has_rows:
            return not reading.has_rows
        return reading.rate is None or reading.rate in self.tokenizer.rates

    @torch.no_grad()
    def encode(self, documents: Sequence[str], readings: Sequence[Reading]) -> Banks:
        """Encodes documents once for each rate that some reading needs rows of.

        Args:
            documents: Every document that a batch of these readings will hold.
            readings: The readings.
        """
        rates = dict.fromkeys(r.rate for r in readings if r.has_rows and r.rate is not None)
        if not rates:
            return {}
        assert isinstance(self.model, RefragModel)
        options: dict[str, Any] = {"documents": documents, "device": self.device}
        return {k: RowBank(self.model, self.tokenizer, rate=k, **options) for k in rates}

    @torch.no_grad()
    def likelihood(
        self,
        texts: Sequence[Segments],
        reading: Reading,
        *,
        banks: Banks | None = None,
        others: Sequence[Sequence[str]] = (),
        questions: Sequence[str] = (),
    ) -> Likelihood:
        """What the segments with `train` cost, in one pass with the right tokens before each.

        Args:
            texts: Segments of B texts.
            reading: How their documents are read.
            banks: What `encode` gave for their documents; encoded here if None.
            others: For the reading `other`, each text's strange documents.
            questions: For readings that choose rows, what each text asks.

        Raises:
            ValueError: If a text has no target. (One that opens a text is none.)
        """
        batch = self._batch(texts, reading, banks, others, questions, padding_side="right")
        labels_BS = batch["labels"]
        wanted_BS = labels_BS != -100
        with self._projector(reading):
            hidden_BSD = self.model.hidden(batch)
        # Position s predicts the token at s + 1.
        texts_P, places_P = wanted_BS[:, 1:].nonzero(as_tuple=True)
        targets_P = labels_BS[texts_P, places_P + 1]
        losses = target_losses(self.model.head, hidden_BSD[texts_P, places_P], targets_P)
        zeros_B = torch.zeros(len(texts), dtype=torch.float32, device=labels_BS.device)
        targets_B = torch.bincount(texts_P, minlength=len(texts))
        if not bool((targets_B > 0).all()):
            raise ValueError(f"text {int(targets_B.argmin())} of the batch has no target")
        return Likelihood(
            nats_B=zeros_B.index_add(0, texts_P, losses.nll_P.float()),
            targets_B=targets_B,
            hits_B=zeros_B.index_add(0, texts_P, losses.hits_P.float()).long(),
            # Padding stands on the right, so the first target's place is what comes before it.
            positions_B=wanted_BS.int().argmax(1),
        )

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Segments],
        reading: Reading,
        *,
        banks: Banks | None = None,
        others: Sequence[Sequence[str]] = (),
        questions: Sequence[str] = (),
        max_new_tokens: int = 32,
        **options: Any,
    ) -> list[str]:
        """Answers of `answering.answer`, greedy ones unless the options say otherwise.

        Args:
            prompts: Segments of B texts up to the place where the answer goes.
            reading: How their documents are read.
            banks: As in `likelihood`.
            others: As in `likelihood`.
            questions: As in `likelihood`.
            max_new_tokens: Most tokens of an answer.
            options: Further ones of `answer`.
        """
        batch = self._batch(prompts, reading, banks, others, questions, padding_side="left")
        options["max_new_tokens"] = max_new_tokens
        with self._projector(reading):
            return answer(self.model, self.tokenizer, batch, **options)

    def _batch(
        self,
        texts: Sequence[Segments],
        reading: Reading,
        banks: Banks | None,
        others: Sequence[Sequence[str]],
        questions: Sequence[str],
        *,
        padding_side: Any,
    ) -> RefragBatch:
        batch, segments = build(
            texts,
            reading,
            self.tokenizer,
            others=others,
            questions=questions,
            padding_side=padding_side,
        )
        if reading.has_rows:
            assert reading.rate is not None
            if banks is None:
                documents = [d for text in segments for d in documents_of(text)]
                banks = self.encode(documents, [reading])
            batch = banks[reading.rate].fill(batch, segments)
        return batch.to(self.device)

    def _projector(self, reading: Reading) -> Any:
        if not isinstance(self.model, RefragModel):
            return nullcontext()
        if not self._controls:
            self._controls = control_projectors(self.model, seed=self.seed)
        return projector_of(self.model, reading, self._controls)


def without_end(text: Segments) -> list[Segment]:
    """A text whose targets are its words alone, without the control token that ends a turn."""
    return [replace(s, train=False) if s.train and s.kind == "template" else s for s in text]
