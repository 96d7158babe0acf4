"""Conversations to learn from, with places for passages, and the sources that they come from.

Which passages a conversation is read with, in which order and under which numbers, is drawn anew
for each batch. So a content may hold, beside texts and documents, `Place.PASSAGES` where they go
and `Place.CITATIONS` where the numbers of the gold ones go. `fill` puts them in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from refrag_lightning.data.questions import (
    HeldOutByPassage,
    Passage,
    Question,
    QuestionSource,
)
from refrag_lightning.data.rows import Split
from refrag_lightning.data.sources import TextSource, check_cutting, passages_of
from refrag_lightning.text.documents import Document

_FIELDS = re.compile(r"(\{passages\}|\{question\})")


class Place(Enum):
    """What is put into a content only when its passages are drawn."""

    PASSAGES = "passages"
    CITATIONS = "citations"


Content = tuple[str | Document | Place, ...]


@dataclass(frozen=True)
class Turn:
    """A message.

    Attributes:
        role: `system`, `user`, `assistant`, or what else the chat template knows.
        content: Its texts, documents and places.
        train: Whether an assistant's message is learnt.
    """

    role: str
    content: Content
    train: bool = True


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from.

    Attributes:
        id: Its name in tables and messages.
        turns: Its messages.
        passages: Passages to draw from, in the retriever's order.
        references: Right answers for the last turn.
        kind: What sort of question it is, for tables; or "".
        task: Names the loss curve.
    """

    id: str
    turns: tuple[Turn, ...]
    passages: tuple[Passage, ...] = ()
    references: tuple[str, ...] = ()
    kind: str = ""
    task: str = "chat"

    def with_answer(self, answer: str) -> Conversation:
        """The same with another text in its last turn, citations kept."""
        kept = tuple(part for part in self.turns[-1].content if part is Place.CITATIONS)
        last = replace(self.turns[-1], content=(answer, *kept))
        return replace(self, turns=(*self.turns[:-1], last))

    @property
    def is_learnable(self) -> bool:
        """Whether the assistant says something that is to be learnt."""
        answers = [turn for turn in self.turns if turn.role == "assistant" and turn.train]
        return any(isinstance(p, str) and p.strip() for turn in answers for p in turn.content)

    @property
    def ends_with_answer(self) -> bool:
        """Whether the assistant has the last word."""
        return bool(self.turns) and self.turns[-1].role == "assistant"

    @property
    def answer(self) -> str:
        """What the last turn says, without citations."""
        return "".join(part for part in self.turns[-1].content if isinstance(part, str))


def fill(
    conversation: Conversation, passages: Sequence[Passage], *, documents: bool = True
) -> list[dict[str, Any]]:
    """Turns a conversation into messages for `text.segments.render_chat`.

    Args:
        conversation: The conversation.
        passages: The passages that it is read with, in order; they are numbered from 1 on.
        documents: False leaves out all documents, citations with them.

    Returns:
        Messages whose contents are lists of strings and documents.
    """
    placed: dict[Place, list[str | Document]] = {Place.PASSAGES: [], Place.CITATIONS: []}
    if documents:
        numbered = list(enumerate(passages, start=1))
        placed[Place.PASSAGES] = [Document(p.text, str(n), p.title) for n, p in numbered]
        placed[Place.CITATIONS] = [f" [{n}]" for n, p in numbered if p.gold]
    messages = []
    for turn in conversation.turns:
        content: list[str | Document] = []
        for part in turn.content:
            content += placed[part] if isinstance(part, Place) else [part]
        if not documents:
            content = [part for part in content if isinstance(part, str)]
        messages.append({"role": turn.role, "content": _joined(content), "train": turn.train})
    return messages


def _joined(content: Sequence[str | Document]) -> list[str | Document]:
    """The same with texts that follow each other as one: parts are tokenized apart."""
    joined: list[str | Document] = []
    for part in content:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


class ConversationSource(HeldOutByPassage):
    """Base of the sources of conversations.

    Args:
        held_out: Share for validation, and the same again for test: of the gold passages, or of
            the conversations that have none.
        limit: Most conversations that are read; None reads all.
    """

    def read(self) -> Iterator[Conversation]:
        """Yields every conversation, in an order that never changes."""
        raise NotImplementedError

    def conversations(self, split: Split) -> Iterator[Conversation]:
        """Yields the conversations of one split."""
        return self._split_by_passage(self.read(), split)


