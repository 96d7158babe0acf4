"""SFTDataModule: what is read and learnt, rates, mixtures, lengths, and runs that resume."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from refrag_lightning.data.chat_sources import JsonLinesConversations
from refrag_lightning.data.conversations import Conversation, QuestionConversations
from refrag_lightning.data.mixture import WeightedSource
from refrag_lightning.data.questions import JsonLinesQuestions
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.text.tokenizer import RefragTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, rates=[4, 8], context="document"
    )


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache for lengths; the tiny models stay where they are."""
    monkeypatch.setattr("refrag_lightning.data.lengths.cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "id": f"q{n}",
            "question": f"What is number {n}?",
            "answers": [f"the answer {n}"],
            "passages": [
                {"title": f"T{p}", "text": f"Passage {p} of question {n}. " * 3, "gold": p == 1}
                for p in range(4)
            ],
        }
        for n in range(20)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionConversations(JsonLinesQuestions(str(path), held_out=0.2))


@pytest.fixture
def chats(tmp_path):
    rows = [
        {
            "id": f"c{n}",
            "messages": [
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "Well " * (n + 1)},
                {"role": "user", "content": "Go on."},
                {"role": "assistant", "content": "No."},
            ],
        }
        for n in range(8)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLinesConversations(str(path))


def said(tokenizer, batch):
    """What each text of a batch is trained to say."""
    return [
        tokenizer.decode(batch.targets[batch.text_ids == n], skip_special_tokens=False)
        for n in range(batch.num_texts)
    ]


def test_the_answer_is_learnt_whatever_is_read(tokenizer, questions):
    batches = {}
    for read in ("compressed", "text", "none"):
        data = SFTDataModule(questions, read=read, tokenizer=tokenizer)
        samples = [data.training_data()[n] for n in range(3)]
        batches[read] = data.collate(samples)
        assert said(tokenizer, batches[read]) == [f"the answer {n}<|im_end|>" for n in range(3)]
    compressed, text, none = batches["compressed"], batches["text"], batches["none"]
    assert (compressed.student["slot_ids"] >= 0).any()
    assert (text.student["slot_ids"] == -1).all() and text.student.num_rows > 0
    assert none.student.num_rows == 0
    assert text.num_tokens > compressed.num_tokens > none.num_tokens
    assert "Passage 3 of question 2." in tokenizer.decode(text.student["input_ids"][2])
    nothing = tokenizer.decode(none.student["input_ids"][0], skip_special_tokens=False)
    assert nothing == (
        "<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n"
        "<|im_start|>user\nAnswer in a few words: What is number 0?<|im_end|>\n"
        "<|im_start|>assistant\nthe answer 0<|im_end|>\n"
    )


def test_a_share_of_the_rows_stays_tokens(tokenizer, questions):
    data = SFTDataModule(questions, expand_share=0.25, tokenizer=tokenizer)
    np.random.seed(0)
    batch = data.collate([data.training_data()[n] for n in range(2)])
    for trace in batch.student.trace:
        expanded = sum(row.state == "tokens" for row in trace)
        assert expanded == round(len(trace) / 4)


def test_several_turns_of_the_assistant_are_learnt(tokenizer, chats):
    data = SFTDataModule(chats, tokenizer=tokenizer)
    batch = data.collate([data.training_data()[1]])
    assert said(tokenizer, batch) == ["Well Well <|im_end|>No.<|im_end|>"]
    assert batch.tasks == ("chat",)


def test_conversations_in_which_nothing_is_learnt_are_left_out(tokenizer, tmp_path):
    good = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    rows = [good[:1], good, [good[0], {**good[1], "train": False}]]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = SFTDataModule(JsonLinesConversations(str(path)), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="2 train conversations of .*odd.* are left out"):
        assert len(data.training_data()) == 1
    with pytest.raises(ValueError, match="has no conversation for val: give a val_source or"):
        data.val_dataloader()


