"""One lasting thread that does one job after another.

A thread keeps what a computation's libraries set up for it, OpenMP's own threads and a part of the
heap; a thread for each job would set them up anew each time.
"""

from __future__ import annotations

import queue
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

Job = tuple[Callable[..., Any], tuple[Any, ...]]


class Worker:
    """Does jobs in the order in which they come, in a thread that starts with the first of them.

    Between jobs the thread refers to nothing but its queue: whoever owns the worker may go at any
    time, and the thread ends behind the jobs that were given until then. It does not keep the
    process from ending, as `concurrent.futures.ThreadPoolExecutor` would: there the interpreter
    waits for the job that runs, here for an answer that nobody reads any more.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        end = weakref.finalize(self, self._jobs.put, None)
        end.atexit = False

    def do(self, function: Callable[..., Any], *args: Any) -> None:
        """Has `function(*args)` called; whoever waits for it has to hear of errors from it."""
        self._jobs.put((function, args))
        with self._lock:
            # There is none yet, or it stayed behind in the process that this one is a fork of.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=self.name, daemon=True
                )
                self._thread.start()


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            function(*args)
        except BaseException:
            # As a thread that it ended would say it; the next jobs are done all the same.
            threading.excepthook(
                threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
            )
        del job, function, args
