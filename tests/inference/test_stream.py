"""A stream: pieces, answer, trace, errors, cancelling; written by hand, without a model."""

import threading
from typing import Any

import pytest

from refrag_lightning.inference.request import Request
from refrag_lightning.inference.stream import Answer, AnswerStream, Cancelled

ANSWER = Answer("ab", (), (), "stop", 2, None)
TRACE: Any = object()


def stream(**options):
    return AnswerStream(Request.of("Where?"), **options)


def test_pieces_come_while_they_are_written():
    one = stream()
    go_on = threading.Event()

    def write():
        one.begin(TRACE)
        one.put("a")
        go_on.wait(5)
        one.put("b")
        one.finish(ANSWER)

    thread = threading.Thread(target=write)
    thread.start()
    assert one.trace is TRACE
    assert next(one) == "a" and not one.is_done
    go_on.set()
    assert list(one) == ["b"]
    assert list(one) == []
    assert one.answer is ANSWER and one.is_done
    thread.join()


def test_an_error_reaches_every_way_of_asking():
    one = stream()
    one.put("a")
    one.fail(ValueError("too long"))
    one.fail(ValueError("another"))
    assert next(one) == "a"
    for _ in range(2):
        with pytest.raises(ValueError, match="too long"):
            next(one)
    with pytest.raises(ValueError, match="too long"):
        _ = one.answer
    with pytest.raises(ValueError, match="too long"):
        _ = one.trace


def test_an_error_after_the_answer_changes_nothing():
    one = stream()
    one.finish(ANSWER)
    one.fail(ValueError("late"))
    assert one.answer is ANSWER


def test_waiting_has_an_end():
    with pytest.raises(TimeoutError, match=r"not complete after 0.01 seconds"):
        stream().result(timeout=0.01)


def test_a_stream_without_a_trace():
    one = stream()
    one.finish(Answer("", (), (), "cancelled", 0, None))
    with pytest.raises(Cancelled, match="before its prompt was read"):
        _ = one.trace


def test_ways_to_cancel():
    by_hand, event, wish = stream(), threading.Event(), []
    by_event, by_function = stream(cancel=event), stream(cancel=lambda: bool(wish))
    assert not any(one.is_cancelled for one in (by_hand, by_event, by_function))
    by_hand.cancel()
    event.set()
    wish.append(1)
    assert all(one.is_cancelled for one in (by_hand, by_event, by_function))
    wish.clear()
    assert by_function.is_cancelled  # once is enough
    with stream() as one:
        pass
    assert one.is_cancelled
