"""AlignmentModule: its losses against loops over spans, what trains, and what comes out."""

import lightning
import pytest
import torch
import torch.nn.functional as F

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.data import AlignmentDataModule, PydocSource
from refrag_lightning.data.alignment_batch import Aligner
from refrag_lightning.training import AlignmentModule

TEXTS = [
    "The Seine flows through Paris, and on to the sea near Le Havre.",
    "Rivers: the Loire is longer.",
    "It rises in the south; nobody swims in it, as far as is known here.",
]


def _module(**options):
    options = {"encoder": "tiny/encoder", "decoder": "tiny/decoder", "compression": 4} | options
    module = AlignmentModule(**({"context": "document"} | options))
    torch.manual_seed(0)
    module.configure_model()
    module.trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1
    )
    module.trainer.strategy.connect(module)
    module.logged = {}
    module.log_train = lambda metrics, **_: module.logged.update(metrics)
    return module


def _batch(module, spans="token"):
    aligner = Aligner(module.tokenizer, spans=spans, max_tokens=64)
    return aligner.collate([e for text in TEXTS for e in aligner.examples(text)])


def _by_hand(module, batch, num_texts):
    """MSE over all spans, KLD and agreement over the first texts, by loops, a text at a time."""
    model, decoder = module.model, module.model.decoder
    vectors = model.project(model.encode(batch.student)).flatten(0, 1)
    table = decoder.get_input_embeddings().weight
    squares, divergences, same = [], [], []
    for text in range(batch.num_texts):
        student = vectors[batch.student["slot_ids"][text][batch.student["slot_ids"][text] >= 0]]
        teacher = table[batch.teacher["input_ids"][text][batch.teacher["attention_mask"][text] > 0]]
        student_spans = batch.student_spans[text][: len(student)]
        teacher_spans = batch.teacher_spans[text][: len(teacher)]
        student_logits = decoder(inputs_embeds=student[None]).logits[0]
        teacher_logits = decoder(inputs_embeds=teacher[None]).logits[0]
        for span in teacher_spans.unique().tolist():
            if span < 0:
                continue
            mine, other = student_spans == span, teacher_spans == span
            squares.append((student[mine].mean(0) - teacher[other].mean(0)).square().mean())
            if text >= num_texts:
                continue
            p = F.log_softmax(teacher_logits[other.nonzero().max()], -1)
            q = F.log_softmax(student_logits[mine.nonzero().max()], -1)
            divergences.append((p.exp() * (p - q)).sum())
            same.append(float(p.argmax() == q.argmax()))
    return (
        torch.stack(squares).mean(),
        torch.stack(divergences).mean(),
        sum(same) / len(same),
    )


@pytest.mark.parametrize("spans", ["token", "row"])
@pytest.mark.parametrize("num_texts", [1, 3])
def test_losses_equal_loops_over_spans(spans, num_texts):
    module = _module(kld_texts=num_texts, mse_weight=3.0, kld_weight=0.5)
    batch = _batch(module, spans)
    loss = module.training_step(batch, 0)
    mse, kld, top1 = _by_hand(module, batch, num_texts)
    torch.testing.assert_close(module.logged["mse"], mse)
    torch.testing.assert_close(module.logged["kld"], kld, rtol=1e-4, atol=1e-5)
    assert module.logged["top1"].item() == pytest.approx(top1)
    torch.testing.assert_close(loss, 3 * mse + 0.5 * kld, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["tiny/gemma", "tiny/llama3"])
def test_other_families_align(decoder):
    module = _module(decoder=decoder, ce_weight=0.1)
    loss = module.training_step(_batch(module), 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert {"mse", "kld", "ce"} <= module.logged.keys()


def test_a_perfect_student_has_no_loss():
    module = _module()
    batch = _batch(module)
    model = module.model
    student, teacher = module._embed(batch)
    perfect = student.clone()
    # Spans of one vector and one token get the decoder's own embedding.
    for span in batch.one_token.nonzero().flatten():
        place = teacher.flatten(0, 1)[batch.teacher_last[span]]
        perfect.view(-1, perfect.shape[-1])[batch.student_last[span]] = place
    means = module._span_means(batch, perfect, teacher)
    torch.testing.assert_close(means[0][batch.one_token], means[1][batch.one_token])
    hits, count = module._nearest(batch, means[0])
    assert hits == count == batch.one_token.sum() > 0
    assert model.training is False


def test_one_decoder_pass_a_side_and_one_encoder_call():
    module = _module()
    calls = {"encoder": 0, "decoder": 0}
    for name, part in (
        ("encoder", module.model.encoder),
        ("decoder", module.model.decoder.base_model),
    ):
        part.register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1), always_call=True
        )
    module.training_step(_batch(module), 0)
    assert calls == {"encoder": 1, "decoder": 2}


def test_a_step_never_waits_for_a_number(monkeypatch):
    module = _module()
    batch = _batch(module)
    module.model.mean_embedding()

    def refuse(self):
        raise AssertionError("item() in a step")

    monkeypatch.setattr(torch.Tensor, "item", refuse)
    module.training_step(batch, 0)