class QuestionConversations(ConversationSource):
    """Questions as conversations: passages and question from the user, the answer to it.

    Args:
        source: The questions.
        prompt: The user's message; `{passages}` and `{question}` stand for what they say.
        system: The system's message; None has none.
        cite: Let the answer end with the numbers of its gold passages, such as ` [3]`.

    Raises:
        ValueError: If `prompt` lacks `{question}`, or has a field twice.
    """

    def __init__(
        self,
        source: QuestionSource,
        prompt: str = "{passages}Answer in a few words: {question}",
        system: str | None = None,
        cite: bool = False,
    ) -> None:
        super().__init__(source.held_out, source.limit)
        if prompt.count("{question}") != 1 or prompt.count("{passages}") > 1:
            raise ValueError(
                f"prompt ({prompt!r}) must have {{question}} once and {{passages}} at most once"
            )
        self.source = source
        self.prompt = prompt
        self.system = system
        self.cite = cite

    def read(self) -> Iterator[Conversation]:
        """Yields the conversation of each question."""
        return map(self.conversation, self.source.read())

    def conversations(self, split: Split) -> Iterator[Conversation]:
        """Yields the conversations of one split."""
        return map(self.conversation, self.source.questions(split))

    def conversation(self, question: Question) -> Conversation:
        """The conversation of a question."""
        fields: dict[str, str | Place] = {
            "{passages}": Place.PASSAGES,
            "{question}": question.question,
        }
        prompt = tuple(fields.get(part, part) for part in _FIELDS.split(self.prompt) if part)
        answer = (question.answers[0], *((Place.CITATIONS,) if self.cite else ()))
        turns = [Turn("user", prompt), Turn("assistant", answer)]
        if self.system is not None:
            turns.insert(0, Turn("system", (self.system,)))
        return Conversation(
            question.id,
            tuple(turns),
            question.passages,
            references=question.answers,
            kind=question.kind,
            task="answer",
        )

    def key(self) -> dict[str, Any]:
        """The questions' key and the settings."""
        return {
            "questions": self.source.key(),
            "prompt": self.prompt,
            "system": self.system,
            "cite": self.cite,
        }


class RetellConversations(ConversationSource):
    """Texts to be written again: a passage and a request from the user, the same passage to it.

    The passage is part of the user's message: it is read alone, whatever passages the data module
    draws for other conversations.

    Args:
        texts: The texts. Its own `held_out` must be 0.
        max_words: Cut texts into passages of at most so many words, between paragraphs or, where
            one is longer, between sentences; None takes each text whole.
        prompt: The user's message; `{passages}` stands for the passage.
        held_out: Share of the passages for validation, and the same again for test.
        limit: Most passages that are read.

    Raises:
        ValueError: If `prompt` lacks `{passages}`, or `texts` holds out texts of its own.
    """

    def __init__(
        self,
        texts: TextSource,
        max_words: int | None = 100,
        prompt: str = "{passages}Repeat the text.",
        held_out: float = 0.0,
        limit: int | None = None,
    ) -> None:
        super().__init__(held_out, limit)
        if prompt.count("{passages}") != 1:
            raise ValueError(f"prompt ({prompt!r}) must have {{passages}} once")
        check_cutting(texts, max_words)
        self.texts = texts
        self.max_words = max_words
        self.prompt = prompt

    def read(self) -> Iterator[Conversation]:
        """Yields the conversation of each passage."""
        before, after = self.prompt.split("{passages}")
        for passage in passages_of(self.texts, self.max_words):
            document = Document(passage.text, "1", passage.title)
            content = tuple(part for part in (before, document, after) if part)
            yield Conversation(
                passage.id,
                (Turn("user", content), Turn("assistant", (passage.text,))),
                references=(passage.text,),
                task="reconstruct",
            )

    def conversations(self, split: Split) -> Iterator[Conversation]:
        """Yields the conversations of one split; the same passage is not in two."""
        return self._split(self.read(), split, lambda conversation: conversation.answer)

    def key(self) -> dict[str, Any]:
        """The texts' key and the settings."""
        return {
            "retell": self.texts.key(),
            "max_words": self.max_words,
            "prompt": self.prompt,
            "held_out": self.held_out,
            "limit": self.limit,
        }
