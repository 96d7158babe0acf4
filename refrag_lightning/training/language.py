"""LanguageModule: next-token losses on the targets of a `TextBatch`, for any task.

The student reads documents as its batch has them (rows, tokens, some of each, or none); every
target is predicted in one decoder pass. The loss is cross-entropy, and with a teacher also the KL
from the teacher's next-token distribution at the same target, the teacher reading every document
as text: the self-distillation of xRAG (arXiv 2405.13792), at every target instead of a sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from refrag_lightning.data.examples import TextBatch
from refrag_lightning.evaluation.metrics import AnswerScores
from refrag_lightning.hub import EncoderLayers
from refrag_lightning.model import RefragModel
from refrag_lightning.model.adapter import is_adapter_key, without_adapter
from refrag_lightning.model.answering import answer
from refrag_lightning.model.decoder import evaluation_mode
from refrag_lightning.model.load import load
from refrag_lightning.model.losses import TargetLosses, target_losses
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.reading import naming_texts
from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.training.across_ranks import gather
from refrag_lightning.training.language_metrics import TargetSums
from refrag_lightning.training.reader import ReaderModule

_SHORTER = "leave it out (max_length), or give shorter or fewer documents"


class LanguageModule(ReaderModule):
    """Trains a reader on the targets of texts; see `PretrainModule` and `SFTModule`.

    Args:
        encoder: Name, folder or layers of an encoder (see `ReaderModule`); null for the
            decoder alone, where that is possible.
        decoder: Name or folder of a causal language model.
        ce_weight: Weight of the cross-entropy.
        kl_weight: Weight of KL(teacher || student), where there is a teacher.
        kl_temperature: Divides both sides' logits in the KL, which is multiplied by its square.
        teacher: Whom the KL is taken from, reading documents as text, in evaluation mode: `none`;
            `self`, the same decoder without its adapter; `same`, the same decoder with it, so that
            both sides have the same weights; or the name or folder of a model with the same
            vocabulary. Without an adapter `self` and `same` are one.
        task_weights: Weight of each target by its task, such as `{reconstruct: 0.5}`; 1 for a task
            that is not named.
        max_new_tokens: Longest answer that validation generates, where the data has prompts.
        loss_chunk: Targets whose logits stand in memory at once.
        **kwargs: Where the model comes from, what trains, and the optimiser's settings; see
            `ReaderModule`.

    Raises:
        ValueError: If a setting is out of range, or nothing would be learnt.
    """

    def __init__(
        self,
        encoder: str | EncoderLayers | None = "sentence-transformers/all-MiniLM-L6-v2",
        decoder: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        *,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        kl_temperature: float = 1.0,
        teacher: str = "none",
        task_weights: dict[str, float] | None = None,
        max_new_tokens: int = 32,
        loss_chunk: int = 4096,
        **kwargs: Any,
    ) -> None:
        weights = {"ce_weight": ce_weight, "kl_weight": kl_weight}
        weights |= {f"task_weights {name}": value for name, value in (task_weights or {}).items()}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} ({weight}) must not be negative")
        if not ce_weight and (teacher == "none" or not kl_weight):
            raise ValueError(
                f"ce_weight ({ce_weight}) and kl_weight ({kl_weight}) with teacher ({teacher!r}) "
                "leave no loss: nothing is learnt"
            )
        if kl_temperature <= 0:
            raise ValueError(f"kl_temperature ({kl_temperature}) must be positive")
        for name, least in (("max_new_tokens", max_new_tokens), ("loss_chunk", loss_chunk)):
            if least < 1:
                raise ValueError(f"{name} ({least}) must be at least 1")
        super().__init__(encoder, decoder, **kwargs)
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        self.kl_temperature = kl_temperature
        self.teacher = teacher
        self.task_weights = task_weights or {}
        self.max_new_tokens = max_new_tokens
        self.loss_chunk = loss_chunk
        self.teacher_model: RefragModel | PlainModel | None = None
        self.sums = TargetSums()
        # By rate; filled when the rates are known.
        self.scores = torch.nn.ModuleDict()

    @property
    def needs_teacher(self) -> bool:
        """Whether batches have to carry the teacher's side; the data module asks."""
        return self.teacher != "none" and self.kl_weight > 0

    def configure_model(self) -> None:
        """Loads the model, and the teacher where it is another one.

        Raises:
            ValueError: If the teacher's vocabulary is not the decoder's.
        """
        if self.model is not None:
            return
        super().configure_model()
        for rate in self.tokenizer.rates:
            self.scores[str(rate)] = AnswerScores()
        if not self.needs_teacher:
            return
        if self.teacher == "self":
            self._refuse_adapter_on_head()
        elif self.teacher != "same":
            self.teacher_model = self._load_teacher()

    def describe(self) -> list[str]:
        """Rates and teacher, for the announcement of a run."""
        lines = []
        if not self.plain:
            lines.append(f"{'rates:':<11}{', '.join(map(str, self.tokenizer.rates))} tokens a row")
        if self.needs_teacher:
            lines.append(f"{'teacher:':<11}{self.teacher}, reading documents as text")
        return lines

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """One step of the weighted losses, logged as `train/…`."""
        self._settle_lines(batch)
        losses = self._losses(batch)
        loss_P, weights_P = self._weighted(batch, losses)
        total = weights_P.sum()
        # A batch all of whose tasks weigh 0 teaches nothing, but is no NaN.
        mean = (loss_P * weights_P).sum() / total.clamp(min=1e-8)
        shares, means = self.step_means({"loss": mean}, {"loss": total})
        with torch.no_grad():
            nll = losses.nll_P.mean()
            figures = {"nll": nll, "top1": losses.hits_P.float().mean()}
            if not self.plain:
                figures[f"nll@{batch.compression}"] = nll
            if losses.kl_P is not None:
                figures["kl"] = losses.kl_P.mean()
            weights: dict[str, Any] = dict.fromkeys(figures, len(loss_P))
            by_task = _task_means(losses.nll_P, batch.task_ids, len(batch.tasks))
            for task, (value, count) in zip(batch.tasks, by_task, strict=True):
                figures[f"nll/{task}"], weights[f"nll/{task}"] = value, count
        self.log_train(means | figures, num_tokens=batch.num_tokens, weights=weights)
        return shares["loss"]

    def count_targets(self, batch: TextBatch) -> dict[str, Tensor | float]:
        """The summed weight of a batch's targets."""
        return {"loss": self._weights(batch).sum()}

    def _settle_lines(self, batch: TextBatch) -> None:
        """Has all ranks find out together whether their decoders keep the texts of a line apart."""
        sides = [(self.model, batch.student), (self.teacher_model, batch.teacher)]
        for reader, side in sides:
            if reader is not None and side is not None:
                reader.keeps_apart(
                    side, agree=lambda own: all(gather(own)), warns=self.global_rank == 0
                )

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures held-out texts, and generates answers where the batch has prompts."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/…`."""
        self._log_figures("val")

    def test_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures texts that nothing saw, as `validation_step` does."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/…`."""
        self._log_figures("test")

    def _measure(self, batch: TextBatch) -> None:
        losses = self._losses(batch)
        loss_P, weights_P = self._weighted(batch, losses)
        self.sums.update(
            losses.nll_P,
            losses.hits_P,
            loss_P,
            weights_P,
            task_ids=batch.task_ids,
            tasks=batch.tasks,
            rate=batch.compression,
        )
        if batch.prompts is not None:
            assert self.model is not None
            names = [f"the prompt of example {name!r}" for name in batch.prompt_ids]
            with naming_texts(names, "give shorter examples or a smaller max_new_tokens"):
                answers = answer(
                    self.model, self.tokenizer, batch.prompts, max_new_tokens=self.max_new_tokens
                )
            scores = self.scores[str(batch.compression)]
            assert isinstance(scores, AnswerScores)
            scores.update(answers, batch.references)

    def _log_figures(self, split: str) -> None:
        """Logs what `_measure` gathered, under names with the rate unless there are no rows."""
        loss, table = self.sums.compute()
        self.sums.reset()
        figures: dict[str, Any] = {"loss": loss}
        for (task, rate), row in table.items():
            figures[f"nll/{task}{self._at(rate)}"] = row.nll
            figures[f"accuracy/{task}{self._at(rate)}"] = row.accuracy
        for k, scores in self.scores.items():
            assert isinstance(scores, AnswerScores)
            with warnings.catch_warnings():
                # Where nothing was generated there is no score, which is no cause for a warning.
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                means = scores.compute()
            scores.reset()
            if not means["em"].isnan():
                figures |= {f"{name}{self._at(k)}": means[name] for name in ("em", "f1")}
        # What was computed is the same on every rank, and so is its mean.
        named = {f"{split}/{name}": value for name, value in figures.items()}
        self.log_dict(named, sync_dist=True)

    def _at(self, rate: int | str) -> str:
        return "" if self.plain else f"@{rate}"

    def _losses(self, batch: TextBatch) -> TargetLosses:
        """The losses of each target, in one decoder pass a side."""
        model = self.model
        assert model is not None
        with naming_texts(_named(batch), _SHORTER):
            hidden_BSD = model.hidden(batch.student)
        teacher_PD, teacher_head = self._teach(batch)
        return target_losses(
            model.head,
            hidden_BSD.flatten(0, 1).index_select(0, batch.predicting),
            batch.targets,
            teacher_PD=teacher_PD,
            teacher_head=teacher_head,
            temperature=self.kl_temperature,
            chunk_size=self.loss_chunk,
        )

    def _weighted(self, batch: TextBatch, losses: TargetLosses) -> tuple[Tensor, Tensor]:
        """Loss and weight of each target, (P,) each."""
        loss_P = self.ce_weight * losses.nll_P
        if losses.kl_P is not None:
            loss_P = loss_P + self.kl_weight * losses.kl_P
        return loss_P, self._weights(batch)

    def _weights(self, batch: TextBatch) -> Tensor:
        """The weight of each target, (P,)."""
        device = batch.targets.device
        if not self.task_weights:
            return torch.ones(batch.targets.shape, device=device)
        # Filled in on the device: a list of numbers brought there would wait for it.
        weights = [
            torch.full((1,), self.task_weights.get(task, 1.0), device=device)
            for task in batch.tasks
        ]
        return torch.cat(weights).index_select(0, batch.task_ids)

    # The teacher

    @torch.no_grad()
    def _teach(self, batch: TextBatch) -> tuple[Tensor | None, Callable[[Tensor], Tensor] | None]:
        """The teacher's final states before each target, (P, D), and its head."""
        if not self.needs_teacher:
            return None, None
        if batch.teacher is None or batch.teacher_predicting is None:
            raise ValueError(f"teacher ({self.teacher!r}) is set, but the data has no teacher side")
        teacher = self.model if self.teacher_model is None else self.teacher_model
        assert teacher is not None
        decoder = teacher.decoder

        def head(hidden_CD: Tensor) -> Tensor:
            # An adapter on the head may have dropout too.
            with evaluation_mode(decoder.get_output_embeddings()):
                return teacher.head(hidden_CD)

        off = without_adapter(decoder) if self.teacher == "self" else nullcontext()
        named = naming_texts(_named(batch, "read as text by the teacher"), _SHORTER)
        with evaluation_mode(decoder), off, named:
            hidden_BSD = _reads_text(teacher, batch.teacher)
        return hidden_BSD.flatten(0, 1).index_select(0, batch.teacher_predicting), head

    def _refuse_adapter_on_head(self) -> None:
        # The head is called for both sides, and again in the backward pass.
        assert self.model is not None
        head = self.model.decoder.get_output_embeddings()
        if any(is_adapter_key(f".{name}") for name, _ in head.named_parameters()):
            raise ValueError(
                "teacher ('self') needs an output layer without an adapter: leave it out of the "
                "target_modules of lora"
            )

    def _load_teacher(self) -> RefragModel | PlainModel:
        teacher, tokenizer = load(self.teacher, dtype=self.decoder_dtype)
        assert self.model is not None
        own = self.model.decoder.get_output_embeddings().weight.shape[0]
        its = teacher.decoder.get_output_embeddings().weight.shape[0]
        same = tokenizer.decoder.get_vocab() == self.tokenizer.decoder.get_vocab()
        if own != its or not same:
            raise ValueError(
                f"teacher ({self.teacher!r}) has another vocabulary ({its} logits) than the "
                f"decoder ({own} logits)"
            )
        return teacher.requires_grad_(False).eval()


def _reads_text(model: RefragModel | PlainModel, batch: RefragBatch) -> Tensor:
    """Final states (B, S, D) of texts without slots; the encoder is left alone."""
    embeds_BSD = model.decoder.get_input_embeddings()(batch["input_ids"])
    return model.hidden(batch, inputs_embeds=embeds_BSD)


def _named(batch: TextBatch, how: str = "") -> list[str]:
    """What the batch's texts are called in messages."""
    return [f"example {name!r}{how and f', {how},'}" for name in batch.ids]


def _task_means(values_P: Tensor, task_ids: Tensor, num_tasks: int) -> list[tuple[Tensor, Tensor]]:
    """The mean of each task's values, and how many it has; every task has some."""
    sums = values_P.new_zeros(num_tasks).index_add(0, task_ids, values_P)
    counts = values_P.new_zeros(num_tasks).index_add(0, task_ids, torch.ones_like(values_P))
    return list(zip(sums / counts.clamp(min=1), counts, strict=True))
