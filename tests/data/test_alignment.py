"""Alignment data: pieces, batches checked token by token, the cache, streaming."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given

from refrag_lightning.data import AlignmentDataModule, JsonLinesSource, PydocSource
from refrag_lightning.data.alignment_batch import COLUMNS, Aligner, NoSpansError
from refrag_lightning.data.sources import TextSource
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.strategies import texts as random_texts

TEXTS = [
    "The Seine flows through Paris, and on to the sea near Le Havre.",
    "Rivers: the Loire is longer; it rises in the south.",
]


class Lines(TextSource):
    """Texts given directly."""

    def __init__(self, lines, name="lines"):
        super().__init__()
        self.lines, self.name, self.readings = lines, name, 0

    def read(self):
        self.readings += 1
        yield from self.lines

    def key(self):
        return {"lines": self.name}


@pytest.fixture(scope="module")
def tokenizer():
    return RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, context="document"
    )


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache for prepared data; the tiny models stay where they are."""
    monkeypatch.setattr("refrag_lightning.data.alignment.cache_dir", lambda: tmp_path)
    return tmp_path


def _collated(tokenizer, spans, texts=TEXTS, max_tokens=64):
    aligner = Aligner(tokenizer, spans=spans, max_tokens=max_tokens)
    return aligner.collate([e for text in texts for e in aligner.examples(text)])


@pytest.mark.parametrize("spans", ["token", "row"])
def test_both_sides_of_a_span_say_the_same(tokenizer, spans):
    batch = _collated(tokenizer, spans)
    encoder_ids, row_ids = batch.student["encoder_input_ids"], batch.student["encoder_row_ids"]
    said = {"student": [], "teacher": []}
    for span in range(batch.num_spans):
        slots = batch.student["slot_ids"].flatten()[batch.student_spans.flatten() == span]
        ids = encoder_ids[torch.isin(row_ids, slots)]
        said["student"].append(tokenizer.encoder.decode(ids).replace(" ", "").replace("##", ""))
        ids = batch.teacher["input_ids"].flatten()[batch.teacher_spans.flatten() == span]
        said["teacher"].append(tokenizer.decode(ids).replace(" ", "").lower())
    if spans == "token":
        assert said["student"] == said["teacher"]
    else:
        # Rows are cut at encoder tokens; a decoder token across a cut belongs to the row of its
        # last character, so only the whole is the same.
        assert "".join(said["student"]) == "".join(said["teacher"])


@pytest.mark.parametrize("spans", ["token", "row"])
def test_last_places_are_the_last_of_each_span(tokenizer, spans):
    batch = _collated(tokenizer, spans)
    for ids, last in (
        (batch.student_spans, batch.student_last),
        (batch.teacher_spans, batch.teacher_last),
    ):
        flat = ids.flatten().tolist()
        expected = [len(flat) - 1 - flat[::-1].index(span) for span in range(batch.num_spans)]
        assert last.tolist() == expected
    assert sum(batch.spans_of_texts) == batch.num_spans


def test_student_reads_every_row_once_in_order(tokenizer):
    batch = _collated(tokenizer, "token")
    for slots, mask in zip(batch.student["slot_ids"], batch.student["attention_mask"], strict=True):
        present = slots[mask.bool()]
        assert torch.equal(present, torch.arange(int(present[0]), int(present[0]) + len(present)))
    assert batch.teacher["encoder_input_ids"].numel() == 0
    assert int(batch.teacher["attention_mask"].sum()) == batch.num_tokens


def test_token_states_come_from_rows_where_the_model_reads_rows():
    tokenizer = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, context="row"
    )
    batch = _collated(tokenizer, "token")
    assert ((batch.student["encoder_row_ids"] >= 0).sum(dim=1) <= 4).all()


def test_tokenizer_with_an_opening_token_gives_it_to_both_sides():
    tokenizer = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/llama3", compression=4, context="document"
    )
    batch = _collated(tokenizer, "token")
    bos = tokenizer.decoder.bos_token_id
    for side in (batch.student, batch.teacher):
        assert (side["input_ids"][:, 0] == bos).all()
    assert (batch.student_spans[:, 0] == -1).all()
    assert (batch.teacher_spans[:, 0] == -1).all()


def test_row_slots_with_several_slots_a_row():
    tokenizer = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, context="document", num_slots=2
    )
    batch = _collated(tokenizer, "row")
    assert torch.equal(batch.student_spans >= 0, batch.student["slot_ids"] >= 0)


@given(text=random_texts())
def test_pieces_tile_the_text(text):
    tokenizer = _tokenizer()
    aligner = Aligner(tokenizer, spans="token", max_tokens=5)
    pieces = aligner.pieces(text)
    assert "".join(pieces) == text
    for example in aligner.examples(text):
        assert len(example["encoder_ids"]) > 0
        assert example["decoder_spans"].max() == example["row_spans"].max() >= 0


