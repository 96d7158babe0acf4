"""Accumulated micro-batches: the gradient, norm and loss of one large batch."""

import lightning
import pytest
import torch

from refrag_lightning.data.alignment_batch import Aligner
from refrag_lightning.data.examples import Example, collate
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.data.stream import IterableStream
from refrag_lightning.text.segments import render_chat
from refrag_lightning.training import AlignmentModule, SFTModule
from refrag_lightning.training.hello import HelloDataModule, HelloModule

# Answers of very different lengths, two tasks.
ANSWERS = [
    "Yes.",
    "Yes, it is longer than the Seine is, and than all others. " * 6,
    "No.",
    "It is.",
]
TEXTS = ["Rivers: the Loire is longer.", "It rises in the south; nobody swims in it. " * 5, "Here."]


class Recorder(lightning.Callback):
    """Keeps the gradient of each optimiser step, before it is clipped, and what is logged."""

    def __init__(self):
        self.gradients, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append(torch.cat(gradients).clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            values = trainer.callback_metrics.items()
            self.logged.append({k: float(v) for k, v in values if k.startswith("train/")})


class Data(ResumableDataModule):
    """Numbers, of which `make` makes a batch; as a stream where asked for."""

    def __init__(self, size, make, *, stream=False, **options):
        super().__init__(**{"shuffle": False, **options})
        self.size, self.make, self.stream = size, make, stream

    def training_data(self):
        numbers = list(range(self.size))
        return IterableStream(lambda: iter(numbers)) if self.stream else numbers

    def collate(self, samples):
        return self.make(samples)


def fit(tmp_path, module, data, **options):
    recorder = Recorder()
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        callbacks=[recorder],
        **{"max_steps": 4, "gradient_clip_val": 0.5, **options},
    )
    trainer.fit(module, data)
    return recorder


def language(**options):
    options = {"compression": 4, "task_weights": {"chat": 0.25}, "lr": 3e-3} | options
    module = SFTModule("tiny/encoder", "tiny/decoder", **options)
    torch.manual_seed(0)
    module.configure_model()
    for part in module.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return module


def texts(module):
    tokenizer = module.tokenizer
    style = {"header": tokenizer.header, "footer": tokenizer.footer}

    def example(number):
        question = f'<doc id="{number}" title="River">River {number}.</doc> Is it long?'
        messages = [
            {"role": "user", "content": question if number % 3 else "Is it long?"},
            {"role": "assistant", "content": ANSWERS[number % 4]},
        ]
        segments = render_chat(tokenizer.decoder, messages, add_generation_prompt=False, **style)
        return Example(tuple(segments), task=("answer", "chat")[number % 2], id=str(number))

    return lambda samples: collate([example(number) for number in samples], tokenizer)


def compare(one, other):
    assert len(one.gradients) == len(other.gradients) == 4
    for got, expected in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)
    for got, expected in zip(one.logged, other.logged, strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 1}, {"stream": True}, {"stream": True, "batches_per_epoch": 6}],
    ids=["data set", "workers", "stream", "stream with a length"],
)
def test_micro_batches_are_one_large_batch(tmp_path, options):
    """Of seven batches an epoch, the last one is a step of its own."""
    module = language()
    large = {"batch_size": 3}
    size = options.get("batches_per_epoch", 7)
    if size == 6:
        large["batches_per_epoch"] = 2
    expected = fit(tmp_path, module, Data(size, texts(module), **(options | large)))
    module = language()
    data = Data(size, texts(module), batch_size=1, **options)
    compare(fit(tmp_path, module, data, accumulate_grad_batches=3), expected)
    # So it was clipped.
    assert expected.logged[0]["train/grad_norm"] > 0.5


def test_an_epoch_that_is_cut_short_ends_a_step(tmp_path):
    module = language()
    data = Data(9, texts(module), batch_size=1)
    options = {"limit_train_batches": 5, "accumulate_grad_batches": 4}
    got = fit(tmp_path, module, data, **options)
    module = language()
    batches = [[0, 1, 2, 3], [4]]
    # Samples of the large batches, which the same epoch has.
    make = texts(module)
    data = Data(2, lambda samples: make(batches[samples[0]]), batch_size=1)
    compare(got, fit(tmp_path, module, data))


def test_hello_and_its_epochs_last_batches(tmp_path):
    modules = []
    for batch_size, accumulated in ((10, 1), (2, 5)):
        torch.manual_seed(0)
        module = HelloModule(lr=0.1)
        data = HelloDataModule(size=23, batch_size=batch_size, shuffle=False)
        modules.append(fit(tmp_path, module, data, accumulate_grad_batches=accumulated))
    compare(*modules)


def test_losses_of_alignment_have_their_own_totals(tmp_path):
    """The decoder reads one text of each micro-batch, the MSE is taken on all of them."""

    def build():
        options = {"kld_texts": 1, "mse_weight": 3.0, "train": ["projector"]}
        torch.manual_seed(0)
        module = AlignmentModule("tiny/encoder", "tiny/decoder", compression=4, **options)
        module.configure_model()
        return module

    module = build()
    aligner = Aligner(module.tokenizer, spans="row", max_tokens=64)
    pieces = [[TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[0]], [TEXTS[1], TEXTS[2]]]
    batches = [aligner.collate([e for t in texts for e in aligner.examples(t)]) for texts in pieces]
    options = {"max_steps": 1, "gradient_clip_val": None}
    data = Data(3, lambda samples: batches[samples[0]], batch_size=1)
    got = fit(tmp_path, module, data, accumulate_grad_batches=3, **options)

    alone = []
    for batch in batches:
        parts = {}
        for name, weight in (("mse", 3.0), ("kld", 1.0)):
            module = build()
            module.weights = {"mse": 0.0, "kld": 0.0, "ce": 0.0, name: weight}
            made = Data(1, lambda samples, batch=batch: batch, batch_size=1)
            parts[name] = fit(tmp_path, module, made, **options)
        alone.append(parts)
    spans = [batch.num_spans for batch in batches]
    read = [batch.spans_of_texts[0] for batch in batches]
    assert spans != read
    expected, loss = 0, 0
    for name, counts in (("mse", spans), ("kld", read)):
        for parts, count in zip(alone, counts, strict=True):
            share = count / sum(counts)
            expected = expected + share * parts[name].gradients[0]
            loss = loss + share * parts[name].logged[0]["train/loss"]
    torch.testing.assert_close(got.gradients[0], expected, rtol=1e-3, atol=1e-5)
    assert got.logged[0]["train/loss"] == pytest.approx(loss, rel=1e-3)


def test_data_that_cannot_be_counted_ahead_is_refused(tmp_path):
    collate = HelloDataModule().collate
    loader = torch.utils.data.DataLoader(torch.ones(8), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches \(2\) needs a Resumable"):
        fit(tmp_path, HelloModule(), loader, accumulate_grad_batches=2)
