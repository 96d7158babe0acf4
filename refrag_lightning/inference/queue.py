"""BatchingQueue: requests that come at about the same time are answered together.

One thread works. It takes the request that waits longest, waits up to `max_wait` seconds for
others to come, and answers them as one batch. What comes while a batch runs waits for the next one.
So with fewer than `max_batch_size` requests ahead of it, a request waits at most for the batch that
runs and `max_wait`; every further `max_batch_size` ahead cost one batch more. How long a batch runs
is bounded by the `max_new_tokens` of its requests.

A queue that is full refuses: a request that would be answered too late is better told so at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from refrag_lightning.inference.request import Request
from refrag_lightning.inference.stream import Answer, AnswerStream, Cancel


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class QueueClosed(RuntimeError):
    """The queue takes no more requests."""


class Runner(Protocol):
    """What answers a batch: a `RefragPipeline`."""

    def run(self, streams: Sequence[AnswerStream]) -> None:
        """Answers several requests, each on its stream."""
        ...


class BatchingQueue:
    """Puts requests into batches for a pipeline. Threads may submit at will.

    Args:
        pipeline: What answers them.
        max_batch_size: Most requests of a batch.
        max_wait: Seconds that a request waits for others to join it.
        max_queue: Most requests that wait, beside those of the batch that runs.

    Raises:
        ValueError: If a limit is out of its range.
    """

    def __init__(
        self,
        pipeline: Runner,
        *,
        max_batch_size: int = 8,
        max_wait: float = 0.02,
        max_queue: int = 64,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size ({max_batch_size}) must be at least 1")
        if max_wait < 0:
            raise ValueError(f"max_wait ({max_wait}) must be at least 0")
        if max_queue < 1:
            raise ValueError(f"max_queue ({max_queue}) must be at least 1")
        self.pipeline = pipeline
        self.max_batch_size = max_batch_size
        self.max_wait = max_wait
        self.max_queue = max_queue
        self._waiting: deque[AnswerStream] = deque()
        self._running: list[AnswerStream] = []
        self._changed = threading.Condition()
        self._closed = False
        self._broken: BaseException | None = None
        self._worker = threading.Thread(target=self._work, name="batches", daemon=True)
        self._worker.start()

    def __enter__(self) -> BatchingQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, request: Request, *, cancel: Cancel | None = None) -> AnswerStream:
        """Puts a request into the queue.

        Args:
            request: The request.
            cancel: Asked between tokens whether to stop.

        Returns:
            The stream on which it will be answered.

        Raises:
            QueueFull: If `max_queue` requests wait already.
            QueueClosed: If the queue was closed, or its thread broke.
        """
        stream = AnswerStream(request, cancel=cancel)
        with self._changed:
            if self._broken is not None:
                raise QueueClosed(f"the queue broke: {self._broken}") from self._broken
            if self._closed:
                raise QueueClosed("the queue is closed")
            if len(self._waiting) >= self.max_queue:
                self._drop_cancelled()
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"max_queue ({self.max_queue}) requests are waiting already")
            self._waiting.append(stream)
            self._changed.notify_all()
        return stream

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends the thread.

        Args:
            drain: Answer what waits; otherwise it is cancelled, and what runs too.
            timeout: Most seconds to wait for that; None waits as long as it takes.

        Raises:
            TimeoutError: If it is not done by then.
        """
        with self._changed:
            self._closed = True
            if not drain:
                for stream in (*self._waiting, *self._running):
                    stream.cancel()
                self._drop_cancelled()
            self._changed.notify_all()
        self._worker.join(timeout)
        if self._worker.is_alive():
            raise TimeoutError(f"the queue is not done after {timeout} seconds")

    def _work(self) -> None:
        try:
            while batch := self._next():
                self.pipeline.run(batch)
                with self._changed:
                    self._running = []
        except BaseException as error:
            with self._changed:
                self._broken = error
                left = [*self._running, *self._waiting]
                self._waiting.clear()
            for stream in left:
                stream.fail(error)

    def _next(self) -> list[AnswerStream]:
        """The next batch; waits for one. Empty once the queue is closed and nothing waits."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._waiting:
                    break
                if self._closed:
                    return []
                self._changed.wait()
            ready = self._waiting[0].arrived + self.max_wait
            while len(self._waiting) < self.max_batch_size and not self._closed:
                left = ready - time.perf_counter()
                if left <= 0 or not self._changed.wait(left):
                    break
            size = min(self.max_batch_size, len(self._waiting))
            self._running = [self._waiting.popleft() for _ in range(size)]
            return list(self._running)

    def _drop_cancelled(self) -> None:
        """Ends the streams that were cancelled while they waited."""
        kept: deque[AnswerStream] = deque()
        for stream in self._waiting:
            if stream.is_cancelled:
                stream.finish(Answer("", (), (), "cancelled", 0, None))
            else:
                kept.append(stream)
        self._waiting = kept
