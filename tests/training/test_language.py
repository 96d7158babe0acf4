"""LanguageModule: its losses against full logits, teachers, what trains, validation figures."""

import lightning
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from refrag_lightning import hub
from refrag_lightning.data.examples import Example, collate
from refrag_lightning.evaluation.metrics import answer_scores
from refrag_lightning.model.answering import end_tokens
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.segments import render_chat
from refrag_lightning.training import PretrainModule, SFTModule

DOC = '<doc id="1" title="Rivers">The Seine flows through Paris, and on to the sea.</doc>'
TURNS = {
    "answer": (f"{DOC} Where does the Seine flow?", "Through Paris."),
    "chat": ("Is the Loire long?", "Yes, it is longer than the Seine is."),
    "reconstruct": (f"{DOC} Repeat the text.", "The Seine flows through Paris."),
}


def build(cls=SFTModule, **options):
    options = {"encoder": "tiny/encoder", "decoder": "tiny/decoder"} | options
    if options["encoder"] is not None:
        options = {"compression": 4, "context": "document"} | options
    module = cls(**options)
    torch.manual_seed(0)
    module.configure_model()
    module.trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1
    )
    module.trainer.strategy.connect(module)
    module.logged = {}
    module.log_train = lambda metrics, **_: module.logged.update(metrics)
    module.log_dict = lambda metrics, **_: module.logged.update(metrics)
    return module


def segments(tokenizer, *contents, prompt=False):
    messages = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant"), contents, strict=False)
    ]
    common = {"header": tokenizer.header, "footer": tokenizer.footer}
    return tuple(render_chat(tokenizer.decoder, messages, add_generation_prompt=prompt, **common))


def examples(tokenizer, tasks=tuple(TURNS), *, expand="none", prompts=False):
    if tokenizer.encoder is None:
        expand = "all"
    return [
        Example(
            segments(tokenizer, *TURNS[task]),
            task=task,
            id=task,
            expand=expand,
            prompt=segments(tokenizer, TURNS[task][0], prompt=True) if prompts else None,
            references=(TURNS[task][1],),
        )
        for task in tasks
    ]


def make(module, *, tasks=tuple(TURNS), expand="none", prompts=False, **options):
    return collate(examples(module.tokenizer, tasks, expand=expand, prompts=prompts),
                   module.tokenizer, **options)  # fmt: skip


def by_hand(model, side):
    """Log-probabilities after each labelled position's predecessor, and labels: (P, V), (P,)."""
    tensors = {name: value for name, value in side.items() if name != "labels"}
    log_probs = F.log_softmax(model(**tensors).logits, -1)[:, :-1]
    labels = side["labels"][:, 1:]
    return log_probs[labels != -100], labels[labels != -100]