def _tokenizer(cache={}):  # noqa: B006 - one tokenizer for all examples of a property
    if not cache:
        cache["it"] = RefragTokenizer.from_encoder_decoder(
            "tiny/encoder", "tiny/decoder", compression=4, context="document"
        )
    return cache["it"]


def test_cache_is_filled_once_and_keyed(tokenizer, cache):
    lines = Lines(TEXTS)
    options = {"source": lines, "tokenizer": tokenizer}
    first = AlignmentDataModule(**options).examples("train")
    again = AlignmentDataModule(**options).examples("train")
    assert lines.readings == 1
    assert [row["decoder_ids"].tolist() for row in first] == [
        row["decoder_ids"].tolist() for row in again
    ]
    direct = Aligner(tokenizer, spans="token", max_tokens=126).examples(TEXTS[0])[0]
    for name in COLUMNS:
        assert np.array_equal(first[0][name], direct[name])

    AlignmentDataModule(**options, max_tokens=8).examples("train")
    AlignmentDataModule(**options, spans="row").examples("train")
    other = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder-cased", "tiny/decoder", compression=4, context="document"
    )
    AlignmentDataModule(source=lines, tokenizer=other).examples("train")
    assert lines.readings == 4
    names = {path.name for path in (cache / "data").iterdir() if not path.name.startswith(".")}
    assert len(names) == 4


def test_interrupted_cache_is_not_taken_for_a_whole_one(tokenizer, cache):
    class Breaks(Lines):
        def read(self):
            yield TEXTS[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AlignmentDataModule(source=Breaks(TEXTS), tokenizer=tokenizer).examples("train")
    assert len(AlignmentDataModule(source=Lines(TEXTS), tokenizer=tokenizer).examples("train")) == 2


def test_eval_pieces_limits_validation(tokenizer, cache):
    data = AlignmentDataModule(
        source=PydocSource(), tokenizer=tokenizer, max_tokens=16, eval_pieces=5
    )
    assert len(data.examples("val")) == 5
    assert len(data.examples("test")) == 5


def test_streaming_gives_the_cached_pieces(tokenizer, cache):
    options = {"source": Lines(TEXTS * 3), "tokenizer": tokenizer, "max_tokens": 6}
    cached = AlignmentDataModule(**options).examples("train")
    stream = AlignmentDataModule(**options, streaming=True, shuffle_block=4).training_data()
    streamed = [sample for sample, _ in stream.read(epoch=0, shard=0, num_shards=1)]
    key = lambda row: tuple(row["decoder_ids"].tolist())  # noqa: E731
    assert sorted(map(key, streamed)) == sorted(map(key, cached))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("changed", ["source", "spans", "max_tokens"])
def test_a_place_in_other_text_is_refused(tokenizer, cache, streaming, changed):
    def of(name="lines", **options):
        settings = {"source": Lines(TEXTS * 3, name), "max_tokens": 64, "streaming": streaming}
        data = AlignmentDataModule(tokenizer=tokenizer, **{**settings, **options})
        data.trainer = SimpleNamespace(global_rank=0, world_size=1)
        return data

    loader = of().train_dataloader()
    settings = {**loader.settings, "data": loader.data_key}
    state = {"ranks": [{**loader.begin, "batch": 3}], "settings": settings}
    # The same text in another place, as a retry on another machine finds it.
    same = of("elsewhere")
    same.load_state_dict(state)
    assert same.train_dataloader().begin["batch"] == 3
    # As many pieces, but other ones.
    options = {"source": Lines(TEXTS[::-1] * 3, "others"), "spans": "row", "max_tokens": 65}
    other = of(**{changed: options[changed]})
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"after batch 3 of an epoch of other training data"):
        other.train_dataloader()


def test_text_without_a_span_is_an_error(tokenizer, cache, tmp_path):
    with pytest.raises(NoSpansError, match=r"not one span of the 2 train texts of .*lines"):
        AlignmentDataModule(source=Lines(["", " \x01"]), tokenizer=tokenizer).examples("train")
    path = tmp_path / "only.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n")
    with pytest.raises(NoSpansError, match=r"only\.jsonl.* has no text for val"):
        data = AlignmentDataModule(source=JsonLinesSource(str(path)), tokenizer=tokenizer)
        data.examples("val")
    aligner = Aligner(tokenizer, spans="token", max_tokens=8)
    example = aligner.examples("hello")[0]
    none = {**example, "row_spans": example["row_spans"] * 0 - 1}
    none["decoder_spans"] = example["decoder_spans"] * 0 - 1
    with pytest.raises(NoSpansError, match="none of the 1 texts"):
        aligner.collate([none])


def test_tokenizer_comes_from_the_trainers_module(tokenizer, cache):
    data = AlignmentDataModule(source=Lines(TEXTS))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer))
    assert data.aligner.tokenizer is tokenizer


def test_batch_moves_as_a_whole(tokenizer):
    batch = _collated(tokenizer, "token")
    moved = batch.to("meta")
    assert moved.student["input_ids"].device.type == "meta"
    assert moved.student_last.device.type == "meta"
    assert moved.spans_of_texts == batch.spans_of_texts
