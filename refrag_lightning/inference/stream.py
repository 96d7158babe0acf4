"""An answer, and the stream on which it arrives piece by piece."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from refrag_lightning.inference.citations import Citation
from refrag_lightning.inference.request import Request
from refrag_lightning.inference.trace import Trace

Finish = Literal["stop", "length", "stop_string", "cancelled"]
"""Why an answer ended: the model ended it, it is as long as it may be, a stop string came, or
somebody cancelled it."""

Cancel = Callable[[], bool] | threading.Event


class Cancelled(RuntimeError):
    """A request was cancelled before its prompt was read, so that there is no trace of it."""


@dataclass(frozen=True)
class Answer:
    """What a pipeline answered.

    Attributes:
        text: The answer, without control tokens.
        citations: The documents that it cites, in the order of their first mention.
        unknown_ids: Ids that it cites and no document has.
        finish: Why it ended.
        tokens: Tokens that the decoder wrote, the one that ended the answer left out.
        trace: What became of the documents, and where the time went. None if the request was
            cancelled before its prompt was read.
    """

    text: str
    citations: tuple[Citation, ...]
    unknown_ids: tuple[str, ...]
    finish: Finish
    tokens: int
    trace: Trace | None

    def as_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Plain data, for JSON; `rows` as in `Trace.as_dict`."""
        return {
            "text": self.text,
            "citations": [citation.as_dict() for citation in self.citations],
            "unknown_ids": list(self.unknown_ids),
            "finish": self.finish,
            "tokens": self.tokens,
            "trace": None if self.trace is None else self.trace.as_dict(rows=rows),
        }


class AnswerStream(Iterator[str]):
    """The pieces of an answer as they are written; together they are the answer's text.

    Somebody else works on it: iterating waits for the next piece. What goes wrong there is raised
    here. Leaving a `with` block on a stream cancels it.

    Args:
        request: What was asked.
        cancel: Says whether to stop, asked between tokens: a function or an event.
    """

    def __init__(self, request: Request, *, cancel: Cancel | None = None) -> None:
        self.request = request
        self.arrived = time.perf_counter()
        self._cancel = cancel
        self._cancelled = threading.Event()
        # Pieces, then one None.
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._traced = threading.Event()
        self._done = threading.Event()
        self._trace: Trace | None = None
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    # ---- whoever reads -----------------------------------------------------------------------

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get()
        if piece is None:
            self._pieces.put(None)  # asked again, it ends again
            if self._error is not None:
                raise self._error
            raise StopIteration
        return piece

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the answer before its next token; what was said until then stays."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody wants it to end."""
        if not self._cancelled.is_set() and self._cancel is not None:
            asked = self._cancel
            if asked.is_set() if isinstance(asked, threading.Event) else asked():
                self._cancelled.set()
        return self._cancelled.is_set()

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, or failed."""
        return self._done.is_set()

    @property
    def trace(self) -> Trace:
        """The trace; waits until the prompt is read.

        Raises:
            Cancelled: If the request was cancelled before that.
        """
        self._traced.wait()
        if self._trace is None:
            raise self._error or Cancelled("the request was cancelled before its prompt was read")
        return self._trace

    @property
    def answer(self) -> Answer:
        """The whole answer; waits until it is complete. Pieces may be read before or after."""
        return self.result()

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer.

        Args:
            timeout: Most seconds to wait for it; None waits as long as it takes.

        Raises:
            TimeoutError: If it is not complete by then.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the answer is not complete after {timeout} seconds")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    # ---- whoever writes ----------------------------------------------------------------------

    def begin(self, trace: Trace) -> None:
        """The prompt is read."""
        self._trace = trace
        self._traced.set()

    def put(self, piece: str) -> None:
        """Some more text."""
        self._pieces.put(piece)

    def finish(self, answer: Answer) -> None:
        """The answer is complete."""
        assert not self._done.is_set()
        self._answer = answer
        self._end()

    def fail(self, error: BaseException) -> None:
        """It went wrong; does nothing where the answer is complete."""
        if self._done.is_set():
            return
        self._error = error
        self._end()

    def _end(self) -> None:
        self._traced.set()
        self._done.set()
        self._pieces.put(None)