def test_rows_stay_tokens_in_training_alone(tokenizer, questions):
    data = SFTDataModule(questions, expand_share=0.5, tokenizer=tokenizer, eval_examples=4)
    batches = [data.collate([data.training_data()[0]]), next(iter(data.val_dataloader()[0]))]
    states = [{row.state for trace in b.student.trace for row in trace} for b in batches]
    assert states == [{"tokens", "vector"}, {"vector"}]


def test_each_training_batch_has_one_of_the_rates(tokenizer, questions):
    data = SFTDataModule(questions, tokenizer=tokenizer)
    samples = [data.training_data()[0]]
    np.random.seed(0)
    rates = [data.collate(samples).compression for _ in range(200)]
    assert set(rates) == {4, 8} and 70 < rates.count(4) < 130
    plain = SFTDataModule(questions, read="text", tokenizer=tokenizer)
    assert {plain.collate(samples).compression for _ in range(20)} == {4}


def test_evaluation_has_a_loader_a_rate_with_the_same_passages(tokenizer, questions):
    data = SFTDataModule(
        questions,
        num_passages=(1, 3),
        order="shuffled",
        distractors="random",
        tokenizer=tokenizer,
        batch_size=3,
        eval_examples=4,
        generate_eval=True,
    )
    loaders = [list(loader) for loader in data.val_dataloader()]
    again = [list(loader) for loader in data.val_dataloader()]
    assert [[batch.compression for batch in batches] for batches in loaders] == [[4, 4], [8, 8]]
    assert [len(batch.ids) for batch in loaders[0]] == [3, 1]
    spans = [
        [
            [(row.document, row.document_id, row.end) for row in trace][-1]
            for batch in batches
            for trace in batch.student.trace
        ]
        for batches in loaders
    ]
    assert spans[0] == spans[1]
    for first, second in zip(loaders[0] + loaders[1], again[0] + again[1], strict=True):
        assert torch.equal(first.student["input_ids"], second.student["input_ids"])
    batch = loaders[1][0]
    assert batch.references[0] == ("the answer 4",)
    assert tokenizer.decode(batch.prompts["input_ids"][0]).endswith("assistant\n")
    assert batch.prompts.compression == 8
    (loader,) = SFTDataModule(questions, read="none", tokenizer=tokenizer).test_dataloader()
    assert next(iter(loader)).prompts is None


def test_lengths_are_those_of_the_batches_and_cached(tokenizer, questions, chats, cache):
    sources = [WeightedSource(questions), WeightedSource(chats, 2)]
    data = SFTDataModule(sources, tokens_per_batch=300, tokenizer=tokenizer)
    mixture = data.training_data()
    assert len(mixture) == len(mixture.lengths) == 12 + 2 * 8
    for place in (0, 11, 12, 19, 27):
        (conversation,) = mixture[place]
        example = data.example(conversation, conversation.passages)
        batch = tokenizer.build([example.segments])
        assert mixture.lengths[place] == batch["attention_mask"].sum()
    data.example = None  # measuring again would need it
    assert np.array_equal(data.training_data().lengths, mixture.lengths)
    assert len([p for p in (cache / "data").iterdir() if p.name.startswith("lengths-")]) == 2
    read_as_text = SFTDataModule(
        sources, read="text", tokens_per_batch=300, tokenizer=tokenizer
    ).training_data()
    assert (read_as_text.lengths[:12] > mixture.lengths[:12]).all()
    assert (read_as_text.lengths[12:] == mixture.lengths[12:]).all()


def test_conversations_that_are_too_long_are_left_out(tokenizer, chats):
    lengths = SFTDataModule(chats, tokens_per_batch=99, tokenizer=tokenizer).training_data().lengths
    data = SFTDataModule(chats, max_length=int(lengths[4]), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="3 of 8 training contexts take more than max_length"):
        mixture = data.training_data()
    assert [mixture[n][0].id for n in range(len(mixture))] == ["c0", "c1", "c2", "c3", "c4"]
    data = SFTDataModule(chats, max_length=3, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"max_length \(3\) is less than every context"):
        data.training_data()


