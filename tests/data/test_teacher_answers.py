"""A teacher's answers: what it reads, the cache, and a kill in the middle."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from refrag_lightning.data.biography_sources import BiographyConversations, BiographyWorld
from refrag_lightning.data.conversations import fill
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.data.teacher_answers import TeacherAnswers
from refrag_lightning.model import load as loading
from refrag_lightning.model.load import load
from refrag_lightning.text.tokenizer import RefragTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder with larger random weights, so that its answers follow from its prompts."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model, tokenizer = load("tiny/decoder")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.set_trainable(["decoder"])
    model.save_pretrained(folder)
    tokenizer.decoder.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(folder):
    return TeacherAnswers(str(folder), max_new_tokens=6, batch_size=2)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("refrag_lightning.data.teacher_answers.cache_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def conversations():
    world = BiographyWorld(num_people=2)
    source = BiographyConversations(world, num_groups=5, questions_a_group=2)
    return list(source.conversations("train"))


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a model is loaded."""
    names = []

    def counted(name, **options):
        names.append(name)
        return load(name, **options)

    monkeypatch.setattr(loading, "load", counted)
    return names


def ask(conversations, teacher, key=None):
    return teacher.answers(conversations, lambda c: c.passages, key or {"of": "test"})


def test_answers_are_the_models_own_greedy_ones(conversations, teacher):
    answers = ask(conversations, teacher)
    model, tokenizer = load(teacher.model)
    for conversation, answer in zip(conversations, answers, strict=True):
        # Another way to the same: each alone, through the conversation's text.
        messages = fill(conversation, conversation.passages)[:-1]
        batch = tokenizer.apply_chat([messages], expand="all")
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(tokens[0]).strip()
    assert len(set(answers)) == len(answers) and all(answers)


def test_an_answer_ends_with_its_turn_where_the_base_model_would_go_on(
    conversations, teacher, monkeypatch
):
    long = replace(teacher, max_new_tokens=40)
    model, tokenizer = load(teacher.model)
    end = tokenizer.decoder.convert_tokens_to_ids("<|im_end|>")
    model.decoder.generation_config.eos_token_id = None
    asked = []
    generate = type(model).generate

    def generating(self, **options):
        asked.append(options["generation_config"].eos_token_id)
        return generate(self, **options)

    monkeypatch.setattr(type(model), "generate", generating)
    monkeypatch.setattr(loading, "load", lambda *names, **options: (model, tokenizer))
    ask(conversations, long, key={"of": "ends"})
    assert asked == [[end]] * 3


def test_answers_are_generated_once(conversations, teacher, loads):
    first = ask(conversations, teacher)
    assert ask(conversations, teacher) == first and len(loads) == 1
    ask(conversations, teacher, key={"of": "others"})
    ask(conversations, replace(teacher, max_new_tokens=3))
    assert len(loads) == 3
    # How many are answered at once is no other question.
    assert ask(conversations, replace(teacher, batch_size=5)) == first
    assert len(loads) == 3


def test_a_kill_loses_no_answer(conversations, teacher, cache, loads):
    whole = ask(conversations, teacher)
    (path,) = (cache / "data").glob("answers-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    # Killed while the fourth answer was written.
    path.write_bytes(b"".join(lines[:3]) + lines[3][:4])
    assert ask(conversations, teacher) == whole
    assert path.read_bytes() == b"".join(lines)
    assert len(loads) == 2


def test_other_weights_at_the_same_place_are_another_teacher(folder, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    teacher = TeacherAnswers(str(copied))
    before = teacher.path({})
    # The place itself is not asked about.
    assert TeacherAnswers(str(folder)).path({}) == before
    weights = load_file(copied / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, copied / "model.safetensors")
    assert teacher.path({}) != before


def test_the_data_module_learns_the_teachers_answers(teacher):
    tokenizer = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, context="document"
    )
    source = BiographyConversations(BiographyWorld(num_people=2), num_groups=4, eval_groups=2)
    gold = SFTDataModule(source, tokenizer=tokenizer).conversations("train")[0]
    data = SFTDataModule(source, tokenizer=tokenizer, teacher_answers=teacher)
    learnt = data.conversations("train")[0]
    answers = ask(gold, teacher, key={"source": source.key(), "passages": None})
    assert [c.turns[-1].content for c in learnt] == [(answer,) for answer in answers]
    assert [c.turns[:-1] for c in learnt] == [c.turns[:-1] for c in gold]
    assert [c.references for c in learnt] == [c.references for c in gold]
    assert data.conversations("val") == SFTDataModule(source, tokenizer=tokenizer).conversations(
        "val"
    )
    named = SFTDataModule(source, tokenizer=tokenizer, teacher_answers="tiny/decoder")
    assert named.teacher_answers == TeacherAnswers("tiny/decoder")


def test_what_the_teacher_has_no_room_for_is_named(conversations, teacher, monkeypatch):
    monkeypatch.setattr("refrag_lightning.model.plain.num_positions", lambda model: 40)
    message = rf"conversation '{conversations[0].id}', read as text by the teacher .* has 40: give"
    with pytest.raises(ValueError, match=message):
        ask(conversations[:1], teacher)
