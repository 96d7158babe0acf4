"""AnswerEvaluation: how well questions are answered, under every reading of their documents.

python -m refrag_lightning test --config configs/eval/answers.yaml --model FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from refrag_lightning.cache import write_text
from refrag_lightning.data.question_batches import AskedQuestion, QuestionBatch, QuestionDataModule
from refrag_lightning.evaluation.answers import Answers, num_columns
from refrag_lightning.evaluation.gap import NUM_DRAWS, ValueTable
from refrag_lightning.evaluation.measures import Entry
from refrag_lightning.evaluation.metrics import SCORES, answer_scores, split_citations
from refrag_lightning.evaluation.reader import Banks, Reader, without_end
from refrag_lightning.evaluation.readings import readings_of
from refrag_lightning.model.reading import naming_texts
from refrag_lightning.training.evaluation import Evaluation

READINGS = ("rows", "full", "cut", "none", "titles", "other", "random", "zero")
GENERATE = ("rows", "full", "cut", "none")


class AnswerEvaluation(Evaluation):
    """Answers questions, and measures how likely their right answers are.

    For each reading the gold answer (the first one of a question) is scored in one pass, without
    the token that ends the turn; for some of them an answer is written as well, greedily. The
    model may be a plain causal language model, which has no rows.

    Args:
        init_from: Folder of the model, or of the run that made it.
        full_model: Folder of a model that was trained on the same data with documents as text. What
            counts as full text is the better of it and the model itself, for each measure.
        closed_model: Folder of a model that was trained on the same data without documents. What
            counts as none is the better of it and the model itself, for each measure.
        readings: What is read, such as rows@8 or bm25@8+0.1; without a rate (rows, bm25+0.1), at
            each of `rates`. rows, full, cut, none, titles, other, random and zero if None (see
            `evaluation.readings`).
        generate: Of these readings an answer is written too; rows, full, cut and none if None.
        rates: Tokens a row; all that the model has if None.
        max_new_tokens: Most tokens of an answer.
        num_draws: Draws of the bootstrap.
        seed: Of the bootstrap and of the control with a random projector.
        dtype: Of the models' weights, such as bfloat16; float32 if None.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """

    def __init__(
        self,
        init_from: str,
        full_model: str | None = None,
        closed_model: str | None = None,
        readings: list[str] | None = None,
        generate: list[str] | None = None,
        rates: list[int] | None = None,
        max_new_tokens: int = 32,
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
        dtype: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        readings = list(READINGS) if readings is None else readings
        generate = list(GENERATE) if generate is None else generate
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        super().__init__(
            init_from=init_from,
            rates=rates,
            num_draws=num_draws,
            seed=seed,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
        )
        # Bad names fail before anything is loaded.
        readings_of([*readings, *generate], rates or [1])
        self.kinds = (readings, generate)
        self.max_new_tokens = max_new_tokens
        self.folders = {"full_model": full_model, "closed_model": closed_model}
        self.baselines = nn.ModuleDict()
        self._readers: dict[str, Reader] = {}
        self._entries: list[Entry] = []
        self._written: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """Loads the model and its baselines, and works out what can be read.

        Raises:
            ValueError: If a baseline reads a conversation as other tokens than the model, so that
                its nats a token would not be comparable; or what it stands for is not read.
        """
        if self._readers:
            return
        super().configure_model()
        readers = {"model": self.reader}
        for name, folder in self.folders.items():
            if folder is not None:
                readers[name] = self.load_reader(folder)
                difference = self.reader.difference(readers[name], documents=name == "full_model")
                if difference is not None:
                    raise ValueError(f"{name} ({folder}) has another {difference} than the model")
                self.baselines[name] = readers[name].model
        self._readers = readers
        every, generate = (self.possible(kinds) for kinds in self.kinds)
        entries = [Entry(r, generates=r in generate) for r in dict.fromkeys([*every, *generate])]
        for name, kind in (("full_model", "full"), ("closed_model", "none")):
            own = next((e for e in entries if e.reading.kind == kind), None)
            if name in readers and own is None:
                raise ValueError(f"{name} ({self.folders[name]}) needs {kind!r} among the readings")
            if name in readers and own is not None:
                entries.append(Entry(own.reading, name, own.generates))
        self._entries = entries
        self.table = ValueTable(num_columns(entries))

    def test_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """Measures every entry on a batch of questions."""
        asked = batch.asked
        texts = [without_end(question.segments) for question in asked]
        documents = [p.text for question in asked for p in question.passages]
        readings = [entry.reading for entry in self._entries]
        if any(reading.kind == "other" for reading in readings):
            documents += [document for other in batch.others for document in other]
        banks = self.reader.encode(documents, readings)
        written: list[dict[str, str]] = [{} for _ in asked]
        columns = []
        for entry in self._entries:
            reader = self._readers[entry.model]
            names = [f"question {question.id!r}, read as {entry.key}," for question in asked]
            with naming_texts(names, "give fewer passages (num_passages) or other readings"):
                found = reader.likelihood(
                    texts,
                    entry.reading,
                    banks=banks,
                    others=batch.others,
                    questions=[question.question for question in asked],
                )
                answers = self._answers(entry, batch, banks) if entry.generates else None
            columns += [found.nats_B, found.targets_B, found.positions_B]
            if answers is not None:
                columns += list(_scores(answers, asked).unbind(1))
                for answer, row in zip(answers, written, strict=True):
                    row[entry.key] = answer
        index_N = torch.tensor([question.index for question in asked])
        self.table.update(index_N, torch.stack([c.cpu().double() for c in columns], dim=1))
        self._written += [
            {
                "index": question.index,
                "id": question.id,
                "question": question.question,
                "references": question.references,
                "gold_place": question.gold_place,
                "answers": answers,
            }
            for question, answers in zip(asked, written, strict=True)
        ]

    def on_test_epoch_end(self) -> None:
        """Writes the report, and what was answered, into the run folder."""
        index, values = self.table.compute()
        self.table.reset()
        data = cast(QuestionDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        asked = [data.questions[n] for n in index]
        answers = Answers(
            self._entries, values, asked, num_draws=self.num_draws, seed=self.table_seed
        )
        rows = self._all_written()
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "answers.jsonl"
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(path, "".join(lines))
        self.finish(
            answers.report(
                "Questions answered from compressed documents",
                self.settings(
                    **{k: v for k, v in self.folders.items() if v is not None},
                    data=type(data.source).__name__,
                    split=data.split,
                    passages=data.counts or "all",
                    order=data.order,
                    drop_gold=data.drop_gold,
                    max_new_tokens=self.max_new_tokens,
                ),
            ),
            answers.figures(),
        )

    def _all_written(self) -> list[dict[str, Any]]:
        """What all ranks wrote, in the questions' order; starts anew."""
        parts: list[Any] = [self._written]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._written)
        self._written = []
        by_index = {row["index"]: row for part in parts for row in part}
        return [by_index[index] for index in sorted(by_index)]

    def _answers(self, entry: Entry, batch: QuestionBatch, banks: Banks) -> list[str]:
        return self._readers[entry.model].answers(
            [question.prompt for question in batch.asked],
            entry.reading,
            banks=banks,
            others=batch.others,
            questions=[question.question for question in batch.asked],
            max_new_tokens=self.max_new_tokens,
        )


def _scores(answers: list[str], asked: list[AskedQuestion]) -> torch.Tensor:
    """The scores, right citations and citations of each answer, (B, len(SCORES) + 2)."""
    rows = []
    for answer, question in zip(answers, asked, strict=True):
        text, cited = split_citations(answer, question.ids)
        scores = answer_scores(text, question.references)
        right = sum(name in question.gold_ids for name in cited)
        rows.append([*(scores[name] for name in SCORES), right, len(cited)])
    return torch.tensor(rows, dtype=torch.float64)
