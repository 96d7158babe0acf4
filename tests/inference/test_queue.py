"""BatchingQueue: batches, limits, failures, and nobody's text in another's answer."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.inference.queue import BatchingQueue, QueueClosed, QueueFull
from refrag_lightning.inference.request import Request
from refrag_lightning.inference.stream import Answer
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.documents import Document
from tests.inference.pipelines import QUESTION, RIVERS, pipeline, plain_parts
from tests.model.test_reading import random_decoder

WAIT = 20.0


def asked(text="Where?", **options):
    return Request.of(text, **options)


class Echo:
    """Answers each request with its own question; holds the first batch until it may go on."""

    def __init__(self, *, hold=False):
        self.batches = []
        self.started = threading.Event()
        self.go_on = threading.Event()
        if not hold:
            self.go_on.set()

    def run(self, streams):
        self.batches.append([stream.request.messages[0]["content"] for stream in streams])
        self.started.set()
        self.go_on.wait(WAIT)
        for stream in streams:
            finish = "cancelled" if stream.is_cancelled else "stop"
            text = stream.request.messages[0]["content"]
            stream.put(text)
            stream.finish(Answer(text, (), (), finish, 1, None))


def test_requests_that_come_together_are_one_batch():
    echo = Echo()
    with BatchingQueue(echo, max_wait=WAIT, max_batch_size=3) as queue:
        streams = [queue.submit(asked(f"q{n}")) for n in range(6)]
        assert [stream.result(WAIT).text for stream in streams] == [f"q{n}" for n in range(6)]
    assert echo.batches == [["q0", "q1", "q2"], ["q3", "q4", "q5"]]


def test_a_lone_request_waits_max_wait_and_no_longer():
    echo = Echo()
    with BatchingQueue(echo, max_wait=0.2) as queue:
        start = time.perf_counter()
        queue.submit(asked()).result(WAIT)
        assert 0.2 <= time.perf_counter() - start < 2
    with BatchingQueue(echo, max_wait=0) as queue:
        start = time.perf_counter()
        queue.submit(asked()).result(WAIT)
        assert time.perf_counter() - start < 0.2


def test_what_comes_while_a_batch_runs_is_the_next_batch():
    echo = Echo(hold=True)
    with BatchingQueue(echo, max_wait=0) as queue:
        first = queue.submit(asked("first"))
        assert echo.started.wait(WAIT)
        others = [queue.submit(asked(f"q{n}")) for n in range(3)]
        assert len(queue) == 3
        echo.go_on.set()
        for stream in (first, *others):
            stream.result(WAIT)
    assert echo.batches == [["first"], ["q0", "q1", "q2"]]


def test_a_full_queue_refuses():
    echo = Echo(hold=True)
    with BatchingQueue(echo, max_wait=0, max_queue=2) as queue:
        queue.submit(asked("runs"))
        assert echo.started.wait(WAIT)
        waiting = [queue.submit(asked(f"q{n}")) for n in range(2)]
        with pytest.raises(QueueFull, match=r"max_queue \(2\) requests are waiting already"):
            queue.submit(asked("late"))
        # Somebody who gave up makes room.
        waiting[0].cancel()
        late = queue.submit(asked("late"))
        assert waiting[0].result(0.1).finish == "cancelled"
        echo.go_on.set()
        assert late.result(WAIT).text == "late"


def test_closing_answers_what_waits():
    echo = Echo(hold=True)
    queue = BatchingQueue(echo, max_wait=0)
    first = queue.submit(asked("first"))
    assert echo.started.wait(WAIT)
    second = queue.submit(asked("second"))
    with pytest.raises(TimeoutError, match=r"the queue is not done after 0\.05 seconds"):
        queue.close(timeout=0.05)
    with pytest.raises(QueueClosed, match="the queue is closed"):
        queue.submit(asked("late"))
    echo.go_on.set()
    queue.close()
    assert (first.answer.text, second.answer.text) == ("first", "second")


def test_closing_at_once_cancels():
    echo = Echo(hold=True)
    queue = BatchingQueue(echo, max_wait=0)
    first = queue.submit(asked("first"))
    assert echo.started.wait(WAIT)
    second = queue.submit(asked("second"))
    threading.Timer(0.1, echo.go_on.set).start()
    queue.close(drain=False)
    assert (first.answer.finish, second.answer.finish) == ("cancelled", "cancelled")
    assert echo.batches == [["first"]]


def test_a_broken_worker_reaches_everybody_who_waits():
    class Broken(Echo):
        def run(self, streams):
            self.started.set()
            self.go_on.wait(WAIT)
            raise SystemError("the device is gone")

    broken = Broken(hold=True)
    queue = BatchingQueue(broken, max_wait=0)
    first = queue.submit(asked("first"))
    assert broken.started.wait(WAIT)
    second = queue.submit(asked("second"))
    broken.go_on.set()
    for stream in (first, second):
        with pytest.raises(SystemError, match="the device is gone"):
            stream.result(WAIT)
    with pytest.raises(QueueClosed, match="the queue broke: the device is gone"):
        queue.submit(asked("late"))
    queue.close()


@pytest.mark.parametrize("name", ["max_batch_size", "max_queue"])
def test_limits_must_be_possible(name):
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
        BatchingQueue(Echo(), **{name: 0})
    with pytest.raises(ValueError, match=r"max_wait \(-1\) must be at least 0"):
        BatchingQueue(Echo(), max_wait=-1)


def test_nobody_gets_anothers_answer():
    """Threads with different documents and seeds: each answer is what it is alone."""

    def request(number):
        # Random weights answer alike to like questions, so sampling tells them apart.
        return Request.of(
            f"{QUESTION} {number}",
            [*RIVERS[: number % 3], Document(f"Secret {number * 7919}.")],
            max_new_tokens=4 + number % 5,
            temperature=1.0 if number % 4 else 0.0,
            seed=number,
            rate=(4, 8)[number % 2],
        )

    alone_pipe = pipeline()
    alone = [alone_pipe(r.messages, r.documents, **rest(r)) for r in map(request, range(24))]
    assert len({answer.text for answer in alone}) > 12
    with BatchingQueue(pipeline(), max_wait=0.05) as queue, ThreadPoolExecutor(8) as threads:

        def submit(number):
            stream = queue.submit(request(number))
            return "".join(stream), stream.answer

        together = list(threads.map(submit, range(24)))
    for (said, answer), expected in zip(together, alone, strict=True):
        assert said == answer.text == expected.text
        assert answer.finish == expected.finish
    assert max(answer.trace.batch_size for _, answer in together) > 1


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_line_that_waits_for_the_longest_answer_stays_inside_the_position_table(family):
    tokenizer = plain_parts()[1]
    decoder = random_decoder(family, max_position_embeddings=128)
    decoder.resize_token_embeddings(len(tokenizer.decoder))
    decoder.generation_config.eos_token_id = None
    pipe = RefragPipeline(PlainModel(decoder), tokenizer)
    assert pipe.window == 128
    requests = [
        asked("Where? " * 20, max_new_tokens=4),
        asked("Where?", max_new_tokens=60),
        asked("Who?", max_new_tokens=5),
    ]
    alone = [pipe(r.messages, sampling=r.sampling) for r in requests]
    assert alone[0].trace.positions + 60 > 128
    with BatchingQueue(pipe, max_wait=WAIT, max_batch_size=3) as queue:
        streams = [queue.submit(request) for request in requests]
        assert [stream.result(WAIT).text for stream in streams] == [a.text for a in alone]
    # Those that fit are answered together.
    assert [stream.answer.trace.batch_size for stream in streams] == [2, 1, 2]


def rest(request):
    return {"sampling": request.sampling, "rate": request.rate}
