"""One rule for what an answer is, whoever asks: the most likely token each time, up to an end."""

import copy
import json
from contextlib import contextmanager

import lightning
import pytest
import torch

from refrag_lightning.cli import main
from refrag_lightning.data.conversations import QuestionConversations
from refrag_lightning.data.examples import collate
from refrag_lightning.data.question_batches import QuestionDataModule
from refrag_lightning.data.questions import Question, QuestionSource
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.data.teacher_answers import TeacherAnswers
from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading
from refrag_lightning.inference.pipeline import RefragPipeline
from refrag_lightning.model.answering import answer, answer_settings, end_tokens
from refrag_lightning.model.load import load
from refrag_lightning.training import SFTModule
from refrag_lightning.training.samples import answered
from tests.inference.pipelines import plain_parts

QUESTION = "Where does the Seine flow?"
LENGTH = 12


class Asked(QuestionSource):
    def __init__(self, reference="Paris"):
        super().__init__()
        self.reference = reference

    def read(self):
        yield Question("seine", QUESTION, (self.reference,))

    def key(self):
        return {"asked": self.reference}


def by_hand(model, tokenizer, length=LENGTH):
    """The tokens of an answer, and its text, from logits alone."""
    batch = tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
    ids = batch["input_ids"]
    ends = end_tokens(model, tokenizer)
    written = []
    while len(written) < length:
        token = int(model.decoder(torch.cat([ids, torch.tensor([written]).long()], 1))
                    .logits[0, -1].argmax())  # fmt: skip
        if token in ends:
            break
        written.append(token)
    return written, tokenizer.decode(written).strip()


@pytest.fixture(scope="module")
def expected():
    written, text = by_hand(*plain_parts())
    assert len({*written}) > 3 and len(written) == LENGTH and text
    return written, text


def settings(written, end):
    """What a decoder's generation settings may say; each alone would change an answer."""
    return {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [written[0]],
        "begin_suppress_tokens": [written[0]],
        "bad_words_ids": [[written[1]]],
        "sequence_bias": [[[written[2]], -100.0]],
        "min_new_tokens": 40,
        "min_length": 200,
        "max_length": 3,
        "max_time": 1e-9,
        "num_beams": 4,
        "do_sample": True,
        "temperature": 30.0,
        "top_p": 0.5,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": end,
        "exponential_decay_length_penalty": [1, 9.0],
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "stop_strings": ["e"],
        "guidance_scale": 3.0,
        "prompt_lookup_num_tokens": 3,
        "remove_invalid_values": True,
        "setting_of_tomorrow": 1,
    }


NAMES = list(settings([0, 0, 0], 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, expected):
    """A decoder whose generation settings say all of that."""
    folder = tmp_path_factory.mktemp("models") / "decoder"
    model, tokenizer = plain_parts()
    model.save_pretrained(folder)
    tokenizer.decoder.save_pretrained(folder)
    path = folder / "generation_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | settings(expected[0], said["eos_token_id"])))
    return str(folder)


def by_pipeline(folder, **_):
    return RefragPipeline.from_pretrained(folder)(QUESTION, max_new_tokens=LENGTH).text


def by_stream(folder, **_):
    pipeline = RefragPipeline.from_pretrained(folder)
    return "".join(pipeline.stream(QUESTION, max_new_tokens=LENGTH))


def by_evaluation(folder, **_):
    model, tokenizer = load(folder)
    asked = QuestionDataModule(Asked(), prompt="{question}", tokenizer=tokenizer).questions
    reader = Reader(model, tokenizer)
    [text] = reader.answers([asked[0].prompt], Reading("none"), max_new_tokens=LENGTH)
    return text


def examples_of(tokenizer, reference="Paris"):
    source = QuestionConversations(Asked(reference), "{question}")
    data = SFTDataModule(source, read="text", tokenizer=tokenizer)
    return [data.example(c, (), with_prompt=True) for c in source.read()]


def module_of(folder):
    module = SFTModule(encoder=None, decoder=folder, max_new_tokens=LENGTH)
    module.configure_model()
    return module.eval()


def by_validation(folder, expected, **_):
    """What validation scores is not shown; it is right where it is the reference."""
    module = module_of(folder)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer = trainer
    trainer.strategy.connect(module)
    logged = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)
    batch = collate(examples_of(module.tokenizer, expected), module.tokenizer)
    with torch.inference_mode():
        module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    return expected if logged["val/em"] == 1 else "another answer"


def by_samples(folder, **_):
    module = module_of(folder)
    [sample] = answered(module, examples_of(module.tokenizer), module.tokenizer.rates, size=1)
    return sample.answer


def by_teacher(folder, monkeypatch, tmp_path, **_):
    monkeypatch.setattr("refrag_lightning.data.teacher_answers.cache_dir", lambda: tmp_path)
    source = QuestionConversations(Asked(), "{question}")
    teacher = TeacherAnswers(folder, max_new_tokens=LENGTH)
    [text] = teacher.answers(list(source.read()), lambda _: (), {})
    return text


def by_lm_eval(folder, **_):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from refrag_lightning.evaluation.lm_eval import RefragLM

    lm = RefragLM(folder, device="cpu")
    context = lm.apply_chat_template([{"role": "user", "content": QUESTION}])
    asked = (context, {"max_gen_toks": LENGTH})
    [text] = lm.generate_until([Instance("generate_until", doc={}, arguments=asked, idx=0)])
    return text.strip()


