"""Example and TextBatch: texts with what the decoder learns to write in them, and batches of them.

Pre-training and fine-tuning differ in where their texts come from; from here on they are the same.
A student reads the documents as rows, as tokens or in part as each; a teacher, where there is one,
reads the same texts with every document as tokens. Both write the same targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from refrag_lightning.text.batch import RefragBatch
from refrag_lightning.text.lines import IGNORED
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

Reading = Literal["compressed", "text", "none"]
"""How documents are read: as rows, as the decoder's tokens, or not at all."""

_MOVABLE = (RefragBatch, torch.Tensor)


@dataclass(frozen=True)
class Example:
    """One text with targets.

    Attributes:
        segments: What the decoder reads; it is trained to write those with `train`.
        task: Names the loss curve: `answer`, `chat`, `reconstruct`, `continue`.
        id: Names the example in error messages and tables.
        expand: Which rows stand as tokens: `none`, `all`, row indices, or a share of the rows.
        prompt: What generation starts from, where answers are generated.
        references: Right answers, to score a generated one against.
        context: In a batch, examples of the same number that begin with the same segments share
            those: several questions behind one context.
    """

    segments: tuple[Segment, ...]
    task: str = "answer"
    id: str = ""
    expand: str | float | Sequence[int] = "none"
    prompt: tuple[Segment, ...] | None = None
    references: tuple[str, ...] = ()
    context: int | None = None


@dataclass
class TextBatch:
    """A batch of examples (P targets in all), ordered by text and then by position.

    Attributes:
        student: The texts as the student reads them, with labels; packed into lines or padded on
            the right.
        teacher: The same texts with every document as tokens, or None.
        predicting: (P,) the position, counted over the student's flattened (B, S), whose logits
            predict each target.
        targets: (P,) token ids.
        teacher_predicting: (P,) the same as `predicting` for the teacher's (B, S').
        task_ids: (P,) index of each target's task in `tasks`.
        text_ids: (P,) which of the batch's texts each target belongs to.
        tasks: The tasks in the batch, sorted.
        ids: The texts' ids.
        prompts: What generation starts from, padded on the left, of the examples that have a
            prompt; or None.
        prompt_ids: The ids of the examples that have a prompt.
        references: The right answers to each prompt.
        num_tokens: Positions that the student's decoder reads, padding not counted.
    """

    student: RefragBatch
    teacher: RefragBatch | None
    predicting: torch.Tensor
    targets: torch.Tensor
    teacher_predicting: torch.Tensor | None
    task_ids: torch.Tensor
    text_ids: torch.Tensor
    tasks: tuple[str, ...]
    ids: tuple[str, ...]
    prompts: RefragBatch | None
    prompt_ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    num_tokens: int

    @property
    def compression(self) -> int:
        """Tokens a row in this batch."""
        return self.student.compression

    @property
    def num_texts(self) -> int:
        """Texts, however they are packed."""
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """P."""
        return len(self.targets)

    def to(self, device: Any, *, non_blocking: bool = False) -> TextBatch:
        """Moves every tensor to `device`."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TextBatch:
        """Pins every tensor's memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, function: Callable[[Any], Any]) -> TextBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: function(v) for n, v in values.items() if isinstance(v, _MOVABLE)}
        return replace(self, **moved)


def collate(
    examples: Sequence[Example],
    tokenizer: RefragTokenizer,
    *,
    compression: int | None = None,
    teacher: bool = False,
    line_length: int | None = None,
) -> TextBatch:
    """Builds a batch of examples.

    A token that opens its text has nothing before it that could predict it, so it is no target.

    Args:
        examples: The examples.
        tokenizer: The model's tokenizer.
        compression: Tokens a row, one of the tokenizer's rates; its own by default.
        teacher: Whether to build the teacher's side.
        line_length: Pack the texts into lines of so many positions, without attention between
            them. A text that is longer makes the lines of its batch as long as itself.

    Raises:
        ValueError: If an example has no target.
    """
    if compression is not None:
        tokenizer = tokenizer.at(compression)
    texts = [example.segments for example in examples]
    for example in examples:
        _check_target(example, any(s.train and s.text for s in example.segments))
    layout: Any = {"padding_side": "right", "line_length": line_length}
    layout["groups"] = _groups(examples)
    reading = _reading(examples)
    student = tokenizer.build(texts, **reading, **layout)
    full = None
    if teacher:
        text: dict[str, Any] = {"text_only": True}
        full = student if reading == text else tokenizer.build(texts, **text, **layout)
    sides = [_Targets.of(side) for side in (student, full) if side is not None]
    # A document without one encoder token stands only on the teacher's side: a text that opens
    # with it has a first token less to predict on the student's.
    counts = np.min([np.bincount(side.texts, minlength=len(texts)) for side in sides], axis=0)
    sides = [side.last(counts) for side in sides]
    for example, count in zip(examples, counts, strict=True):
        _check_target(example, count > 0)
    targets = sides[0]
    assert all(np.array_equal(targets.ids, side.ids) for side in sides), "targets are the same"
    tasks = tuple(sorted({example.task for example in examples}))
    task_of_text = np.asarray([tasks.index(example.task) for example in examples])
    return TextBatch(
        student=student,
        teacher=full,
        predicting=torch.from_numpy(targets.flat - 1),
        targets=torch.from_numpy(targets.ids),
        teacher_predicting=torch.from_numpy(sides[1].flat - 1) if teacher else None,
        task_ids=torch.from_numpy(task_of_text[targets.texts]),
        text_ids=torch.from_numpy(targets.texts),
        tasks=tasks,
        ids=tuple(example.id for example in examples),
        prompts=_prompts(examples, tokenizer),
        prompt_ids=tuple(e.id for e in examples if e.prompt is not None),
        references=tuple(e.references for e in examples if e.prompt is not None),
        num_tokens=int(student["attention_mask"].sum()),
    )


