"""What a pipeline is asked: values out of range, and requests from a question."""

import pytest

from refrag_lightning.inference.request import Request, Sampling
from refrag_lightning.text.documents import Document


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be a whole number of at least 1"),
        ({"max_new_tokens": True}, r"max_new_tokens \(True\)"),
        ({"temperature": -0.5}, r"temperature \(-0.5\) must be at least 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be a number"),
        ({"temperature": "hot"}, r"temperature \('hot'\) must be a number"),
        ({"top_p": 0}, r"top_p \(0\) must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p \(1.5\)"),
        ({"top_k": -1}, r"top_k \(-1\) must be a whole number of at least 0"),
        ({"repetition_penalty": 0}, r"repetition_penalty \(0\) must be above 0"),
        ({"stop": ("a", "")}, r"stop \(\('a', ''\)\) must hold texts that are not empty"),
        ({"seed": -1}, r"seed \(-1\)"),
        ({"seed": 1 << 63}, r"seed \(9223372036854775808\) must be below 2\*\*63"),
    ],
)
def test_sampling_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_a_single_stop_string_is_one_string():
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": ()}, "messages is empty"),
        ({"messages": ("Where?",)}, "message 0 needs a role and a content, got 'Where"),
        ({"documents": ("text",)}, "entry 0 is no Document, got 'text'"),
        ({"expand": "some"}, r"expand \('some'\)"),
        ({"too_long": "cut"}, r"too_long \('cut'\) must be one of"),
        ({"prompt": "{passages}"}, r"must have \{passages\} and \{question\} once each"),
        ({"search": -1}, r"search \(-1\)"),
        ({"rate": 0}, r"rate \(0\)"),
    ],
)
def test_a_request_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"messages": ({"role": "user", "content": "a"},), **values})


def test_a_request_of_a_question():
    request = Request.of("Where?", ["text", Document("b", "7")], top_k=3, seed=5, search=2)
    assert request.messages == ({"role": "user", "content": "Where?"},)
    assert request.documents == (Document("text"), Document("b", "7"))
    assert request.sampling == Sampling(top_k=3, seed=5)
    assert request.search == 2


def test_a_request_of_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert Request.of(messages, sampling=Sampling(seed=1)).messages == tuple(messages)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="a request has no option temprature"):
        Request.of("Where?", temprature=1.0)
    with pytest.raises(TypeError, match="sampling and seed cannot be given together"):
        Request.of("Where?", sampling=Sampling(), seed=1)