def by_command(folder, capsys, **_):
    options = ["--prompt", QUESTION, "--chat", "true", "--max_new_tokens", str(LENGTH)]
    main(["generate", "--model", folder, *options])
    return capsys.readouterr().out.removesuffix("\n")


PLACES = [
    by_pipeline,
    by_stream,
    by_evaluation,
    by_validation,
    by_samples,
    by_teacher,
    by_lm_eval,
    by_command,
]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_answer_of_the_logits(
    place, folder, expected, capsys, monkeypatch, tmp_path
):
    said = place(
        folder, expected=expected[1], capsys=capsys, monkeypatch=monkeypatch, tmp_path=tmp_path
    )
    assert said == expected[1]


@contextmanager
def generating_with(decoder, **options):
    own = decoder.generation_config
    decoder.generation_config = copy.deepcopy(own)
    for name, value in options.items():
        setattr(decoder.generation_config, name, value)
    yield
    decoder.generation_config = own


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_of_the_decoder_says_what_is_answered(name, expected):
    model, tokenizer = plain_parts()
    value = settings(expected[0], model.decoder.generation_config.eos_token_id)[name]
    batch = tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
    with generating_with(model.decoder, **{name: value}):
        assert answer(model, tokenizer, batch, max_new_tokens=LENGTH) == [expected[1]]
        assert by_pipeline_of(model, tokenizer) == expected[1]


def by_pipeline_of(model, tokenizer, **options):
    return RefragPipeline(model, tokenizer)(QUESTION, max_new_tokens=LENGTH, **options).text


def test_a_request_has_its_own_settings(expected):
    model, tokenizer = plain_parts()
    batch = tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
    penalised = [
        answer(model, tokenizer, batch, max_new_tokens=LENGTH, repetition_penalty=3.0)[0],
        by_pipeline_of(model, tokenizer, repetition_penalty=3.0),
    ]
    assert penalised[0] == penalised[1] != expected[1]
    hot = {"max_new_tokens": LENGTH, "temperature": 50.0}
    drawn = {answer(model, tokenizer, batch, **hot)[0] for _ in range(4)}
    assert len(drawn) == 4
    # All tokens can be drawn, not the 50 most likely ones alone.
    assert answer_settings([], **hot).top_k == 0
    narrow = answer(model, tokenizer, batch, **hot, top_k=1)
    assert narrow == [expected[1]]


def test_answers_of_a_batch_end_at_any_end_of_the_decoder_and_at_stop_strings(expected):
    model, tokenizer = plain_parts()
    written, text = expected
    chat = [[{"role": "user", "content": asked}] for asked in (QUESTION, "The Po?")]
    batch = tokenizer.apply_chat(chat)
    other = answer(model, tokenizer, batch, max_new_tokens=LENGTH)[1]
    # An end token need not be a special one.
    end = next(token for place, token in enumerate(written) if place and token != written[0])
    place = written.index(end)
    own = model.decoder.generation_config.eos_token_id
    with generating_with(model.decoder, eos_token_id=[own, end]):
        assert answer(model, tokenizer, batch, max_new_tokens=LENGTH)[0] == by_pipeline_of(
            model, tokenizer
        )
        assert answer(model, tokenizer, batch, max_new_tokens=LENGTH)[0] == (
            tokenizer.decode(written[:place]).strip()
        )
    stop = text[3:6]
    for ends in (own, None):
        with generating_with(model.decoder, eos_token_id=ends):
            found = answer(model, tokenizer, batch, max_new_tokens=LENGTH, stop=[stop])
            assert found[0] == text[: text.index(stop)].strip()
            assert found[0] == by_pipeline_of(model, tokenizer, stop=(stop,))
            if stop not in other:
                assert found[1] == other


def test_a_control_token_can_stop_an_answer(expected):
    model, tokenizer = plain_parts()
    written, _ = expected
    batch = tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
    control = int(tokenizer.decoder.convert_tokens_to_ids("<|im_start|>"))
    head = model.get_output_embeddings()
    place = 3

    def say_it(_, args, logits):
        # After three tokens the control token is the most likely one.
        calls.append(1)
        if len(calls) == place + 1:
            logits[:, -1, control] = 1e4
        return logits

    for way in ("answer", "pipeline"):
        calls = []
        hook = head.register_forward_hook(say_it)
        if way == "answer":
            options = {"max_new_tokens": LENGTH, "stop": ["<|im_start|>"]}
            [said] = answer(model, tokenizer, batch, **options)
        else:
            said = by_pipeline_of(model, tokenizer, stop=("<|im_start|>",))
        hook.remove()
        assert said == tokenizer.decode(written[:place]).strip()


def test_the_ends_of_a_template_that_wants_a_system_message():
    model, tokenizer = plain_parts()
    template = tokenizer.decoder.chat_template
    with generating_with(model.decoder, eos_token_id=None):
        end = end_tokens(model, tokenizer)
        assert tokenizer.decoder.convert_ids_to_tokens(end) == ["<|im_end|>"]
        tokenizer.decoder.chat_template = (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}"
            + template
        )
        try:
            assert end_tokens(model, tokenizer) == end
        finally:
            tokenizer.decoder.chat_template = template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature \(-1.0\)"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"top_q": 0.5}, "top_q: generation has no such setting"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        answer_settings([2], max_new_tokens=3, **options)
