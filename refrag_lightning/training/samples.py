"""Tables of questions with what was read, what was answered, and what stood as tokens, for W&B."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from refrag_lightning.data.conversations import Conversation
from refrag_lightning.data.examples import Example
from refrag_lightning.data.question_batches import AskedQuestion, QuestionDataModule
from refrag_lightning.data.rows import Split
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.evaluation.readings import Reading
from refrag_lightning.model.answering import answer
from refrag_lightning.model.reading import naming_texts
from refrag_lightning.plain_text import printable
from refrag_lightning.text.batch import RowTrace
from refrag_lightning.text.segments import Segment
from refrag_lightning.training.evaluate_answers import AnswerEvaluation
from refrag_lightning.training.language import LanguageModule
from refrag_lightning.training.wandb_run import WandbRun

AS_TEXT = "everything: the documents are read as text"
NOTHING_READ = "no document is read"

# What the baselines of an evaluation read.
_BASELINES = {"full_model": "full", "closed_model": "none"}


class Sample(NamedTuple):
    """A row of the table.

    Attributes:
        id: The question's name.
        question: The question.
        documents: The documents that it was read with.
        read: How they were read, such as `rows@8`, `full` or `none`.
        answer: What the model wrote.
        expected: The answers that count as right.
        expanded: Which rows the decoder read as tokens.
    """

    id: str
    question: str
    documents: str
    read: str
    answer: str
    expected: str
    expanded: str


class SampleTables(Callback):
    """Hands a table of answers to W&B after each validation and test.

    While a model trains on conversations, the first ones that are held out are answered at each
    rate, beside what the validation measures, with the same settings. An evaluation of answers
    gives its own. The first rank does it; nothing is done without W&B.

    Args:
        num_samples: Questions.
    """

    def __init__(self, num_samples: int = 8) -> None:
        self.num_samples = num_samples
        self._examples: dict[Split, list[Example]] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers the questions of the validation's split."""
        if not trainer.sanity_checking:
            self._answer(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers the questions of the test's split."""
        self._answer(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the answers that an evaluation has written."""
        if isinstance(pl_module, AnswerEvaluation) and _loggers(trainer):
            data = cast(QuestionDataModule, trainer.datamodule)  # type: ignore[attr-defined]
            path = Path(trainer.default_root_dir) / "answers.jsonl"
            with path.open(encoding="utf-8") as lines:
                written = [json.loads(line) for line in islice(lines, self.num_samples)]
            asked = data.questions
            rows = [s for row in written for s in evaluated(row, asked[row["index"]])]
            _log(trainer, "test", rows)

    def _answer(self, trainer: Trainer, module: LightningModule, split: Split) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(module, LanguageModule) or not isinstance(data, SFTDataModule):
            return
        if not self.num_samples or not _loggers(trainer):
            return
        if split not in self._examples:
            self._examples[split] = held_out(data, split, self.num_samples)
        with trainer.precision_plugin.forward_context():
            rows = answered(module, self._examples[split], data.rates, size=data.batch_size)
        _log(trainer, split, rows)


def held_out(data: SFTDataModule, split: Split, number: int) -> list[Example]:
    """The first conversations of a split that end with an answer, the sources in turn.

    Args:
        data: The data module.
        split: Of which.
        number: The most.
    """
    turns = chain.from_iterable(zip_longest(*data.conversations(split)))
    asked: Iterator[Conversation] = (c for c in turns if c is not None and c.ends_with_answer)
    return [
        data.example(c, data.choice.most(c), split=split, with_prompt=True)
        for c in islice(asked, number)
    ]


@torch.no_grad()
def answered(
    module: LanguageModule, examples: Sequence[Example], rates: Sequence[int], *, size: int
) -> list[Sample]:
    """Has a model answer, greedily.

    Args:
        module: The model's module.
        examples: What to answer; each has a prompt.
        rates: Tokens a row, each in turn.
        size: Examples a batch.
    """
    model, whole = module.model, module.tokenizer
    assert model is not None
    rows = []
    for rate in rates:
        tokenizer = whole if module.plain else whole.at(rate)
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            as_text = all(example.expand == "all" for example in part)
            how: dict[str, Any] = {"text_only": True}
            if not as_text:
                how = {"expand": [example.expand for example in part]}
            prompts = [example.prompt or () for example in part]
            batch = tokenizer.build(prompts, **how, padding_side="left")
            traces: Sequence[Sequence[RowTrace]] = [()] * len(part) if as_text else batch.trace
            with naming_texts([f"example {example.id!r}" for example in part]):
                texts = answer(
                    model, tokenizer, batch.to(module.device), max_new_tokens=module.max_new_tokens
                )
            for example, text, trace in zip(part, texts, traces, strict=True):
                prompt = example.prompt or ()
                read = "full" if as_text else f"rows@{rate}"
                documents = [s.text for s in prompt if s.document is not None]
                rows.append(
                    Sample(
                        example.id,
                        "".join(s.text for s in prompt if s.kind == "text").strip(),
                        documents_shown(prompt),
                        read if documents else "none",
                        text,
                        " | ".join(example.references),
                        expanded(trace, documents, as_text=as_text),
                    )
                )
    return rows


def documents_shown(segments: Sequence[Segment]) -> str:
    """The documents of a prompt with their headers, as they stand in it."""
    kinds = ("header", "document", "footer")
    return "".join(s.text for s in segments if s.kind in kinds).strip()


def expanded(trace: Sequence[RowTrace], texts: Sequence[str], *, as_text: bool = False) -> str:
    """Which rows of a prompt the decoder reads as tokens: how many, and what they say.

    Args:
        trace: The prompt's rows.
        texts: Its documents.
        as_text: Whether whole documents are read as text, so that there are no rows.
    """
    if not texts:
        return NOTHING_READ
    if as_text:
        return AS_TEXT
    chosen = [row for row in trace if row.state == "tokens"]
    if not chosen:
        return f"none of {len(trace)} rows"
    said = [f"[{r.document_id}] {texts[r.document][r.start : r.end].strip()}" for r in chosen]
    return f"{len(chosen)} of {len(trace)} rows: " + " … ".join(said)


def evaluated(row: dict[str, Any], asked: AskedQuestion) -> list[Sample]:
    """The samples of one question of an evaluation, one for each reading that was answered.

    Args:
        row: A line of answers.jsonl.
        asked: The question.
    """
    documents = documents_shown(asked.segments)
    samples = []
    for key, text in row["answers"].items():
        samples.append(
            Sample(
                asked.id,
                asked.question,
                documents,
                key,
                text,
                " | ".join(asked.references),
                _of_reading(_BASELINES.get(key, key)),
            )
        )
    return samples


def _of_reading(name: str) -> str:
    reading = Reading.parse(name)
    if reading.kind == "none":
        return NOTHING_READ
    if reading.has_rows:
        return "none of the rows"
    return AS_TEXT if reading.kind == "full" else f"the documents are read as {reading.kind}"


def _loggers(trainer: Trainer) -> list[WandbRun]:
    """W&B's, on the first rank."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]


def _log(trainer: Trainer, split: str, rows: Sequence[Sample]) -> None:
    for logger in _loggers(trainer):
        logger.log_table(
            f"samples/{split}",
            columns=list(Sample._fields),
            data=[[*map(printable, row)] for row in rows],
            step=trainer.global_step,
        )
