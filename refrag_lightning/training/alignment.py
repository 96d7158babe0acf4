"""AlignmentModule: teaches the projector to speak the decoder's embeddings.

The student reads a text as projected encoder states, the teacher the same text as the decoder's
own tokens; both are the same decoder. Spans of text that both sides cut out with whole tokens tie
them together: the mean of the student's vectors in a span should be the mean of the teacher's
embeddings (MSE), and after its last position both should expect the same next token (KLD).

The MSE needs no decoder pass, so it is cheap; the KLD is what the decoder makes of the vectors.
REFRAG (arXiv 2509.01092) has neither and begins with reconstruction; the token-level KL to the
reader of the full text is that of xRAG (arXiv 2405.13792).
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refrag_lightning.data.alignment_batch import AlignmentBatch, NoSpansError
from refrag_lightning.hub import EncoderLayers
from refrag_lightning.model import RefragModel
from refrag_lightning.model.adapter import without_adapter
from refrag_lightning.model.decoder import embedding_slices, evaluation_mode, word_embeddings
from refrag_lightning.model.losses import (
    argmax_cross_entropy,
    explained_variance,
    nearest_embedding,
    segment_mean,
    span_kld,
)
from refrag_lightning.plain_text import say
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.training.alignment_metrics import STUDENTS, AlignmentMetrics, replaced, report
from refrag_lightning.training.reader import ReaderModule

# Spans of a training batch that are looked up among the decoder's embeddings.
_NEAREST_SPANS = 128


class AlignmentModule(ReaderModule):
    """Aligns projected encoder states with decoder embeddings.

    encoder: Name, folder or layers of an encoder (see `ReaderModule`).
    encoder: Name or folder of an encoder.
    decoder: Name or folder of a causal language model.
    mse_weight: Weight of the MSE between span means.
    kld_weight: Weight of the KLD between next-token distributions.
    kld_temperature: Divides both sides' logits.
    kld_direction: `forward` is KL(teacher || student).
    ce_weight: Weight of the cross-entropy against the teacher's most likely token.
    kld_start: Optimiser step from which the decoder is run; before it only the MSE counts.
    kld_texts: Texts of a training batch that the decoder reads; all if None.
    **kwargs: Where the model comes from, what trains (the teacher is the decoder without its
        `lora`) and the optimiser's settings; see `ReaderModule`.
    """

    model: RefragModel | None  # type: ignore[assignment]

    def __init__(
        self,
        encoder: str | EncoderLayers = "sentence-transformers/all-MiniLM-L6-v2",
        decoder: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        *,
        mse_weight: float = 1.0,
        kld_weight: float = 1.0,
        kld_temperature: float = 1.0,
        kld_direction: Literal["forward", "reverse"] = "forward",
        ce_weight: float = 0.0,
        kld_start: int = 0,
        kld_texts: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, weight in (("mse", mse_weight), ("kld", kld_weight), ("ce", ce_weight)):
            if weight < 0:
                raise ValueError(f"{name}_weight ({weight}) must not be negative")
        if not mse_weight + kld_weight + ce_weight:
            raise ValueError("mse_weight, kld_weight and ce_weight are all 0: nothing is learnt")
        if kld_texts is not None and kld_texts < 1:
            raise ValueError(f"kld_texts ({kld_texts}) must be at least 1")
        super().__init__(encoder, decoder, **kwargs)
        if kld_start and ("decoder" in self.trained["parts"] or not mse_weight):
            raise ValueError(
                f"kld_start ({kld_start}) needs a frozen decoder and an mse_weight above 0, since "
                "nothing else is learnt before it"
            )
        self.weights = {"mse": mse_weight, "kld": kld_weight, "ce": ce_weight}
        self.kld_temperature = kld_temperature
        self.kld_direction = kld_direction
        self.kld_start = kld_start
        self.kld_texts = kld_texts
        self._table_VD: Tensor | None = None
        self._first: dict[str, Tensor] | None = None
        self._val_clock = 0.0
        # Every name is a child module, which puts the metrics on the right device.
        self.metrics = torch.nn.ModuleDict({name: AlignmentMetrics() for name in STUDENTS})

    def configure_model(self) -> None:
        """Builds the model; see `ReaderModule`.

        Raises:
            ValueError: If the pooling has no state for a single token, but the data asks for it.
        """
        super().configure_model()
        pooling = self.reader.config.pooling
        spans = getattr(getattr(self._trainer, "datamodule", None), "spans", "row")
        if spans == "token" and pooling in ("cls", "concat"):
            raise ValueError(
                f"spans='token' needs the states of single tokens, which pooling "
                f"({pooling!r}) does not give; use data.spans row, or mean pooling"
            )

    def training_step(self, batch: AlignmentBatch, batch_idx: int) -> Tensor:
        """One step of the weighted losses, logged as `train/…`."""
        model = self.reader
        student_BSD, teacher_BSD = self._embed(batch)
        student_PD, teacher_PD = self._span_means(batch, student_BSD, teacher_BSD)
        means = {"mse": F.mse_loss(student_PD, teacher_PD)}
        figures: dict[str, Any] = {}
        weights: dict[str, Any] = {}
        counts = self.count_targets(batch)
        if self._reads_decoder():
            num_texts = self._num_read(batch)
            teacher_PV = self._teacher_logits(batch, teacher_BSD, num_texts)
            student_PV = self._student_logits(batch, student_BSD, num_texts)
            if self.weights["kld"]:
                means["kld"] = self._kld(student_PV, teacher_PV)
            if self.weights["ce"]:
                means["ce"] = argmax_cross_entropy(student_PV, teacher_PV)
            with torch.no_grad():
                same_P = student_PV.argmax(-1) == teacher_PV.argmax(-1)
                figures["top1"] = same_P.float().mean()
            weights["top1"] = len(student_PV)
        shares, losses = self.step_means(means, counts)
        with torch.no_grad():
            mse_of_mean = F.mse_loss(model.mean_embedding().expand_as(teacher_PD), teacher_PD)
            figures["explained_variance"] = explained_variance(means["mse"], mse_of_mean)
            weights["explained_variance"] = batch.num_spans * mse_of_mean
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if (self.global_step + 1) % every == 0:
                hits, count = self._nearest(batch, student_PD[:_NEAREST_SPANS])
                figures["nearest"] = hits / count.clamp(min=1)
                weights["nearest"] = count
        figures |= {"coverage": batch.coverage, "granularity": batch.granularity}
        weights |= dict.fromkeys(("coverage", "granularity"), batch.num_tokens)
        self.log_train(
            {"loss": self._total(losses), **losses, **figures},
            num_tokens=batch.num_tokens,
            weights=weights,
        )
        return self._total(shares)

    def count_targets(self, batch: AlignmentBatch) -> dict[str, Tensor | float]:
        """Spans of a batch, and those after which the decoder's two readings are compared."""
        counts: dict[str, Tensor | float] = {"mse": batch.num_spans}
        if self._reads_decoder():
            read = sum(batch.spans_of_texts[: self._num_read(batch)])
            counts |= dict.fromkeys(("kld", "ce"), read)
        return counts

    def _reads_decoder(self) -> bool:
        """Whether this step runs the decoder."""
        return self.global_step >= self.kld_start and bool(
            self.weights["kld"] or self.weights["ce"]
        )

    def _num_read(self, batch: AlignmentBatch) -> int:
        """Texts of a training batch that the decoder reads."""
        return min(self.kld_texts or batch.num_texts, batch.num_texts)

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def on_validation_epoch_start(self) -> None:
        """Starts the clock."""
        self._val_clock = time.perf_counter()

    def validation_step(self, batch: AlignmentBatch, batch_idx: int) -> None:
        """Measures the student on held-out text."""
        self._measure(batch, ("student",))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/…`; its loss is the weighted one."""
        # A copy: the sum over the ranks takes its place.
        own = self._metric("student").tokens.clone()
        tokens = self.trainer.strategy.reduce(own, reduce_op="sum")
        figures = self._figures("student")
        figures["loss"] = self._total({name: figures[name] for name in self.weights})
        figures["tokens_per_second"] = tokens / (time.perf_counter() - self._val_clock)
        # The figures are the same on every rank, and so is their mean.
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, sync_dist=True)
        if self.global_step == 0:
            self._first = figures

    def test_step(self, batch: AlignmentBatch, batch_idx: int) -> None:
        """Measures the student, and students that know nothing, on text that nothing saw."""
        self._measure(batch, STUDENTS)

    def on_test_epoch_end(self) -> None:
        """Logs `test/…` for the student and `test/<baseline>/…` for the others."""
        table = {name: self._figures(name) for name in STUDENTS}
        for name, figures in table.items():
            prefix = "test" if name == "student" else f"test/{name}"
            named = {f"{prefix}/{figure}": value for figure, value in figures.items()}
            self.log_dict(named, sync_dist=True)
        if self.trainer.is_global_zero:
            say(f"\n{report(table, first=self._first)}\n")

    def _embed(self, batch: AlignmentBatch) -> tuple[Tensor, Tensor]:
        """What the decoder reads: (B, S, D) of the student, (B, S', D) of the teacher."""
        if not batch.num_spans:
            raise NoSpansError(f"none of the {batch.num_texts} texts of the batch has a span")
        student_BSD = self.reader.embed(batch.student)
        with self._as_teacher():
            teacher_BSD = self.reader.get_input_embeddings()(batch.teacher["input_ids"])
        return student_BSD, teacher_BSD

    def _span_means(
        self, batch: AlignmentBatch, student_BSD: Tensor, teacher_BSD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means of both sides over each span, (P, D) in float32."""
        return (
            segment_mean(student_BSD.flatten(0, 1), batch.student_spans.flatten(), batch.num_spans),
            segment_mean(teacher_BSD.flatten(0, 1), batch.teacher_spans.flatten(), batch.num_spans),
        )

    def _kld(self, student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
        return span_kld(
            student_PV,
            teacher_PV,
            temperature=self.kld_temperature,
            direction=self.kld_direction,
        )

    def _teacher_logits(self, batch: AlignmentBatch, embeds: Tensor, num_texts: int) -> Tensor:
        with self._as_teacher():
            return self._logits(batch.teacher, embeds, batch.teacher_last, batch, num_texts)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The decoder without its adapter and without dropout, to be read without gradient."""
        decoder = self.reader.decoder
        with torch.no_grad(), evaluation_mode(decoder), without_adapter(decoder):
            yield

    def _student_logits(self, batch: AlignmentBatch, embeds: Tensor, num_texts: int) -> Tensor:
        return self._logits(batch.student, embeds, batch.student_last, batch, num_texts)

    def _logits(
        self,
        side: RefragBatch,
        embeds_BSD: Tensor,
        last_P: Tensor,
        batch: AlignmentBatch,
        num_texts: int,
    ) -> Tensor:
        """Next-token logits (P, V) after each span of the first texts, in one decoder pass."""
        texts = {name: side[name][:num_texts] for name in ("attention_mask", "position_ids")}
        hidden_BSD = self.reader.hidden(texts, inputs_embeds=embeds_BSD[:num_texts])
        num_spans = sum(batch.spans_of_texts[:num_texts])
        return self.reader.head(hidden_BSD.flatten(0, 1)[last_P[:num_spans]])

    def _nearest(self, batch: AlignmentBatch, student_PD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first spans: how many lie nearest to the right embedding, how many could."""
        decoder = self.reader.decoder
        if self._table_VD is None or word_embeddings(decoder).weight.requires_grad:
            self._table_VD = torch.cat(list(embedding_slices(decoder)))
        nearest_P = nearest_embedding(student_PD, self._table_VD)
        right_P = batch.teacher["input_ids"].flatten()[batch.teacher_last[: len(student_PD)]]
        one_token_P = batch.one_token[: len(student_PD)]
        return ((nearest_P == right_P) & one_token_P).sum(), one_token_P.sum()

    def _measure(self, batch: AlignmentBatch, students: Iterable[str]) -> None:
        """Adds a batch to the metrics of each student; the teacher reads it once."""
        student_BSD, teacher_BSD = self._embed(batch)
        teacher_PV = self._teacher_logits(batch, teacher_BSD, batch.num_texts)
        mean_D = self.reader.mean_embedding()
        slot_ids_BS = batch.student["slot_ids"]
        for name in students:
            vectors_BSD = replaced(student_BSD, slot_ids_BS, by=name, mean_D=mean_D)
            student_PD, teacher_PD = self._span_means(batch, vectors_BSD, teacher_BSD)
            student_PV = self._student_logits(batch, vectors_BSD, batch.num_texts)
            hits, count = self._nearest(batch, student_PD)
            self._metric(name).update(
                student_PD,
                teacher_PD,
                mean_D,
                nearest_hits=hits,
                num_one_token=count,
                kld=self._kld(student_PV, teacher_PV),
                ce=argmax_cross_entropy(student_PV, teacher_PV),
                top1_hits=(student_PV.argmax(-1) == teacher_PV.argmax(-1)).sum(),
                num_pairs=len(student_PV),
                coverage=batch.coverage,
                granularity=batch.granularity,
                num_tokens=batch.num_tokens,
            )

    def _metric(self, name: str) -> AlignmentMetrics:
        metric = self.metrics[name]
        assert isinstance(metric, AlignmentMetrics)
        return metric

    def _figures(self, name: str) -> dict[str, Tensor]:
        metric = self._metric(name)
        figures = metric.compute()
        metric.reset()
        return figures
