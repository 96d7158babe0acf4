"""RefragPipeline: answers, streams, stops, errors; alone and in batches."""

import threading

import pytest
import torch

from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.inference.request import Request
from refrag_lightning.inference.stream import AnswerStream
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.retrieval.passages import Passage
from refrag_lightning.retrieval.search import Hit
from refrag_lightning.text.documents import Document
from tests.inference.pipelines import (
    PO,
    QUESTION,
    RHINE,
    RIVERS,
    SEINE,
    MemoryStore,
    parts,
    pipeline,
    plain_parts,
)
from tests.text.loading import DECODERS


def streams(*requests):
    return [AnswerStream(Request.of(*asked, **options)) for *asked, options in requests]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", [{}, {"expand": "all"}, {"rate": 8}])
def test_the_greedy_answer_is_the_models(decoder, options):
    model, tokenizer = parts(decoder)
    pipe = pipeline(decoder)
    answer = pipe(QUESTION, RIVERS, max_new_tokens=12, **options)
    documents = [Document(d.text, str(n), d.title) for n, d in enumerate(RIVERS, start=1)]
    batch = tokenizer.at(options.get("rate", 4)).apply_chat(
        [{"role": "user", "content": [*documents, QUESTION]}], expand=options.get("expand", "none")
    )
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=pipe.end_ids)[
        0
    ].tolist()
    ends = [place for place, token in enumerate(tokens) if token in pipe.end_ids]
    said = tokens[: ends[0]] if ends else tokens
    expected = tokenizer.decoder.decode(
        said, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert answer.text == expected.strip()
    assert answer.tokens == len(said) == answer.trace.new_tokens
    assert answer.finish == ("stop" if ends else "length")


def test_the_turns_end_is_an_end():
    for decoder, ends in {"tiny/decoder": ["<|im_end|>"], "tiny/gemma": ["<end_of_turn>"]}.items():
        pipe = pipeline(decoder)
        ids = pipe.tokenizer.decoder.convert_tokens_to_ids(ends)
        assert set(ids) <= set(pipe.end_ids)


def test_a_stream_is_the_answer_in_pieces():
    expected = pipeline()(QUESTION, RIVERS, max_new_tokens=20)
    stream = pipeline().stream(QUESTION, RIVERS, max_new_tokens=20)
    trace = stream.trace
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == expected.text
    assert len(pieces) > 1 and all(pieces)
    assert stream.answer.trace is trace
    assert stream.answer.trace.positions == expected.trace.positions


def test_stored_rows_give_the_answer_of_fresh_ones():
    model, tokenizer = parts()
    store = MemoryStore()
    store.add(model, tokenizer, [SEINE, RHINE, PO])
    stored = pipeline(store=store)(QUESTION, RIVERS, max_new_tokens=12)
    fresh = pipeline()(QUESTION, RIVERS, max_new_tokens=12)
    assert stored.trace.origins == ["store"] * 3
    assert stored.text == fresh.text


def test_a_model_without_an_encoder_reads_documents_as_text():
    model, tokenizer = plain_parts()
    answer = RefragPipeline(model, tokenizer)(QUESTION, RIVERS, max_new_tokens=8)
    refrag = pipeline()(QUESTION, RIVERS, max_new_tokens=8, expand="all")
    assert answer.text == refrag.text


def test_a_stop_string_ends_an_answer():
    whole = pipeline()(QUESTION, RIVERS, max_new_tokens=30).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = pipeline()(QUESTION, RIVERS, max_new_tokens=30, stop=(stop,))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish == "stop_string"
    assert answer.tokens < 30


def test_cancelling_stops_between_tokens():
    stream = pipeline().stream(QUESTION, RIVERS, max_new_tokens=4000 - 200)
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    answer = stream.answer
    assert answer.finish == "cancelled"
    assert answer.text == first + "".join(rest)
    assert 0 < answer.tokens < 3800


def test_a_call_can_be_cancelled_by_a_function_and_an_event():
    asked = []

    def after_three():
        asked.append(1)
        return len(asked) > 4  # once before it starts, then before each token

    answer = pipeline()(QUESTION, RIVERS, max_new_tokens=100, cancel=after_three)
    assert (answer.finish, answer.tokens) == ("cancelled", 3)
    event = threading.Event()
    event.set()
    answer = pipeline()(QUESTION, RIVERS, cancel=event)
    assert (answer.finish, answer.text, answer.trace) == ("cancelled", "", None)


def test_sampling_goes_by_the_seed():
    def said(**options):
        return pipeline()(QUESTION, RIVERS, max_new_tokens=10, temperature=2.0, **options)

    one = said(seed=1)
    assert one.text == said(seed=1).text != said(seed=2).text
    drawn = said()
    assert said(seed=drawn.trace.seed).text == drawn.text
    assert pipeline()(QUESTION, max_new_tokens=2).trace.seed is None


def test_the_repetition_penalty_is_heard():
    pipe = pipeline()
    plain = pipe(QUESTION, max_new_tokens=30)
    assert plain.text != pipe(QUESTION, max_new_tokens=30, repetition_penalty=50.0).text


REQUESTS = [
    (QUESTION, RIVERS, {"max_new_tokens": 9}),
    ("Who?", (), {"max_new_tokens": 5, "temperature": 1.5, "seed": 3}),
    (QUESTION, RIVERS[1:], {"rate": 8, "max_new_tokens": 7, "temperature": 0.8, "seed": 3}),
    ("Why?", RIVERS[:1], {"expand": "all", "max_new_tokens": 12}),
    ("Why?", RIVERS, {"expand": [[0], "none", "all"], "max_new_tokens": 3, "top_k": 5}),
]


@pytest.mark.parametrize("decoder", ["tiny/decoder", "tiny/gemma"])
def test_an_answer_in_a_batch_is_the_answer_alone(decoder):
    together = streams(*REQUESTS)
    pipeline(decoder).run(together)
    for stream, (asked, documents, options) in zip(together, REQUESTS, strict=True):
        alone = pipeline(decoder)(asked, documents, **options)
        assert stream.answer.text == alone.text
        assert stream.answer.finish == alone.finish
        assert stream.answer.tokens == alone.tokens
        assert stream.answer.trace.batch_size == len(REQUESTS)
        assert stream.trace.positions == alone.trace.positions


def test_a_wrong_request_of_a_batch_fails_alone():
    wrong = [
        ("</doc>", (), {}),
        (QUESTION, RIVERS, {"rate": 5}),
        (QUESTION, RIVERS, {"search": 3}),
        (QUESTION, [Document("a \ud800 b")], {}),
        (QUESTION, RIVERS, {"expand": [[99], "none", "none"]}),
        (QUESTION, RIVERS, {"max_new_tokens": 5000}),
    ]
    messages = [
        "stray </doc>",
        r"compression \(5\) must be one of rates \(\[4, 8\]\)",
        r"search \(3\) needs an index",
        "surrogate|is no character",
        "document '1' has [0-9]+ rows, no row 99",
        "but the decoder has 4096",
    ]
    good = (QUESTION, RIVERS, {"max_new_tokens": 4})
    together = streams(good, *wrong, good)
    pipeline().run(together)
    expected = pipeline()(QUESTION, RIVERS, max_new_tokens=4).text
    assert together[0].answer.text == together[-1].answer.text == expected
    for stream, message in zip(together[1:-1], messages, strict=True):
        with pytest.raises(ValueError, match=message):
            _ = stream.answer


def test_a_failing_model_reaches_everybody():
    pipe = pipeline()
    together = streams(*REQUESTS[:2])

    class Broken(torch.nn.Module):
        def generate(self, **_):
            raise RuntimeError("out of memory")

    pipe.model = Broken()
    pipe.model.weight = torch.nn.Parameter(torch.zeros(1))
    pipe.run(together)
    for stream in together:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream)