def test_kld_start_runs_the_decoder_later():
    module = _module(kld_start=1)
    module.training_step(_batch(module), 0)
    assert "kld" not in module.logged
    module = _module(kld_start=0)
    module.training_step(_batch(module), 0)
    assert "kld" in module.logged


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"projector"}),
        ({"train": ["projector", "encoder"]}, {"projector", "encoder"}),
        ({"train": ["projector", "decoder"], "lora": {"r": 2}}, {"projector", "decoder"}),
        ({"train": ["decoder"]}, {"decoder"}),
    ],
)
def test_what_trains_gets_gradients_and_nothing_else(options, parts):
    module = _module(**options)
    module.training_step(_batch(module), 0).backward()
    moving = {n: p for n, p in module.model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in moving} == parts
    assert all(parameter.requires_grad for parameter in moving.values())
    missing = [n for n, p in module.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_teacher_is_the_decoder_without_its_adapter():
    plain = _module()
    adapted = _module(train=["projector", "decoder"], lora={"r": 2})
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = _batch(plain)
    embeds = plain._embed(batch)[1]
    expected = plain._teacher_logits(batch, embeds, 3)
    torch.testing.assert_close(adapted._teacher_logits(batch, embeds, 3), expected)
    student = adapted._student_logits(batch, adapted._embed(batch)[0], 3)
    assert not torch.allclose(student, plain._student_logits(batch, plain._embed(batch)[0], 3))


def test_a_teacher_has_no_dropout_though_its_student_has():
    module = _module(train=["projector", "decoder"], lora={"r": 2})
    for part in module.model.decoder.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    batch = _batch(module)
    student, teacher = module._embed(batch)
    expected = module._teacher_logits(batch, teacher, 3)
    module.on_fit_start()
    modes = {name: part.training for name, part in module.named_modules()}
    assert torch.equal(module._teacher_logits(batch, teacher, 3), expected)
    assert {name: part.training for name, part in module.named_modules()} == modes
    first, second = (module._student_logits(batch, student, 3) for _ in range(2))
    assert not torch.equal(first, second)


def _fit(tmp_path, module, data, **options):
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, data)
    return trainer


def test_it_learns_and_the_folder_generates(tmp_path, capsys):
    lightning.seed_everything(0)
    module = AlignmentModule(
        "tiny/encoder",
        "tiny/decoder",
        compression=4,
        context="document",
        mse_weight=10.0,
        lr=5e-3,
    )
    data = AlignmentDataModule(PydocSource(limit=20), max_tokens=32, batch_size=8, eval_pieces=16)
    before = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).validate(
        module, data, verbose=False
    )[0]
    trainer = _fit(
        tmp_path, module, data, max_steps=60, val_check_interval=60, check_val_every_n_epoch=None
    )
    after = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert after["val/mse"] < 0.8 * before["val/mse"]
    assert after["val/kld"] < 0.9 * before["val/kld"]

    trainer.test(module, data, verbose=False)
    tested = trainer.callback_metrics
    assert tested["test/mean/explained_variance"].abs() < 1e-5
    assert tested["test/explained_variance"] > tested["test/shuffled/explained_variance"]
    assert "shuffled vectors" in capsys.readouterr().out

    module.export(tmp_path / "model")
    model = RefragModel.from_pretrained(tmp_path / "model")
    tokenizer = RefragTokenizer.from_pretrained(tmp_path / "model")
    batch = tokenizer(["Where? <doc>The Seine flows through Paris.</doc> Answer:"])
    torch.testing.assert_close(model(**batch).logits, module.model(**batch).logits)
    assert model.generate(**batch, max_new_tokens=4, min_new_tokens=4).shape == (1, 4)

    again = AlignmentModule(init_from=str(tmp_path / "model"))
    again.configure_model()
    torch.testing.assert_close(again.model(**batch).logits, model(**batch).logits)
    assert again.tokenizer.settings == tokenizer.settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mse_weight": -1.0}, r"mse_weight \(-1.0\)"),
        ({"mse_weight": 0.0, "kld_weight": 0.0}, "all 0"),
        ({"kld_texts": 0}, r"kld_texts \(0\)"),
        ({"kld_start": 5, "train": ["decoder"]}, r"kld_start \(5\)"),
        ({"kld_start": 5, "mse_weight": 0.0}, r"kld_start \(5\)"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentModule("tiny/encoder", "tiny/decoder", **options)


def test_token_spans_need_states_of_single_tokens(tmp_path):
    module = AlignmentModule("tiny/encoder", "tiny/decoder", compression=4, pooling="concat")
    data = AlignmentDataModule(PydocSource(limit=20), max_tokens=32, eval_pieces=4)
    with pytest.raises(ValueError, match=r"spans='token'.*pooling \('concat'\)"):
        _fit(tmp_path, module, data, max_steps=1)