def test_packed_lines_hold_the_same_targets(tokenizer, questions):
    options = {"tokenizer": tokenizer, "num_passages": 1}
    samples = [SFTDataModule(questions, **options).training_data()[n] for n in range(4)]
    np.random.seed(0)
    alone = SFTDataModule(questions, **options).collate(samples)
    np.random.seed(0)
    packed = SFTDataModule(questions, line_length=400, **options).collate(samples)
    assert torch.equal(alone.targets, packed.targets)
    assert len(packed.student["input_ids"]) < 4 == len(alone.student["input_ids"])


def test_the_module_says_whether_there_is_a_teacher(tokenizer, questions):
    data = SFTDataModule(questions)
    module = SimpleNamespace(tokenizer=tokenizer, needs_teacher=True)
    data.trainer = SimpleNamespace(lightning_module=module)
    batch = data.collate([data.training_data()[0]])
    assert (batch.teacher["slot_ids"] == -1).all()
    assert len(batch.teacher_predicting) == len(batch.predicting)
    del module.needs_teacher
    assert data.collate([data.training_data()[0]]).teacher is None


def test_evaluation_sources_of_their_own(tokenizer, questions, chats):
    data = SFTDataModule(questions, val_source=chats, tokenizer=tokenizer, eval_examples=5)
    assert [c.id for part in data.conversations("val") for c in part] == [f"c{n}" for n in range(5)]
    assert {c.id for part in data.conversations("test") for c in part} == {"q3", "q8", "q13", "q18"}


def test_a_conversation_that_the_user_ends_has_no_prompt(tokenizer, chats):
    data = SFTDataModule(chats, generate_eval=True, tokenizer=tokenizer)
    (whole,) = data.training_data()[0]
    cut = Conversation("cut", whole.turns[:3])
    assert data._collate_eval([(whole,)], split="train", compression=4).prompts is not None
    both = data._collate_eval([(whole,), (cut,)], split="train", compression=4)
    assert both.num_texts == 2 and len(both.prompts["input_ids"]) == 1
    # Chat data without references is scored against what it says itself.
    assert both.references == ((whole.turns[-1].content[0],),)


