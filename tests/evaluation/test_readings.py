"""Readings: against plain forward passes, and what each may and may not depend on."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from refrag_lightning.evaluation.reader import without_end
from refrag_lightning.evaluation.readings import (
    Reading,
    best_rows,
    build,
    control_projectors,
    documents_of,
    projector_of,
    read,
    readings_of,
)
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment, end_ids, render_chat
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.text.loading import hugging_face
from tests.text.spaces import KINDS, spaced

RIVER = "The Seine flows through Paris and on to the sea near Le Havre."
TOWER = "The tower was built for the fair of 1889; it was never meant to stay."
LOIRE = "The Loire is the longest river of France, about a thousand kilometres."


def _text(reader, *documents, question="Where is it?", answer="In Paris"):
    user = [Document(d, str(n), f"Page {n}") for n, d in enumerate(documents, start=1)]
    messages = [
        {"role": "user", "content": [*user, question]},
        {"role": "assistant", "content": [answer]},
    ]
    style = {"header": reader.tokenizer.header, "footer": reader.tokenizer.footer}
    decoder = reader.tokenizer.decoder
    whole = render_chat(decoder, messages, add_generation_prompt=False, **style)
    return without_end(whole), render_chat(decoder, messages[:1], **style)


def _texts(reader):
    asked = [(RIVER, TOWER), (LOIRE,)]
    return [_text(reader, *documents)[0] for documents in asked]


def _nats(reader, texts, name, **options):
    return reader.likelihood(texts, Reading.parse(name), **options).nats_B


def test_names():
    assert Reading.parse("rows@8") == Reading("rows", 8)
    assert [r.name for r in readings_of(["full", "rows", "cut@4", "rows@8"], [4, 8])] == [
        "full",
        "rows@4",
        "rows@8",
        "cut@4",
    ]
    assert Reading.parse("bm25@8+.10") == Reading("bm25", 8, 0.1)
    assert [r.name for r in readings_of(["bm25+0.1", "drawn@4+0.2"], [4, 8])] == [
        "bm25@4+0.1",
        "bm25@8+0.1",
        "drawn@4+0.2",
    ]
    for name, message in [
        ("ful", "no reading 'ful'"),
        ("full@4", "'full@4' has to be written full"),
        ("rows", "'rows' has to be written rows@RATE"),
        ("rows@4+0.1", "'rows@4[+]0.1' has to be written rows@RATE, such as"),
        ("bm25@4", "'bm25@4' has to be written bm25@RATE[+]SHARE, such as bm25@8[+]0.1"),
        ("bm25+0.1", "'bm25[+]0.1' has to be written bm25@RATE[+]SHARE"),
        ("bm25@4+0", "'bm25@4[+]0' has a share of rows that is not above 0"),
        ("drawn@4+1.5", "'drawn@4[+]1.5' has a share of rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            Reading.parse(name)


@pytest.mark.parametrize("name", ["rows@4", "rows@8", "full"])
def test_likelihood_is_that_of_a_plain_forward_pass_of_one_text(reader, name):
    texts = _texts(reader)
    reading = Reading.parse(name)
    banks = reader.encode([RIVER, TOWER, LOIRE], [reading])
    got = reader.likelihood(texts, reading, banks=banks)
    for number, text in enumerate(texts):
        tokenizer = reader.tokenizer.at(reading.rate or 4)
        batch = tokenizer.build([text], expand="none" if reading.rate else "all")
        logits = reader.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"][0, 1:]
        nats = F.cross_entropy(logits[0, :-1], labels, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(got.nats_B[number], nats, rtol=1e-4, atol=1e-3)
        kept = labels != -100
        assert got.targets_B[number] == kept.sum()
        assert got.hits_B[number] == (logits[0, :-1].argmax(-1) == labels)[kept].sum()
        assert got.positions_B[number] == int(kept.nonzero()[0]) + 1


def test_full_text_is_what_transformers_gives_for_the_rendered_conversation(reader, plain):
    text = _text(reader, RIVER)[0]
    before = "".join(s.text for s in text[: [s.train for s in text].index(True)])
    decoder = plain.tokenizer.decoder
    prompt = decoder(before, add_special_tokens=False)["input_ids"]
    answer = decoder("In Paris", add_special_tokens=False)["input_ids"]
    logits = plain.model.decoder(input_ids=torch.tensor([prompt + answer])).logits[0]
    expected = F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
    for who in (reader, plain):
        got = who.likelihood([text], Reading("full"))
        torch.testing.assert_close(got.nats_B[0], expected, rtol=1e-4, atol=1e-3)
        assert got.targets_B.tolist() == [len(answer)]
        assert got.positions_B.tolist() == [len(prompt)]


def test_none_holds_nothing_of_documents_and_titles_only_headers(reader):
    texts = _texts(reader)
    none, titles = (read(texts, Reading(kind), reader.tokenizer) for kind in ("none", "titles"))
    assert {s.kind for text in none for s in text} == {"template", "text"}
    shown = "".join(s.text for s in titles[0])
    assert "[1] Page 1\n" in shown and "[2] Page 2\n" in shown and "Seine" not in shown
    assert _nats(reader, [_text(reader)[0]], "full") == pytest.approx(
        _nats(reader, texts[:1], "none"), rel=1e-4
    )


def test_none_is_tokenized_as_if_there_had_been_no_document(reader):
    tokenizer = reader.tokenizer
    style = {"header": tokenizer.header, "footer": tokenizer.footer}

    def text(*content):
        messages = [{"role": "user", "content": [*content]}]
        messages += [{"role": "assistant", "content": ["Paris"]}]
        return render_chat(tokenizer.decoder, messages, add_generation_prompt=False, **style)

    # Apart, "Sei" and "ne" would be other tokens than the word.
    around = text("Read about the Sei", Document(RIVER), "ne and answer.")
    bare = text("Read about the Seine and answer.")
    (left,) = read([around], Reading("none"), tokenizer)
    assert left == bare
    ids = [tokenizer.build([t])["input_ids"].tolist() for t in (left, bare)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["cut@4", "cut@8", "last@4"])
def test_cut_text_takes_as_many_positions_as_rows(reader, name):
    reading = Reading.parse(name)
    texts = _texts(reader)
    tokenizer = reader.tokenizer
    for before, after in zip(texts, read(texts, reading, tokenizer), strict=True):
        for whole, cut in zip(documents_of(before), documents_of(after), strict=True):
            assert whole.endswith(cut) if reading.kind == "last" else whole.startswith(cut)
            assert cut != whole
    rows = reader.likelihood(texts, Reading("rows", reading.rate))
    cut = reader.likelihood(texts, reading)
    assert cut.positions_B.tolist() == rows.positions_B.tolist()


def test_best_rows_are_those_of_bm25_worked_out_by_hand():
    rows = ["The river rises", "in the hills", "rivers flow", "and the sea", "a river, a river"]
    # Lucene's BM25 on stems without stop words: 2, 1, 2, 1 and 2 words, a mean of 1.6.
    idf = math.log(1 + (5 - 3 + 0.5) / (3 + 0.5))

    def score(count, length):
        return idf * count / (count + 1.5 * (0.25 + 0.75 * length / 1.6))

    assert score(2, 2) > score(1, 2) > 0
    question = "What river is it?"
    found = [best_rows(rows, question, number).tolist() for number in range(6)]
    # Ties, and rows that have nothing of the question, in order.
    assert found == [[], [4], [0, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    # Nothing to look for, or nothing to look in.
    assert best_rows(rows, "Who?", 2).tolist() == [0, 1]
    assert best_rows(["the", "..."], question, 1).tolist() == [0]
    assert best_rows([], question, 0).tolist() == []


def test_bm25_makes_tokens_of_the_rows_nearest_to_the_question(reader):
    texts = _texts(reader)
    reading = Reading.parse("bm25@4+0.2")
    questions = ["What is Le Havre?", "Which country has this longest river?"]
    batch, segments = build(texts, reading, reader.tokenizer, questions=questions)
    bare, _ = build(texts, Reading("rows", 4), reader.tokenizer)
    for text, trace, whole, question in zip(
        segments, batch.trace, bare.trace, questions, strict=True
    ):
        documents = documents_of(text)
        rows = [documents[row.document][row.start : row.end] for row in whole]
        assert "".join(rows) == "".join(documents)
        number = max(1, round(0.2 * len(rows)))
        expected = best_rows(rows, question, number).tolist()
        assert [n for n, row in enumerate(trace) if row.state == "tokens"] == expected
    first = batch.trace[0]
    assert any("Havre" in RIVER[r.start : r.end] for r in first if r.state == "tokens")

    # The same as when the caller says so, in a batch or alone, and with rows of a bank.
    expand = [[n for n, row in enumerate(t) if row.state == "tokens"] for t in batch.trace]
    banks = reader.encode([RIVER, TOWER, LOIRE], [reading])
    got = reader.likelihood(texts, reading, banks=banks, questions=questions)
    for number, text in enumerate(texts):
        own = reader.tokenizer.at(4).build([text], expand=[expand[number]])
        logits = reader.model(**{k: v for k, v in own.items() if k != "labels"}).logits
        labels = own["labels"][0, 1:]
        nats = F.cross_entropy(logits[0, :-1], labels, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(got.nats_B[number], nats, rtol=1e-4, atol=1e-3)
        assert got.positions_B[number] == int((labels != -100).nonzero()[0]) + 1
    rows = reader.likelihood(texts, Reading("rows", 4), banks=banks)
    full = reader.likelihood(texts, Reading("full"))
    assert (rows.positions_B < got.positions_B).all() and (got.positions_B < full.positions_B).all()
    with pytest.raises(ValueError, match=r"'bm25@4\+0.2' needs each text's question: there are 0"):
        reader.likelihood(texts, reading)


def test_drawn_rows_are_as_many_and_the_same_each_time(reader):
    texts = _texts(reader)
    questions = ["Where?", "Who?"]

    def chosen(name, places):
        some = [texts[n] for n in places]
        batch, _ = build(
            some,
            Reading.parse(name),
            reader.tokenizer,
            questions=[questions[n] for n in places],
        )
        return [[row.state for row in trace] for trace in batch.trace]

    drawn, best = chosen("drawn@4+0.3", [0, 1]), chosen("bm25@4+0.3", [0, 1])
    assert [d.count("tokens") for d in drawn] == [b.count("tokens") for b in best]
    assert drawn == [*chosen("drawn@4+0.3", [0]), *chosen("drawn@4+0.3", [1])]
    everything = reader.likelihood(texts, Reading.parse("drawn@4+1"), questions=questions)
    full = reader.likelihood(texts, Reading("full"))
    torch.testing.assert_close(everything.nats_B, full.nats_B, rtol=1e-4, atol=1e-3)


def test_a_plain_model_cuts_to_a_share_of_the_tokens(plain):
    texts = [_text(plain, RIVER)[0]]
    number = len(plain.tokenizer.plain_decoder([RIVER])[0].ids)
    (cut,) = read(texts, Reading("cut", 4), plain.tokenizer)
    assert len(plain.tokenizer.plain_decoder(documents_of(cut))[0].ids) == -(-number // 4)
    assert plain.can_read(Reading("cut", 4)) and not plain.can_read(Reading("rows", 4))


def test_other_reads_the_other_documents_under_its_own_headers(reader):
    one, two = _text(reader, RIVER)[0], _text(reader, TOWER)[0]
    others = [[LOIRE]]
    # What the question's own document says changes nothing ...
    first, second = (_nats(reader, [text], "other@4", others=others) for text in (one, two))
    assert first == second == _nats(reader, [_text(reader, LOIRE)[0]], "rows@4")
    # ... and would otherwise.
    assert _nats(reader, [one], "rows@4") != _nats(reader, [two], "rows@4")
    with pytest.raises(ValueError, match="needs another question that has documents"):
        _nats(reader, [one], "other@4", others=[[]])


def test_zeros_are_zeros_and_the_model_keeps_its_projector(reader):
    controls = control_projectors(reader.model, seed=1)
    own = reader.model.projector
    batch, _ = build(_texts(reader), Reading("zero", 4), reader.tokenizer)
    at_slots = batch["slot_ids"] >= 0
    with torch.no_grad():
        real = reader.model.embed(batch)
        with projector_of(reader.model, Reading("zero", 4), controls):
            zero = reader.model.embed(batch)
        with projector_of(reader.model, Reading("random", 4), controls):
            random = reader.model.embed(batch)
        with projector_of(reader.model, Reading("rows", 4), controls):
            torch.testing.assert_close(reader.model.embed(batch), real, rtol=0, atol=0)
    assert reader.model.projector is own
    assert not zero[at_slots].any() and real[at_slots].any()
    # Elsewhere, all of them read the same tokens.
    for other in (zero, random):
        torch.testing.assert_close(other[~at_slots], real[~at_slots], rtol=0, atol=0)
    # As long as real vectors of an untrained projector, and in other directions.
    length = real[at_slots].norm(dim=-1).mean()
    assert random[at_slots].norm(dim=-1).mean() == pytest.approx(length.item(), rel=0.5)
    assert F.cosine_similarity(real[at_slots], random[at_slots]).abs().mean() < 0.6


def test_random_projector_is_the_same_for_a_seed_and_leaves_random_numbers_alone(reader):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    drawn = [control_projectors(reader.model, seed=seed)["random"] for seed in (0, 0, 1)]
    torch.testing.assert_close(torch.rand(2), expected)
    weights = [d.layers[0].weight for d in drawn]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_every_document_is_encoded_once_a_rate(reader, monkeypatch):
    encoded = []
    encode = type(reader.model).encode

    def counting(self, batch):
        encoded.append(int(batch["encoder_attention_mask"].sum()))
        return encode(self, batch)

    monkeypatch.setattr(type(reader.model), "encode", counting)
    texts = _texts(reader)
    readings = readings_of(["rows", "other", "random", "zero"], [4, 8])
    banks = reader.encode([RIVER, TOWER, LOIRE], readings)
    assert len(encoded) == 2 and min(encoded) > 0
    for reading in readings:
        reader.likelihood(texts, reading, banks=banks, others=[[LOIRE], [RIVER, TOWER]])
    assert sum(encoded[2:]) == 0


def test_answers_are_those_of_generate_and_stop_at_the_end_of_the_turn(reader):
    whole, prompt = _text(reader, RIVER, TOWER)
    short = _text(reader, LOIRE)[1]
    got = reader.answers([prompt, short], Reading("rows", 4), max_new_tokens=6)
    batch = reader.tokenizer.build([prompt])
    tokens = reader.model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert got[0] == reader.tokenizer.batch_decode(tokens)[0].strip()
    stop = got[0][1:3]
    cut = reader.answers([prompt], Reading("rows", 4), max_new_tokens=6, stop=[stop])
    assert cut == [got[0][: got[0].index(stop)].strip()]
    end = [replace(s, train=True) if s.text == "<|im_end|>" else s for s in whole]
    decoder = reader.tokenizer.decoder
    assert end_ids([end], reader.tokenizer.plain_template) == [
        decoder.convert_tokens_to_ids("<|im_end|>")
    ]
    assert end_ids([whole], reader.tokenizer.plain_template) == []


def test_a_text_without_a_target_is_named(reader):
    text = _text(reader, RIVER)[0]
    bare = [replace(segment, train=False) for segment in text]
    with pytest.raises(ValueError, match="text 1 of the batch has no target"):
        reader.likelihood([text, bare], Reading("full"))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_same_with_an_artificial_space(kind):
    tokenizer = RefragTokenizer(
        hugging_face("tiny/encoder"), spaced(*kind, opens=True), compression=2, header="", footer=""
    )
    document = Segment("the river flows", "document", Document("the river flows"))
    text = [document, Segment("the town by", "text", train=True)]
    targets, positions = [], []
    for name in ("rows@2", "full", "none", "last@2", "cut@2"):
        batch, _ = build([text], Reading.parse(name), tokenizer)
        targets.append(batch["labels"][batch["labels"] >= 0].tolist())
        positions.append(int(batch["attention_mask"].sum()))
    assert all(ids == targets[0] for ids in targets)
    # Cut, a document takes no more positions than its rows.
    assert positions[0] >= max(positions[3:]) > positions[2]