def context_lengths(
    contexts: Sequence[Sequence[Example]], tokenizer: RefragTokenizer
) -> np.ndarray:
    """Positions that the student's decoder reads of each context and the examples behind it.

    Args:
        contexts: The examples of each context.
        tokenizer: The model's tokenizer.

    Returns:
        (N,), rows counted as rows.
    """
    examples = [
        replace(example, context=number)
        for number, behind in enumerate(contexts)
        for example in behind
    ]
    texts = [example.segments for example in examples]
    batch = tokenizer.build(
        texts, **_reading(examples), padding_side="right", groups=_groups(examples)
    )
    lengths = batch["attention_mask"].numpy().sum(axis=1)
    # A text of each line; examples with nothing in common stand on lines of their own.
    text_of_line = np.arange(len(examples))
    if "branch_ids" in batch:
        text_of_line = batch["branch_ids"].numpy().max(axis=1)
    context_of_text = np.asarray([example.context for example in examples])
    totals = np.bincount(context_of_text[text_of_line], lengths, minlength=len(contexts))
    return totals.astype(np.int64)


def _groups(examples: Sequence[Example]) -> list[int] | None:
    """Which examples may share what they begin with, as `RefragTokenizer.build` takes it."""
    if all(example.context is None for example in examples):
        return None
    return [-1 - n if e.context is None else e.context for n, e in enumerate(examples)]


def _reading(examples: Sequence[Example]) -> dict[str, Any]:
    """How a batch's documents are read, as arguments of `RefragTokenizer.build`."""
    if all(example.expand == "all" for example in examples):
        return {"text_only": True}
    return {"expand": [example.expand for example in examples]}


@dataclass(frozen=True)
class _Targets:
    """The labelled positions of a batch, ordered by text and then by position.

    Attributes:
        flat: (P,) position, counted over the flattened (B, S).
        texts: (P,) its text.
        ids: (P,) its token id.
    """

    flat: np.ndarray
    texts: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, batch: RefragBatch) -> _Targets:
        labels_BS = batch["labels"].numpy()
        flat = np.flatnonzero(labels_BS != IGNORED)
        if "branch_ids" in batch:
            texts = batch["branch_ids"].numpy().ravel()[flat]
        elif "segment_ids" in batch:
            texts = batch["segment_ids"].numpy().ravel()[flat]
        else:
            texts = flat // labels_BS.shape[1]
        # A text lies in one stretch, so a stable sort keeps its positions in order.
        order = np.argsort(texts, kind="stable")
        return cls(flat[order], texts[order], labels_BS.ravel()[flat[order]])

    def last(self, counts: np.ndarray) -> _Targets:
        """The last `counts` (N,) targets of each of N texts."""
        ends = np.cumsum(np.bincount(self.texts, minlength=len(counts)))
        kept = ends[self.texts] - np.arange(len(self.texts)) <= counts[self.texts]
        return _Targets(self.flat[kept], self.texts[kept], self.ids[kept])


def _prompts(examples: Sequence[Example], tokenizer: RefragTokenizer) -> RefragBatch | None:
    asked = [example for example in examples if example.prompt is not None]
    if not asked:
        return None
    prompts = [example.prompt or () for example in asked]
    return tokenizer.build(prompts, **_reading(asked), padding_side="left")


def _check_target(example: Example, has_target: bool) -> None:
    if not has_target:
        raise ValueError(
            f"example {example.id!r} has no target: none of its segments trains, or nothing of "
            "them is left"
        )
