"""Worker: jobs in order, in one thread, which ends with its owner."""

import gc
import queue
import subprocess
import sys
import threading
import weakref

import pytest

from refrag_lightning.inference.worker import Worker
from tests.inference.pipelines import QUESTION, RIVERS, pipeline


def test_jobs_are_done_in_order_by_one_thread():
    worker, done = Worker("w"), queue.Queue()
    for number in range(50):
        worker.do(lambda number: done.put((number, threading.current_thread())), number)
    results = [done.get(timeout=10) for _ in range(50)]
    assert [number for number, _ in results] == list(range(50))
    threads = {thread for _, thread in results}
    assert len(threads) == 1
    assert {(thread.name, thread.daemon) for thread in threads} == {("w", True)}


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_job_that_fails_is_told_and_the_next_ones_are_done(error, monkeypatch):
    told, done = [], queue.Queue()
    monkeypatch.setattr(threading, "excepthook", lambda what: told.append(what.exc_type))

    def fails():
        raise error("no")

    worker = Worker("w")
    worker.do(fails)
    worker.do(done.put, 1)
    assert done.get(timeout=10) == 1
    assert told == [error]


def test_the_thread_ends_with_its_owner_behind_the_last_job():
    worker, done, may = Worker("w"), queue.Queue(), threading.Event()
    worker.do(may.wait, 10)
    worker.do(lambda: done.put(threading.current_thread()))
    del worker
    gc.collect()
    may.set()
    thread = done.get(timeout=10)
    thread.join(10)
    assert not thread.is_alive()


def test_a_pipeline_streams_from_one_thread_that_does_not_keep_its_model():
    pipe = pipeline()
    before = threading.active_count()
    for _ in range(3):
        pipe.stream(QUESTION, RIVERS, max_new_tokens=2).result(60)
    assert threading.active_count() == before + 1
    gone = weakref.ref(pipe)
    thread = pipe._worker._thread
    del pipe
    gc.collect()
    thread.join(10)
    assert gone() is None and not thread.is_alive()


def test_a_pipeline_may_go_while_its_stream_is_answered():
    expected = pipeline()(QUESTION, RIVERS, max_new_tokens=30).text
    stream = pipeline().stream(QUESTION, RIVERS, max_new_tokens=30)
    gc.collect()
    assert stream.result(60).text == expected


def test_a_process_may_end_while_a_job_runs():
    code = (
        "import time\n"
        "from refrag_lightning.inference.worker import Worker\n"
        "worker = Worker('w')\n"
        "worker.do(time.sleep, 600)\n"
        "print('end')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "end\n"
