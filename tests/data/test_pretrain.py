"""Pre-training data: what examples say, against their source text; order, rates, readings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from refrag_lightning.data import PretrainDataModule, PydocSource
from refrag_lightning.data.curriculum import Curriculum
from refrag_lightning.data.pretrain_samples import Sample
from refrag_lightning.data.sources import TextSource
from refrag_lightning.data.worker import seeded
from tests.text.loading import refrag

SOURCE = PydocSource(limit=30)
BARE = {
    split: ["".join(text.split()) for text in SOURCE.texts(split)] for split in ("train", "test")
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache of corpora for these tests; the tiny models stay where they are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("refrag_lightning.data.corpus.cache_dir", lambda: folder)
        yield


def _data(tokenizer=None, **options):
    settings = {"max_rows": 8, "num_stages": 3, "num_examples": 60, "continuation": 12}
    return PretrainDataModule(
        source=SOURCE, tokenizer=tokenizer or refrag(rates=(4, 8)), **{**settings, **options}
    )


def _text(example, *, train=False, kind=None):
    return [s.text for s in example.segments if s.train == train and kind in (None, s.kind)]


def _in_source(text, split="train"):
    # Without white space: a very long word may be cut inside, and a text is cut at any word.
    return any("".join(text.split()) in whole for whole in BARE[split])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("rate", [4, 8])
def test_what_is_reconstructed_and_continued_stands_in_the_source(chat, rate):
    data = _data(chat=chat, num_documents=(1, 3))
    sizes = []
    for sample in data.training_data():
        example = data.example(sample, rate)
        documents = _text(example, kind="document")
        target = _text(example, train=True, kind="text")
        assert len(target) == 1 and 1 <= len(documents) <= min(3, sample.num_rows)
        together = " ".join(documents)
        if sample.task == "reconstruct":
            assert "".join(target[0].split()) == "".join(together.split())
            assert _in_source(together)
        else:
            assert _in_source(f"{together} {target[0]}")
            sizes.append(len(data.tokenizer.plain_decoder(target)[0].ids))
    # Twelve tokens where they stand; apart from their text some words have one more.
    assert 9 < np.mean(sizes) <= 12.5 and max(sizes) <= 16


def test_documents_come_first_then_the_instruction_then_the_target():
    example = _data(num_documents=2).example(Sample("train", 0, 8, "continue"), 4)
    kinds = [segment.kind for segment in example.segments]
    assert kinds == ["header", "document", "footer"] * 2 + ["text", "text"]
    assert [s.text for s in example.segments if s.kind == "header"] == ["[1]\n", "[2]\n"]
    assert example.segments[-2].text == "Continue the text above.\n"
    assert [segment.train for segment in example.segments] == [False] * 7 + [True]
    data = _data(instructions={"reconstruct": "Say it again."})
    assert _text(data.example(Sample("train", 0, 8, "reconstruct"), 4))[-1] == "Say it again.\n"


@pytest.mark.parametrize("chunk_by", ["encoder", "decoder"])
@pytest.mark.parametrize("num_documents", [1, 3])
def test_contexts_have_as_many_rows_as_the_curriculum_says(chunk_by, num_documents):
    tokenizer = refrag(rates=(4, 8), chunk_by=chunk_by)
    data = _data(tokenizer, num_documents=num_documents)
    off = []
    for sample in data.training_data():
        for rate in (4, 8):
            documents = _text(data.example(sample, rate), kind="document")
            packed = tokenizer.at(rate).pack(documents)
            off.append(sum(document.num_rows for document in packed) - sample.num_rows)
    assert np.mean(np.asarray(off) == 0) > 0.6
    # A word that does not fit goes to the next document, or is left out: at most 16 tokens of it.
    assert min(off) >= -16 // 4
    # The white space before a document is dropped, which costs the decoder a token now and then.
    assert max(off) <= (0 if chunk_by == "encoder" else num_documents)


def test_examples_are_a_function_of_seed_number_and_rate():
    data, again, other = _data(), _data(), _data(seed=1)
    samples = [Sample("train", index, 4, "continue") for index in range(20)]
    texts = [data.example(sample, 4).segments for sample in samples]
    assert texts == [again.example(sample, 4).segments for sample in samples[::-1]][::-1]
    assert len(set(texts)) == 20
    assert not set(texts) & {data.example(sample, 8).segments for sample in samples}
    assert not set(texts) & {other.example(sample, 4).segments for sample in samples}
    # What is measured does not depend on the seed of training.
    held_out = [Sample("val", index, 4, "continue", 4) for index in range(5)]
    assert [data.example(s, 4) for s in held_out] == [other.example(s, 4) for s in held_out]


def test_words_longer_than_the_rows_are_still_examples():
    class Long(TextSource):
        def read(self):
            # Words of about ten tokens, where a row is four.
            yield " ".join(f"x{n}y{n}z{n}w{n}v{n}" for n in range(40, 70))

        def key(self):
            return {"long": 1}

    tokenizer = refrag()
    data = PretrainDataModule(source=Long(), tokenizer=tokenizer, max_rows=4, num_documents=(1, 4))
    for task in ("reconstruct", "continue"):
        for number in range(100):
            example = data.example(Sample("train", number, 1 + number % 4, task), 4)
            assert all(_text(example, kind="document"))
            assert all(_text(example, train=True, kind="text"))


def test_order_is_the_curriculums():
    rows = [sample.num_rows for sample in _data(seed=3).training_data()]
    assert rows == Curriculum(8, 3, 60).schedule(3).tolist()
    shuffled = [sample.num_rows for sample in _data(seed=3, curriculum=False).training_data()]
    assert shuffled != rows and sorted(shuffled) == sorted(rows)
    assert [sample.number for sample in _data().training_data()] == list(range(60))
    one = _data(min_rows=8).training_data()
    assert {sample.num_rows for sample in one} == {8}


def test_tasks_come_by_their_weights():
    tasks = {"reconstruct": 1.0, "continue": 3.0}
    samples = _data(tasks=tasks, num_examples=1000).training_data()
    share = np.mean([sample.task == "continue" for sample in samples])
    # Four standard deviations of the share.
    assert share == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 1000))
    samples = _data(tasks={"reconstruct": 1.0, "continue": 0.0}).training_data()
    assert {sample.task for sample in samples} == {"reconstruct"}


def _collate(data, samples, seed=0):
    with seeded([seed]):
        return data.collate(samples)


def test_each_training_batch_has_one_of_the_rates_drawn_by_its_seed():
    data = _data()
    samples = [data.training_data()[index] for index in range(4)]
    rates = [_collate(data, samples, seed).compression for seed in range(40)]
    # 2 ** -39 of all seeds would miss a rate.
    assert set(rates) == {4, 8}
    first, again = _collate(data, samples, 5), _collate(data, samples, 5)
    assert torch.equal(first.student["input_ids"], again.student["input_ids"])
    assert torch.equal(first.student["slot_ids"], again.student["slot_ids"])


def test_targets_are_the_text_that_is_asked_for():
    data = _data()
    samples = [
        Sample("train", i, 4, task) for i in range(3) for task in ("reconstruct", "continue")
    ]
    batch = _collate(data, samples)
    assert batch.tasks == ("continue", "reconstruct")
    for number, sample in enumerate(samples):
        ids = batch.targets[batch.text_ids == number]
        (target,) = _text(data.example(sample, batch.compression), train=True)
        assert data.tokenizer.decode(ids) == target
        named = {batch.tasks[task] for task in batch.task_ids[batch.text_ids == number].tolist()}
        assert named == {sample.task}


@pytest.mark.parametrize(
    ("decoder", "end"),
    [
        ("tiny/decoder", "<|im_end|>"),
        ("tiny/gemma", "<end_of_turn>"),
        ("tiny/llama3", "<|eot_id|>"),
    ],
)
def test_a_reconstruction_ends_its_turn_and_a_continuation_is_broken_off(decoder, end):
    data = _data(refrag(decoder=decoder), chat=True)
    for task in ("reconstruct", "continue"):
        sample = Sample("train", 0, 4, task)
        batch = _collate(data, [sample])
        target = _text(data.example(sample, 4), train=True, kind="text")[0]
        said = data.tokenizer.decode(batch.targets, skip_special_tokens=False)
        assert said == target + (end if task == "reconstruct" else "")


def test_a_share_of_the_training_rows_stays_tokens():
    data = _data(refrag(), expand_share=0.25, min_rows=8)
    samples = data.training_data()
    batch = _collate(data, [samples[i] for i in range(32)])
    vectors = int((batch.student["slot_ids"] >= 0).sum())
    assert vectors == pytest.approx(32 * 8 * 0.75, rel=0.05)
    held_out = [Sample("val", index, 8, "continue", 4) for index in range(4)]
    assert all(data.example(sample, 4).expand == "none" for sample in held_out)
    everything = _data(refrag(), expand_share=1)
    batch = _collate(everything, [samples[i] for i in range(4)])
    assert not (batch.student["slot_ids"] >= 0).any()


def test_validation_has_a_loader_a_rate_with_the_same_examples_every_time():
    data = _data(eval_examples=5, eval_rows=[2, 8], batch_size=4)
    loaders = data.val_dataloader()
    assert len(loaders) == 2
    for loader, rate in zip(loaders, (4, 8), strict=True):
        batches = [*loader]
        assert {batch.compression for batch in batches} == {rate}
        assert sum(batch.num_texts for batch in batches) == 10
        assert set().union(*(batch.tasks for batch in batches)) == {"continue", "reconstruct"}
        for batch, again in zip(batches, loader, strict=True):
            assert torch.equal(batch.targets, again.targets)
    rows = [sample.num_rows for sample in loaders[0].dataset.dataset]
    assert rows == [2, 2, 8, 8, 2, 2, 8, 8, 2, 2]


def test_test_reads_the_same_targets_in_three_ways_and_at_every_rate():
    data = _data(eval_examples=3, batch_size=64)
    said = {}
    for loader in data.test_dataloader():
        (batch,) = loader
        for number, name in enumerate(batch.ids):
            is_mine = batch.text_ids == number
            task = batch.tasks[int(batch.task_ids[is_mine][0])]
            ids = batch.targets[is_mine].tolist()
            slots = int((batch.student["slot_ids"][number] >= 0).sum())
            length = int(batch.student["attention_mask"][number].sum())
            reading = task.partition("-")[2] or batch.compression
            readings = said.setdefault((name, task.partition("-")[0]), {})
            assert reading not in readings
            readings[reading] = tuple(ids), slots, length - len(ids)
            text = data.tokenizer.decode(ids)
            assert _in_source(text, "test") and not _in_source(text)
    assert len(said) == 6
    for readings in said.values():
        assert set(readings) == {4, 8, "text", "none"}
        assert len({ids for ids, _, _ in readings.values()}) == 1
        slots = {reading: count for reading, (_, count, _) in readings.items()}
        assert slots["text"] == slots["none"] == 0
        # Up to 8 rows of 4, and so up to 4 of 8; a last word that did not fit may be missing.
        assert 6 <= slots[4] <= 8 and slots[8] == -(-slots[4] // 2)
        before = {reading: length for reading, (_, _, length) in readings.items()}
        assert before["none"] < before[8] < before[4] < before["text"]
    data = _data(eval_examples=3, test_readings=["compressed"])
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [6, 6]


def test_lengths_are_about_what_the_decoder_reads():
    data = _data(refrag(), num_documents=2, expand_share=0.1, chat=True)
    samples = data.training_data()
    for part in (range(20), range(40, 60)):
        batch = _collate(data, [samples[i] for i in part])
        assert samples.lengths[list(part)].sum() == pytest.approx(batch.num_tokens, rel=0.1)


def test_batches_by_tokens_are_packed_into_lines():
    data = _data(refrag(), tokens_per_batch=300, line_length=150)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer=refrag()), global_rank=0, world_size=1
    )
    order = data._order(data.training_data())
    batches = list(order.batches(0))
    assert [index for batch in batches for index in batch] == list(range(60))
    samples = data.training_data()
    batch = _collate(data, [samples[i] for i in batches[0]])
    lines = batch.student["segment_ids"]
    assert lines.shape[1] <= 150 and len(lines) < len(batches[0])
    assert set(lines[lines >= 0].tolist()) == set(range(len(batches[0])))


def test_teacher_and_tokenizer_come_from_the_trainers_module():
    data = PretrainDataModule(source=SOURCE, max_rows=4, num_examples=10, num_stages=2)
    module = SimpleNamespace(tokenizer=refrag(), needs_teacher=True)
    data.trainer = SimpleNamespace(lightning_module=module)
    batch = _collate(data, [data.training_data()[0]])
    assert batch.teacher is not None
    flat = batch.teacher["input_ids"].flatten()
    assert torch.equal(flat[batch.teacher_predicting + 1], batch.targets)
    module.needs_teacher = False
    assert _collate(data, [data.training_data()[0]]).teacher is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {"reconstruct": 1.0, "guess": 1.0}}, "tasks has 'guess', which is none of rec"),
        ({"tasks": {"reconstruct": 0.0}}, r"tasks .* need weights of at least 0, and one above"),
        ({"tasks": {}}, r"tasks \({}\) need weights"),
        ({"instructions": {"repeat": ""}}, "instructions has 'repeat'"),
        ({"num_documents": 0}, r"num_documents \(0\) must be at least 1"),
        ({"num_documents": (3, 2)}, r"num_documents \(\(3, 2\)\) must be"),
        ({"continuation": 0}, r"continuation \(0\) must be at least 1"),
        ({"expand_share": 1.5}, r"expand_share \(1.5\) must be 0 to 1"),
        ({"eval_examples": 0}, r"eval_examples \(0\) must be at least 1"),
        ({"eval_rows": [0, 4]}, r"eval_rows \(\[0, 4\]\) must be at least 1"),
        ({"max_rows": 0}, r"max_rows \(0\) must be at least 1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        _data(**options)


def test_texts_that_are_too_short_stop_the_run_before_it_begins():
    message = r"train, .*pydoc.*no text has the 8192 encoder tokens .* 1024 rows of 8: .*max_rows"
    with pytest.raises(ValueError, match=message):
        _data(max_rows=1024).corpus("train")
    with pytest.raises(ValueError, match=r"val, .* 900 rows of 4: take fewer \(eval_rows\)"):
        _data(eval_rows=[900]).corpus("val")
    with pytest.raises(ValueError, match=r"line_length \(40\) must hold the longest .* a quarter"):
        _data(line_length=40).training_data()


def test_chat_needs_a_template():
    tokenizer = refrag("tiny/encoder", "tiny/encoder-cased")
    with pytest.raises(ValueError, match=r"chat \(true\) needs a decoder with a chat template"):
        _data(tokenizer, chat=True).example(Sample("train", 0, 4, "continue"), 4)


@pytest.mark.parametrize(
    "changed",
    [{"max_rows": 16}, {"num_stages": 4}, {"curriculum": False}, {"tasks": {"continue": 1.0}}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_place_in_another_curriculum_is_refused(changed):
    def of(**options):
        data = _data(**options)
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=None)
        return data

    loader = of().train_dataloader()
    settings = {**loader.settings, "data": loader.data_key}
    state = {"ranks": [{"epoch": 0, "batch": 3, "processed": 3}], "settings": settings}
    same, other = of(), of(**changed)
    same.load_state_dict(state)
    assert same.train_dataloader().begin["batch"] == 3
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"after batch 3 of an epoch of other training data"):
        other.train_dataloader()
