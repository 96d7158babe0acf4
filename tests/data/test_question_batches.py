"""QuestionDataModule: the passages of a question, and whose documents the controls read."""

import pytest

from refrag_lightning import RefragTokenizer
from refrag_lightning.data.question_batches import QuestionDataModule
from refrag_lightning.data.questions import Passage, Question, QuestionSource


class Questions(QuestionSource):
    """Questions with a gold passage at a place of their own."""

    def __init__(self, questions):
        super().__init__()
        self.given = questions

    def read(self):
        return iter(self.given)

    def key(self):
        return {"here": len(self.given)}


def _question(n, gold=2, number=4):
    passages = [Passage(f"Text {n}.{p}.", str(p), f"Title {p}", p == gold) for p in range(number)]
    return Question(
        f"q{n}", f"What is {n}?", (f"It is {n}", "else"), tuple(passages), "one", "date"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return RefragTokenizer.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)


def _data(tokenizer, questions, **options):
    return QuestionDataModule(Questions(questions), tokenizer=tokenizer, **options)


def _texts(asked):
    return [passage.text[-3:-1] for passage in asked.passages]


@pytest.mark.parametrize(
    ("order", "number", "expected"),
    [
        ("given", None, [".0", ".1", ".2", ".3"]),
        ("given", 2, [".0", ".2"]),
        ("given", 1, [".2"]),
        ("gold_first", 3, [".2", ".0", ".1"]),
        ("gold_last", 3, [".0", ".1", ".2"]),
    ],
)
def test_passages_are_chosen_and_ordered(tokenizer, order, number, expected):
    (asked,) = _data(tokenizer, [_question(0)], order=order, num_passages=number).questions
    assert _texts(asked) == expected
    assert asked.gold_place == expected.index(".2")
    assert asked.gold_ids == [str(expected.index(".2") + 1)]
    assert asked.ids == [str(n + 1) for n in range(len(expected))]


def test_gold_goes_through_all_places_and_numbers_are_dealt_out(tokenizer):
    questions = [_question(n) for n in range(8)]
    spread = _data(tokenizer, questions, order="gold_spread").questions
    assert [asked.gold_place for asked in spread] == [0, 1, 2, 3] * 2
    dealt = _data(tokenizer, questions, num_passages=[1, 3]).questions
    assert [asked.num_passages for asked in dealt] == [1, 3] * 4
    both = _data(tokenizer, questions, num_passages=[2, 4], order="gold_spread").questions
    assert [asked.gold_place for asked in both[::2]] == [0, 1, 0, 1]
    assert [asked.gold_place for asked in both[1::2]] == [0, 1, 2, 3]


def test_a_weak_retriever_misses_gold_passages(tokenizer):
    questions = [_question(n) for n in range(200)]
    missing = [
        asked.gold_place is None
        for asked in _data(tokenizer, questions, num_passages=3, drop_gold=0.3).questions
    ]
    # 60 expected, give or take three standard deviations of 6.5.
    assert 40 < sum(missing) < 80
    asked = _data(tokenizer, questions, num_passages=3, drop_gold=1.0).questions[0]
    assert _texts(asked) == [".0", ".1", ".3"] and asked.gold_ids == []
    # What the question shares with others is known though it is not read.
    (whole,) = _data(tokenizer, questions[:1]).questions
    assert asked.golds == whole.golds == tuple(p.text for p in whole.passages if p.gold)
    assert asked.golds


def test_choices_do_not_depend_on_other_questions(tokenizer):
    options = {"order": "shuffled", "drop_gold": 0.5, "seed": 3}
    whole = _data(tokenizer, [_question(n) for n in range(20)], **options).questions
    fewer = _data(tokenizer, [_question(n) for n in range(5)], **options).questions
    assert [a.passages for a in whole[:5]] == [a.passages for a in fewer]
    assert len({tuple(_texts(a)) for a in whole}) > 5


def test_segments_are_the_conversation_with_the_first_answer_trained(tokenizer):
    (asked,) = _data(
        tokenizer, [_question(7)], num_passages=1, prompt="{passages}Q: {question}"
    ).questions
    text = "".join(segment.text for segment in asked.segments)
    assert "[1] Title 2\nText 7.2.\nQ: What is 7?<|im_end|>" in text
    assert [s.text for s in asked.segments if s.train] == ["It is 7", "<|im_end|>"]
    prompt = "".join(segment.text for segment in asked.prompt)
    assert text.startswith(prompt) and prompt.endswith("assistant\n")
    assert not any(segment.train for segment in asked.prompt)
    assert asked.references == ("It is 7", "else")


def test_controls_read_documents_that_are_none_of_the_question(tokenizer):
    # Three questions on the same passages, as of one group of people, and one on others.
    same = [_question(0)] * 3
    data = _data(tokenizer, [*same, _question(1)])
    assert [data.other(n).id for n in range(4)] == ["q1", "q1", "q1", "q0"]
    batch = data.collate([1, 3])
    assert batch.others[0] == [f"Text 1.{p}." for p in range(4)]
    assert batch.to("cpu") is batch
    # The readings say so where one of them wants other documents, and only there.
    assert _data(tokenizer, same).collate([0]).others == [[]]
    assert _data(tokenizer, [_question(0, number=0)]).collate([0]).others == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_passages": [2, 0]}, "num_passages"), ({"drop_gold": 1.5}, r"drop_gold \(1.5\)")],
)
def test_bad_settings_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        _data(tokenizer, [], **options)


def test_no_question_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no question in split 'train'"):
        _ = _data(tokenizer, []).questions
