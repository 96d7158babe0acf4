"""A conversation with a pipeline: what was said, which documents are at hand, what can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_lightning.text.documents import Document, Part, parse

if TYPE_CHECKING:
    from refrag_lightning.inference.citations import Citation
    from refrag_lightning.inference.pipeline import RefragPipeline
    from refrag_lightning.inference.stream import Answer, AnswerStream
    from refrag_lightning.inference.trace import Trace


@dataclass
class Turn:
    """One question and what was said to it.

    Attributes:
        question: As it was typed.
        parts: The question's texts and the documents that were typed with it.
        text: The answer, as far as it came.
        stopped: Whether it was broken off.
        answer: What the pipeline sums up at the end; None where that was not waited for.
        trace: What was read for it; None where it was broken off before.
    """

    question: str
    parts: list[Part]
    text: str = ""
    stopped: bool = False
    answer: Answer | None = None
    trace: Trace | None = None

    @property
    def citations(self) -> Sequence[Citation]:
        """The documents that the answer cites."""
        return self.answer.citations if self.answer is not None else ()

    @property
    def unknown_ids(self) -> Sequence[str]:
        """Ids that the answer cites and no document has."""
        return self.answer.unknown_ids if self.answer is not None else ()


class Reply:
    """An answer while it is given: iterate over its pieces, then look at `turn`.

    Args:
        turn: The question; the answer is written into it.
        start: Starts the pipeline; it is given what says that the answer shall end.
        done: Called with the turn when the answer has ended or was broken off. Not called if the
            pipeline fails.
    """

    def __init__(
        self,
        turn: Turn,
        start: Callable[[Callable[[], bool]], AnswerStream],
        done: Callable[[Turn], None] | None = None,
    ) -> None:
        self.turn = turn
        self._start = start
        self._done = done
        self._stream: AnswerStream | None = None
        self._stopping = False

    def __iter__(self) -> Iterator[str]:
        """Gives the pieces of the answer as they come.

        Raises:
            ValueError: The pipeline refuses the question or its documents.
        """
        self._stream = self._start(lambda: self._stopping)
        for piece in self._stream:
            self.turn.text += piece
            if self.turn.trace is None:
                self.turn.trace = self._stream.trace
            yield piece
        answer = self._stream.answer
        self.turn.answer, self.turn.text, self.turn.trace = answer, answer.text, answer.trace
        self._end(stopped=answer.finish == "cancelled")

    def stop(self) -> None:
        """Ends the answer at its next token; a signal handler may call it."""
        # A plain attribute: setting an Event takes a lock, which the interrupted code may hold.
        self._stopping = True

    def give_up(self) -> None:
        """Takes what has come for the whole answer, where its end cannot be waited for."""
        self._stopping = True
        self._end(stopped=True)

    def wait(self, seconds: float) -> None:
        """Waits until the model has stopped writing, at most so many seconds."""
        if self._stream is not None:
            # What went wrong there was told by the iteration, or nobody wants to know any more.
            with suppress(Exception):
                self._stream.result(seconds)

    def _end(self, *, stopped: bool) -> None:
        done, self._done = self._done, None
        self.turn.stopped = stopped
        if done is not None:
            done(self.turn)


@dataclass
class Session:
    """What a chat remembers; nothing here knows of a terminal.

    Attributes:
        pipeline: What answers.
        model_name: What the user calls the model.
        system: The system's message, if any.
        options: For every question, as the pipeline takes them.
        documents: Given to every question.
        turns: What was asked and said.
        saved: Files that the conversation was written to.
    """

    pipeline: RefragPipeline
    model_name: str
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    saved: set[Path] = field(default_factory=set)
    _numbered: int = 0
    _latest: Reply | None = None

    @property
    def last(self) -> Turn:
        """The last question and answer.

        Raises:
            ValueError: Nothing has been asked yet.
        """
        if not self.turns:
            raise ValueError("nothing has been asked yet")
        return self.turns[-1]

    def ask(self, question: str) -> Reply:
        """Asks a question; the answer begins when the reply is iterated over.

        A question may hold `<doc>` blocks. What only looks like a tag is text.

        Raises:
            ValueError: The question is empty.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        parts = parse(question, strict=False, first_number=self._numbered + 1)
        self._numbered += sum(isinstance(part, Document) for part in parts)
        return self._reply(Turn(question, parts), self.turns, self.options, self.turns.append)

    def ask_with_full_text(self) -> Reply:
        """Asks the last question again, every document as text; the conversation stays as it is.

        Raises:
            ValueError: Nothing has been asked yet, or full text is what was read.
        """
        trace = self.last.trace
        if trace is not None and not trace.placed:
            raise ValueError("the last question was answered without documents")
        if trace is not None and set(trace.origins) == {"text"}:
            raise ValueError("the last question was answered from full text already")
        turn = Turn(self.last.question, self.last.parts)
        return self._reply(turn, self.turns[:-1], {**self.options, "expand": "all"}, None)

    def add(self, documents: Iterable[Document]) -> list[Document]:
        """Gives documents to every question from now on.

        Args:
            documents: They get the next free numbers as their ids, so that an answer can cite them.

        Returns:
            The documents with their numbers.
        """
        added = []
        for document in documents:
            self._numbered += 1
            added.append(replace(document, id=str(self._numbered)))
        self.documents += added
        return added

    def clear(self, *, documents: bool = False) -> None:
        """Forgets the conversation, and with `documents` the documents."""
        self.turns.clear()
        if documents:
            self.documents.clear()
            self._numbered = 0

    def close(self, seconds: float = 10.0) -> None:
        """Ends an answer that is still being written.

        A process that ends while a thread of it computes may crash, so this waits for the thread,
        at most so many seconds.
        """
        if self._latest is not None:
            self._latest.stop()
            self._latest.wait(seconds)

    def messages(self, turns: Sequence[Turn], parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The conversation as the pipeline takes it, all contents as lists of texts and documents.

        An answer that was broken off before its first word is left out with its question.

        Args:
            turns: What was said before.
            parts: What is asked now.
        """
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [self.system]})
        for turn in turns:
            if turn.text:
                messages.append({"role": "user", "content": turn.parts})
                messages.append({"role": "assistant", "content": [turn.text]})
        messages.append({"role": "user", "content": [*parts]})
        return messages

    def _reply(
        self,
        turn: Turn,
        before: Sequence[Turn],
        options: dict[str, Any],
        done: Callable[[Turn], None] | None,
    ) -> Reply:
        messages, documents = self.messages(before, turn.parts), tuple(self.documents)

        def start(stopping: Callable[[], bool]) -> AnswerStream:
            return self.pipeline.stream(messages, documents, cancel=stopping, **options)

        self._latest = Reply(turn, start, done)
        return self._latest
