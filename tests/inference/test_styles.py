"""Chat templates of seven styles: what is learnt is answered, by every way to ask."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refrag_lightning.data.conversations import QuestionConversations
from refrag_lightning.data.question_batches import QuestionDataModule
from refrag_lightning.data.questions import Question, QuestionSource
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.data.teacher_answers import TeacherAnswers
from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading
from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.inference.prompt import converse, write
from refrag_lightning.inference.request import Request
from refrag_lightning.model import load as loading
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.plain import control_tokens
from refrag_lightning.text.segments import render_chat
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.text.spaces import spaced
from tests.text.styles import SEVEN, STYLES, decoder_of, styled

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome, Italy",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Egypt": "Cairo",
}


class Capitals(QuestionSource):
    def read(self):
        for country, city in CAPITALS.items():
            yield Question(country, f"Capital: {country}", (city,))

    def key(self):
        return {"capitals": len(CAPITALS)}


def learn(model, batch, *, until):
    """Overfits the decoder to a batch; leaves the model in evaluation mode."""
    model.set_trainable(["decoder"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(1000):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss <= until:
            break
    model.eval()


def tokenizer_of(style):
    return RefragTokenizer(None, styled(style), compression=1)


def asked_of(tokenizer):
    """The questions as evaluation has them."""
    data = QuestionDataModule(Capitals(), prompt="{question}", tokenizer=tokenizer)
    return data.questions


def examples_of(tokenizer):
    """The questions as training has them."""
    source = QuestionConversations(Capitals(), "{question}")
    data = SFTDataModule(source, read="text", tokenizer=tokenizer)
    return [data.example(c, (), with_prompt=True) for c in source.read()]


def ids(tokenizer, segments):
    return tokenizer.build([segments], text_only=True)["input_ids"][0].tolist()


@pytest.mark.parametrize("style", STYLES)
def test_what_is_learnt_stands_behind_the_generation_prompt(style, monkeypatch, tmp_path):
    tokenizer = tokenizer_of(style)
    prompts = []
    for example, asked, answer in zip(
        examples_of(tokenizer), asked_of(tokenizer), CAPITALS.values(), strict=True
    ):
        messages = [{"role": "user", "content": asked.question}]
        prompt = tokenizer.apply_chat([messages])["input_ids"][0].tolist()
        prompts.append(prompt)
        if style != "unprompted":
            rendered = styled(style).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert tokenizer.decode(prompt, skip_special_tokens=False) == rendered
        assert prompt == ids(tokenizer, example.prompt) == ids(tokenizer, asked.prompt)
        request = Request.of(asked.question)
        assert prompt == ids(tokenizer, write(converse(request), tokenizer, request))
        for segments in (example.segments, asked.segments):
            batch = tokenizer.build([segments], text_only=True)
            learnt = batch["labels"][0] != -100
            first = int(learnt.int().argmax())
            assert batch["input_ids"][0, :first].tolist() == prompt
            # The answer, the end of its turn, and nothing between or before them.
            written = batch["input_ids"][0, learnt].tolist()
            assert tokenizer.decode(written).strip() == answer
            assert written[-1] in control_tokens(styled(style))
            assert learnt[first : first + len(written)].all()

    # A teacher is asked the same.
    read = []

    class Asked(Exception):
        pass

    class Model(PlainModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.decoder = PlainModel.from_pretrained("tiny/decoder").decoder

        def generate(self, input_ids, attention_mask, **options):
            pairs = zip(input_ids, attention_mask.bool(), strict=True)
            read.extend(line[mask].tolist() for line, mask in pairs)
            raise Asked

    monkeypatch.setattr(loading, "load", lambda *_, **__: (Model(), tokenizer))
    monkeypatch.setattr("refrag_lightning.data.teacher_answers.cache_dir", lambda: tmp_path)
    teacher = TeacherAnswers("tiny/decoder", batch_size=6)
    with pytest.raises(Asked):
        source = QuestionConversations(Capitals(), "{question}")
        teacher.answers(list(source.read()), lambda _: (), {})
    assert read == prompts


@pytest.mark.parametrize("style", SEVEN)
def test_six_answers_are_learnt_and_given_by_every_way_to_ask(style):
    tokenizer = tokenizer_of(style)
    torch.manual_seed(0)
    model = PlainModel.from_pretrained(decoder_of(style))
    known = model.get_input_embeddings().num_embeddings
    model.decoder.resize_token_embeddings(len(tokenizer.decoder), mean_resizing=False)
    # As the others: word embeddings are not trained.
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[known:], std=0.5)
    model.decoder.generation_config.eos_token_id = None
    batch = tokenizer.build([e.segments for e in examples_of(tokenizer)], text_only=True)
    learn(model, batch, until=0.1)

    pipeline = RefragPipeline(model, tokenizer)
    asked = asked_of(tokenizer)
    by_pipeline = [pipeline(a.question, max_new_tokens=16).text for a in asked]
    reader = Reader(model, tokenizer)
    by_reader = reader.answers([a.prompt for a in asked], Reading("none"), max_new_tokens=16)
    messages = [[{"role": "user", "content": a.question}] for a in asked]
    tokens = model.generate(
        **tokenizer.apply_chat(messages), max_new_tokens=16, eos_token_id=pipeline.end_ids
    )
    by_generate = tokenizer.batch_decode(tokens)
    right = list(CAPITALS.values())
    assert by_pipeline == right
    assert by_reader == right
    assert [answer.strip() for answer in by_generate] == right


@pytest.mark.parametrize("kind", [("bpe", "prepend"), ("unigram", "first")])
def test_answers_are_learnt_with_an_artificial_space(kind):
    pairs = {
        "the town": "the river",
        "a river": "a town by the river",
        "old town": "through",
        "by": "flows",
        "user": "assistant",
        "the": "a",
    }
    decoder = copy.deepcopy(spaced(*kind))
    decoder.chat_template = styled("llama2").chat_template
    tokenizer = RefragTokenizer(None, decoder, compression=1)
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ends = {"bos_token_id": decoder.bos_token_id, "eos_token_id": decoder.eos_token_id}
    ends["pad_token_id"] = decoder.eos_token_id
    config = LlamaConfig(vocab_size=len(decoder), **shape, **heads, **ends)
    model = PlainModel(LlamaForCausalLM(config))
    asked = [[{"role": "user", "content": question}] for question in pairs]
    answered = [
        [*question, {"role": "assistant", "content": answer}]
        for question, answer in zip(asked, pairs.values(), strict=True)
    ]
    style = {"header": "", "footer": ""}
    batch = tokenizer.build(
        [render_chat(decoder, each, add_generation_prompt=False, **style) for each in answered]
    )
    learn(model, batch, until=0.01)
    pipeline = RefragPipeline(model, tokenizer)
    assert [pipeline(q, max_new_tokens=24).text for q in pairs] == [*pairs.values()]
    tokens = model.generate(
        **tokenizer.apply_chat(asked), max_new_tokens=24, eos_token_id=pipeline.end_ids
    )
    assert [text.strip() for text in tokenizer.batch_decode(tokens)] == [*pairs.values()]
    prompts = [render_chat(decoder, each, **style) for each in asked]
    by_reader = Reader(model, tokenizer).answers(prompts, Reading("none"), max_new_tokens=24)
    assert [text.strip() for text in by_reader] == [*pairs.values()]