def perturb_adapter(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("encoder", ["tiny/encoder", None])
def test_cross_entropy_equals_the_one_from_all_logits(encoder):
    module = build(encoder=encoder, loss_chunk=5)
    batch = make(module)
    loss = module.training_step(batch, 0)
    log_probs, labels = by_hand(module.model, batch.student)
    nll = F.nll_loss(log_probs, labels, reduction="none")
    torch.testing.assert_close(loss, nll.mean())
    hits = (log_probs.argmax(-1) == labels).float().mean()
    torch.testing.assert_close(module.logged["top1"], hits)
    # Texts of one task each, in order: the mean over each text's own targets.
    counts = [(row != -100).sum().item() for row in batch.student["labels"]]
    for task, part in zip(TURNS, nll.split(counts), strict=True):
        torch.testing.assert_close(module.logged[f"nll/{task}"], part.mean())
    assert ("nll@4" in module.logged) == (encoder is not None)


def test_tasks_count_by_their_weights():
    module = build(task_weights={"answer": 3.0, "chat": 0.0}, ce_weight=2.0)
    batch = make(module)
    loss = module.training_step(batch, 0)
    log_probs, labels = by_hand(module.model, batch.student)
    nll = F.nll_loss(log_probs, labels, reduction="none")
    first, _, third = nll.split([(r != -100).sum().item() for r in batch.student["labels"]])
    expected = 2 * (3 * first.sum() + third.sum()) / (3 * len(first) + len(third))
    torch.testing.assert_close(loss, expected)
    weightless = make(module, tasks=("chat",))
    assert module.training_step(weightless, 0).item() == 0


def test_packed_texts_have_the_same_loss():
    module = build()
    loss = module.training_step(make(module), 0)
    packed = make(module, line_length=120)
    assert packed.student["input_ids"].shape[0] < 3
    torch.testing.assert_close(module.training_step(packed, 0), loss)


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def with_dropout(request, tmp_path_factory):
    """A decoder with dropout and the tiny decoder's vocabulary, as a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("tiny/decoder").path)
    tokenizer.save_pretrained(folder)
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0}
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "opt": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 256,
        },
    }
    config = AutoConfig.for_model(request.param, **common, **sizes[request.param])
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    decoder.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("teacher", ["self", "same", "other"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teacher_has_no_dropout_though_its_student_has(with_dropout, teacher, checkpointing):
    """Its reading is that of evaluation mode, and each part is in the mode that it was in."""
    lora = {"r": 2, "dropout": 0.5, "target_modules": "all-linear"}
    module = build(
        decoder=with_dropout,
        teacher=with_dropout if teacher == "other" else teacher,
        train=["projector", "decoder"],
        lora=lora,
        activation_checkpointing=checkpointing,
    )
    perturb_adapter(module.model)
    batch = make(module, teacher=True)
    expected, head = module._teach(batch)
    logits = head(expected)
    module.on_fit_start()
    modes = {name: part.training for name, part in module.named_modules()}
    assert modes["model.decoder"] and not modes["model.encoder"]
    student = module.model.hidden(batch.student)
    assert not torch.equal(student, module.model.hidden(batch.student))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for _ in range(2):
        got, head = module._teach(batch)
        assert torch.equal(got, expected) and not got.requires_grad
        assert torch.equal(head(got), logits)
    assert torch.equal(torch.get_rng_state(), state)
    module.training_step(batch, 0).backward()
    assert {name: part.training for name, part in module.named_modules()} == modes
    # Only `same` is what the model itself makes of the texts.
    whole = make(module, expand="all")
    own = module.model.eval().hidden(whole.student).flatten(0, 1)[whole.predicting]
    assert torch.allclose(own, expected, atol=1e-4) == (teacher == "same")


def test_the_same_decoder_teaches_itself_to_read_rows(with_dropout):
    """With its adapter on: a student that reads documents as text has nothing to learn."""
    lora = {"r": 2, "dropout": 0.5, "target_modules": ["q_proj", "lm_head"]}
    module = build(encoder=None, teacher="same", ce_weight=0.0, lora=lora)
    perturb_adapter(module.model)
    batch = make(module, teacher=True)
    assert module.training_step(batch, 0).item() == pytest.approx(0, abs=1e-6)
    options = {"decoder": with_dropout, "train": ["projector", "decoder"], "lora": {"r": 2}}
    module = build(teacher="same", ce_weight=0.0, **options)
    perturb_adapter(module.model)
    assert module.training_step(make(module, expand="all", teacher=True), 0).item() < 1e-5
    assert module.training_step(make(module, teacher=True), 0).item() > 0.01


def test_a_frozen_decoder_has_no_dropout_where_activations_are_computed_again(with_dropout):
    module = build(train=["projector"], decoder=with_dropout, activation_checkpointing=True)
    batch = make(module)
    before = module.model.hidden(batch.student)
    module.on_fit_start()
    assert torch.equal(module.model.hidden(batch.student), before)
    module.training_step(batch, 0).backward()


def test_one_rank_that_sees_a_leak_has_all_ranks_read_texts_apart(monkeypatch):
    module = build()
    loss = module.training_step(make(module), 0)
    packed = make(module, line_length=120)
    asked = []

    def other_rank_leaks(own):
        asked.append(own)
        return [own, False]

    monkeypatch.setattr("refrag_lightning.training.language.gather", other_rank_leaks)
    with pytest.warns(UserWarning, match="would see each other in LlamaForCausalLM"):
        torch.testing.assert_close(module.training_step(packed, 0), loss)
    module.training_step(packed, 1)
    assert asked == [True]
    assert not module.model.keeps_apart(packed.student)


def test_an_example_that_the_decoder_cannot_read_is_named():
    module = build(teacher="tiny/decoder", train=["projector", "decoder"])
    batch = make(module, teacher=True)
    for model, message in (
        (module.model, "example '.*' takes .* positions, but the decoder has 9: leave it out"),
        (module.teacher_model, "example '.*', read as text by the teacher, takes .* has 9"),
    ):
        model.window, before = 9, model.window
        with pytest.raises(ValueError, match=message):
            module.training_step(batch, 0)
        model.window = before
    batch = make(module, teacher=True, prompts=True)
    module.model.window = int(batch.student["attention_mask"].sum(1).max())
    with pytest.raises(ValueError, match=r"the prompt of example .* max_new_tokens \(999\) more"):
        module.max_new_tokens = 999
        module.validation_step(batch, 0)


@pytest.mark.parametrize("line_length", [None, 160])
def test_kl_to_the_same_decoder_reading_the_text(line_length):
    options = {"train": ["projector", "decoder"], "lora": {"r": 2}}
    module = build(teacher="self", kl_weight=0.5, kl_temperature=2.0, **options)
    perturb_adapter(module.model)
    assert module.needs_teacher
    batch = make(module, teacher=True, line_length=line_length)
    loss = module.training_step(batch, 0)

    plain = PlainModel.from_pretrained("tiny/decoder")
    whole = make(module, expand="all")
    teacher = plain(
        **{k: whole.student[k] for k in ("input_ids", "attention_mask", "position_ids")}
    ).logits[:, :-1]
    teacher = teacher[whole.student["labels"][:, 1:] != -100]
    log_probs, labels = by_hand(module.model, make(module).student)
    p = F.log_softmax(teacher / 2, -1)
    q = F.log_softmax(log_probs / 2, -1)
    kl = 4 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(module.logged["kl"], kl, rtol=1e-4, atol=1e-5)
    expected = F.nll_loss(log_probs, labels) + 0.5 * kl
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_reads_what_its_teacher_reads_has_no_kl():
    module = build(teacher="self", ce_weight=0.0, train=["projector", "decoder"], lora={"r": 2})
    batch = make(module, expand="all", teacher=True)
    assert module.training_step(batch, 0).item() == pytest.approx(0, abs=1e-5)


def test_another_model_teaches_if_it_has_the_same_vocabulary():
    module, other = build(teacher="self"), build(teacher="tiny/decoder")
    assert isinstance(other.teacher_model, PlainModel)
    assert not any(p.requires_grad for p in other.teacher_model.parameters())
    batch = make(module, teacher=True)
    torch.testing.assert_close(other.training_step(batch, 0), module.training_step(batch, 0))
    assert not any("teacher" in name for name in other.state_dict())
    with pytest.raises(ValueError, match=r"teacher \('tiny/gemma'\) has another vocabulary"):
        build(teacher="tiny/gemma")


def test_the_teacher_needs_no_encoder():
    module = build(teacher="self")
    batch = make(module, teacher=True)
    calls = []
    module.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    module.training_step(batch, 0)
    assert len(calls) == 1


def test_data_without_a_teacher_side_is_refused():
    module = build(teacher="self")
    with pytest.raises(ValueError, match=r"teacher \('self'\).*no teacher side"):
        module.training_step(make(module), 0)


def test_an_adapter_on_the_head_is_refused_with_self_as_teacher():
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="output layer without an adapter"):
        build(encoder=None, teacher="self", lora=lora)


def test_a_step_never_waits_for_a_number(monkeypatch):
    module = build(teacher="self", task_weights={"answer": 2.0})
    batch = make(module, teacher=True)

    def refuse(self):
        raise AssertionError("a step asked for a number")

    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    module.training_step(batch, 0)


@pytest.mark.parametrize(
    ("cls", "options", "parts"),
    [
        (SFTModule, {}, {"projector", "encoder", "decoder"}),
        (PretrainModule, {}, {"projector", "encoder"}),
        (SFTModule, {"encoder": None}, {"decoder"}),
        (SFTModule, {"train": ["projector", "decoder"], "lora": {"r": 2}},
         {"projector", "decoder"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tasks", [("answer", "chat"), ("chat",)])
def test_every_batch_reaches_all_that_trains_and_nothing_else(cls, options, parts, tasks):
    module = build(cls, **options)
    module.on_fit_start()
    module.training_step(make(module, tasks=tasks), 0).backward()
    moving = {n: p for n, p in module.model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in moving} == parts
    assert all(parameter.requires_grad for parameter in moving.values())
    missing = [n for n, p in module.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("train", [["projector"], ["projector", "encoder", "decoder"]])
def test_checkpointed_activations_give_the_same_gradients(train):
    gradients = []
    for checkpointing in (False, True):
        module = build(train=train, activation_checkpointing=checkpointing)
        module.on_fit_start()
        calls = []
        norm = module.model.decoder.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        module.training_step(make(module), 0).backward()
        # Twice: once more in the backward pass.
        assert len(calls) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in module.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_validation_by_task_and_rate():
    module = build(compression=[8, 4], max_new_tokens=6)
    assert module.tokenizer.compression == 8
    expected = {}
    for loader, rate in enumerate((4, 8)):
        for tasks in (("answer", "chat"), ("chat", "reconstruct"), ("answer",)):
            batch = make(module, tasks=tasks, prompts=True, compression=rate)
            with torch.inference_mode():
                module.validation_step(batch, 0, loader)
            log_probs, labels = by_hand(module.model, batch.student)
            nll = F.nll_loss(log_probs, labels, reduction="none")
            counts = [(row != -100).sum().item() for row in batch.student["labels"]]
            tokens = module.model.generate(**batch.prompts, max_new_tokens=6, do_sample=False)
            answers = module.tokenizer.batch_decode(tokens)
            scores = [
                answer_scores(answer.strip(), wanted)["f1"]
                for answer, wanted in zip(answers, batch.references, strict=True)
            ]
            expected.setdefault(f"val/f1@{rate}", []).extend(map(torch.tensor, scores))
            expected.setdefault("val/loss", []).append(nll)
            for task, part in zip(tasks, nll.split(counts), strict=True):
                expected.setdefault(f"val/nll/{task}@{rate}", []).append(part)
    module.on_validation_epoch_end()
    names = {"val/loss"} | {
        f"val/{figure}@{rate}"
        for rate in (4, 8)
        for figure in ("em", "f1", *(f"{m}/{t}" for m in ("nll", "accuracy") for t in TURNS))
    }
    assert set(module.logged) == names
    for name, values in expected.items():
        mean = torch.cat([value.flatten() for value in values]).mean().item()
        assert float(module.logged[name]) == pytest.approx(mean, rel=1e-4), name
    # The next epoch starts from nothing, and has no scores where nothing is generated.
    module.logged.clear()
    module.test_step(make(module, tasks=("chat",)), 0)
    module.on_test_epoch_end()
    assert set(module.logged) == {"test/loss", "test/nll/chat@8", "test/accuracy/chat@8"}


def test_answers_end_where_the_chat_template_ends_a_turn():
    module = build(decoder="tiny/gemma")
    module.model.decoder.generation_config.eos_token_id = None
    end = module.tokenizer.decoder.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(module.model, module.tokenizer) == [end]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce_weight": -1.0}, r"ce_weight \(-1.0\)"),
        ({"task_weights": {"chat": -2.0}}, r"task_weights chat \(-2.0\)"),
        ({"ce_weight": 0.0}, "nothing is learnt"),
        ({"ce_weight": 0.0, "kl_weight": 0.0, "teacher": "self"}, "nothing is learnt"),
        ({"kl_temperature": 0.0}, r"kl_temperature \(0.0\)"),
        ({"loss_chunk": 0}, r"loss_chunk \(0\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SFTModule("tiny/encoder", "tiny/decoder", **options)