def test_without_an_encoder_documents_are_read_as_text(questions):
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    data = SFTDataModule(questions, read="text", tokens_per_batch=2000, tokenizer=tokenizer)
    mixture = data.training_data()
    batch = data.collate([mixture[0]])
    assert batch.num_tokens == mixture.lengths[0]
    with pytest.raises(ValueError, match="encoder"):
        SFTDataModule(questions, tokenizer=tokenizer).collate([mixture[0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_share": 1.0}, r"expand_share \(1.0\) must be from 0 to below 1"),
        ({"expand_share": 0.5, "read": "text"}, r"expand_share \(0.5\) needs read: compressed"),
        ({"sources": []}, "sources must hold at least one source"),
    ],
)
def test_settings_out_of_range(questions, options, message):
    with pytest.raises(ValueError, match=message):
        SFTDataModule(**{"sources": questions, **options})


@pytest.fixture
def paragraphs(tmp_path):
    """Six questions on two paragraphs, each with a distractor of its own, and one on a third."""
    rows = []
    for n, gold in enumerate("AABABBC"):
        # The distractor of question 0 holds the answer to question 1.
        other = "Distractor: it is answer 1." if n == 0 else f"Distractor {n}."
        rows.append(
            {
                "id": f"q{n}",
                "question": f"What is number {n}?",
                "answers": [f"answer {n}"],
                "passages": [
                    {"text": other},
                    {"text": f"Paragraph {gold} says a lot.", "gold": True},
                ],
            }
        )
    path = tmp_path / "paragraphs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionConversations(JsonLinesQuestions(str(path)))


def test_questions_on_a_paragraph_stand_behind_one_context(tokenizer, paragraphs):
    data = SFTDataModule(paragraphs, questions_per_context=2, tokenizer=tokenizer)
    contexts = data.training_data()
    ids = [[conversation.id for conversation in context] for context in contexts]
    assert ids == [["q0", "q3"], ["q1"], ["q2", "q5"], ["q4"], ["q6"]]
    whole = SFTDataModule(paragraphs, questions_per_context=8, tokenizer=tokenizer)
    contexts = [context for context in whole.training_data()]
    batch = whole.collate(contexts)
    assert batch.ids == ("q0", "q1", "q3", "q2", "q4", "q5", "q6")
    lines = batch.student["branch_ids"]
    assert lines.shape[0] == 3 and sorted(set(lines.flatten().tolist())) == [-1, *range(7)]
    # What holds an answer to another question of the context is left out.
    assert [len(set(row.document for row in trace)) for trace in batch.student.trace] == (
        [1, 1, 1, 2, 2, 2, 2]
    )
    np.random.seed(0)
    alone = whole.collate([(conversation,) for context in contexts for conversation in context])
    assert torch.equal(alone.targets, batch.targets)
    assert torch.equal(alone.text_ids, batch.text_ids)
    assert alone.num_tokens > 1.3 * batch.num_tokens


def test_lengths_of_contexts_are_those_of_their_lines(tokenizer, paragraphs):
    data = SFTDataModule(
        paragraphs, questions_per_context=3, tokens_per_batch=300, tokenizer=tokenizer
    )
    mixture = data.training_data()
    batch = data.collate([mixture[n] for n in range(len(mixture))])
    assert len(batch.student["attention_mask"]) == len(mixture) == 3
    if batch.compression == 4:
        assert mixture.lengths.tolist() == batch.student["attention_mask"].sum(1).tolist()


def test_a_share_of_the_rows_is_drawn_for_each_context(tokenizer, paragraphs):
    data = SFTDataModule(
        paragraphs, questions_per_context=3, expand_share=(0.0, 0.9), tokenizer=tokenizer
    )
    contexts = [data.training_data()[n] for n in range(3)]
    shares = set()
    for seed in range(8):
        np.random.seed(seed)
        batch = data.collate(contexts)
        states = [[row.state for row in trace] for trace in batch.student.trace]
        assert states[0] == states[1] == states[2]
        shares.add(states[0].count("tokens"))
    assert len(shares) > 2
    with pytest.raises(ValueError, match="the smaller one first"):
        SFTDataModule(paragraphs, expand_share=(0.5, 0.2), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"questions_per_context \(0\)"):
        SFTDataModule(paragraphs, questions_per_context=0, tokenizer=tokenizer)


def test_what_the_decoder_cannot_read_is_named_before_training(tokenizer, questions, chats):
    def data(source, window, teacher=None, **options):
        found = SFTDataModule(source, num_passages=4, **options)
        module = SimpleNamespace(
            tokenizer=tokenizer,
            model=SimpleNamespace(window=window),
            needs_teacher=teacher is not None,
            teacher_model=SimpleNamespace(window=teacher),
        )
        found.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)
        return found

    for window in (None, 10_000):
        assert len(data(questions, window).training_data()) == 12
    message = r"train conversation 'q\d+' takes \d+ positions, but the decoder has 60: max_length"
    with pytest.raises(ValueError, match=message):
        data(questions, 60).training_data()
    with pytest.raises(ValueError, match=r"val conversation 'q\d+' .* give shorter or fewer"):
        data(questions, 60).val_dataloader()
    with pytest.raises(ValueError, match="the teacher, which reads documents as text, has 200"):
        data(questions, 10_000, 200).training_data()
    with pytest.raises(ValueError, match=r"'c\d' takes \d+ positions, but the decoder has 75"):
        data(chats, 75).training_data()
    with pytest.warns(UserWarning, match="take more than max_length"):
        assert len(data(chats, 75, max_length=75).training_data()) > 0