def test_errors_of_a_stream_are_raised_where_it_is_read():
    stream = pipeline().stream("a </doc> b")
    with pytest.raises(ValueError, match="stray </doc>"):
        list(stream)
    with pytest.raises(ValueError, match="top_p"):
        pipeline().stream(QUESTION, top_p=2.0)


class Finds:
    """Finds the same passages for every query."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        passages = [
            Passage("seine#2", "seine", "Seine", SEINE, 7, 7 + len(SEINE), "rivers.md"),
            Passage("rhine", "rhine", "Rhine", RHINE, 0, len(RHINE), "rivers.md"),
        ]
        hits = [Hit(p, 1 / n, n, {"bm25": n}) for n, p in enumerate(passages, start=1)]
        return [hits[:k] for _ in queries]


def test_searched_passages_are_numbered_and_traced():
    searcher = Finds()
    pipe = pipeline(searcher=searcher)
    answer = pipe(QUESTION, [Document(PO, "po")], search=2, max_new_tokens=2)
    assert searcher.asked == [([QUESTION], 2)]
    placed = answer.trace.placed
    assert [p.document.id for p in placed] == ["po", "1", "2"]
    assert [p.passage_id for p in placed] == ["", "seine#2", "rhine"]
    assert [p.score for p in placed] == [None, 1.0, 0.5]
    assert placed[1].start == 7
    assert answer.trace.seconds.search > 0


def test_a_batch_is_searched_for_at_once():
    searcher = Finds()
    together = streams(
        (QUESTION, (), {"search": 1, "max_new_tokens": 1}),
        ("Who?", (), {"max_new_tokens": 1}),
        ("Why?", (), {"search": 2, "max_new_tokens": 1}),
        ("  ", (), {"search": 2, "max_new_tokens": 1}),
    )
    pipeline(searcher=searcher).run(together)
    found = [len(stream.answer.trace.placed) for stream in together[:3]]
    assert found == [1, 0, 2]
    with pytest.raises(ValueError, match="says nothing that could be searched for"):
        _ = together[3].answer


def test_citations_are_resolved(monkeypatch):
    pipe = pipeline(searcher=Finds())
    tokenizer = pipe.tokenizer
    [said] = tokenizer.plain_decoder(["It passes Paris [1], Basel [2] and Rome [9]."])
    written = iter([*said.ids.tolist(), pipe.end_ids[0]])

    def generate(stopping_criteria, logits_processor, input_ids, **_):
        tokens = torch.zeros((1, 0), dtype=torch.long)
        for processor in logits_processor:
            processor(tokens, torch.zeros(1, 4))
        for token in written:
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
            if stopping_criteria[0](tokens, None).all():
                return

    monkeypatch.setattr(type(pipe.model), "generate", lambda self, **kw: generate(**kw))
    answer = pipe(QUESTION, search=2)
    assert answer.finish == "stop"
    assert [(c.id, c.document_id, c.passage_id) for c in answer.citations] == [
        ("1", "seine", "seine#2"),
        ("2", "rhine", "rhine"),
    ]
    assert answer.unknown_ids == ("9",)
    assert (answer.citations[0].start, answer.citations[0].text) == (7, SEINE)


@pytest.mark.parametrize("kind", ["run", "model", "plain"])
def test_from_pretrained(tmp_path, kind):
    model, tokenizer = plain_parts() if kind == "plain" else parts()
    folder = tmp_path / "model" if kind == "run" else tmp_path
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = RefragPipeline.from_pretrained(tmp_path)
    expected = RefragPipeline(model, tokenizer)(QUESTION, RIVERS, max_new_tokens=5).text
    assert loaded(QUESTION, RIVERS, max_new_tokens=5).text == expected


def test_a_causal_language_model_by_name():
    answer = RefragPipeline.from_pretrained("tiny/decoder")(QUESTION, RIVERS, max_new_tokens=5)
    _, tokenizer = plain_parts()
    expected = RefragPipeline(PlainModel.from_pretrained("tiny/decoder"), tokenizer)
    assert answer.text == expected(QUESTION, RIVERS, max_new_tokens=5).text


def test_an_index_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index"):
        RefragPipeline.from_pretrained("tiny/decoder", index=tmp_path / "none", search="bm25")
