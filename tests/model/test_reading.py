"""Packed texts, and activation checkpointing: the same logits and gradients as without."""

import pytest
import torch

from refrag_lightning.model import PlainModel, RefragModel
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment, render
from refrag_lightning.text.tokenizer import RefragTokenizer

SENTENCES = (
    "The Seine flows through Paris and on to the sea.",
    "A list is a sequence of objects, and so is a tuple of them.",
    "An expression is evaluated from left to right.",
)


def segments(number):
    """A text of some length, with one or two documents and an answer to learn."""
    parts = ["Read: " * (number + 1)]
    parts += [
        Document(SENTENCES[(number + n) % 3] * (1 + number % 2)) for n in range(1 + number % 2)
    ]
    rendered = render(parts, header="[{id}] ", footer="\n")
    return [*rendered, Segment(SENTENCES[number % 3], "text", train=True)]


TEXTS = [segments(number) for number in range(5)]
EXPAND = ["none", [0, 2], "all", "none", [1]]


def run(model, batch):
    """Logits at each text's positions, the loss, and the gradient of everything that trains."""
    model.train()
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    places = batch.get("segment_ids")
    if places is None:
        lines = torch.arange(len(batch["input_ids"]))[:, None]
        places = torch.where(batch["attention_mask"] == 1, lines, -1)
    logits = [output.logits[places == number].detach() for number in range(len(TEXTS))]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return logits, output.loss.item(), gradients


def assert_alike(first, second):
    for mine, theirs in zip(first[0], second[0], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)
    assert first[1] == pytest.approx(second[1], rel=1e-5)
    assert first[2].keys() == second[2].keys()
    assert len(first[2]) > 10
    for name, gradient in first[2].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (gradient - second[2][name]).abs().max() < 1e-3 * scale + 1e-7, name


@pytest.fixture(params=["tiny/decoder", "tiny/gemma"])
def pair(request):
    names = ("tiny/encoder", request.param)
    model = RefragModel.from_encoder_decoder(*names, compression=4)
    # Dropout would differ from run to run.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_trainable(["projector", "encoder", "decoder"])
    return model, RefragTokenizer.from_encoder_decoder(*names, compression=4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_unpacked_in_logits_and_gradients(pair, side):
    model, tokenizer = pair
    apart = tokenizer.build(TEXTS, expand=EXPAND, padding_side=side)
    packed = tokenizer.build(TEXTS, expand=EXPAND, padding_side=side, line_length=190)
    # Several texts a line, more than one line, and padding on one of them.
    assert 1 < len(packed["input_ids"]) < len(TEXTS)
    assert (packed["segment_ids"] < 0).any()
    assert_alike(run(model, packed), run(model, apart))


def test_activation_checkpointing_changes_no_gradient(pair):
    model, tokenizer = pair
    model.set_trainable(["projector", "encoder", "decoder"], lora={"r": 2})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    batch = tokenizer.build(TEXTS, expand=EXPAND, line_length=190)
    expected = run(model, batch)
    model.gradient_checkpointing_enable()
    assert_alike(run(model, batch), expected)


def test_a_plain_model_packs_and_checkpoints_alike():
    model = PlainModel.from_pretrained("tiny/llama3")
    model.set_trainable(["decoder"])
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/llama3", compression=1)
    apart = tokenizer.build(TEXTS, expand="all")
    packed = tokenizer.build(TEXTS, expand="all", line_length=300)
    assert len(packed["input_ids"]) < len(TEXTS)
    expected = run(model, apart)
    assert_alike(run(model, packed), expected)
    model.gradient_checkpointing_enable()
    assert_alike(run(model, packed), expected)


def questions(number, answers):
    """Texts that begin with the same documents, each with a question and an answer of its own."""
    begin = ["Read: ", *(Document(SENTENCES[(number + n) % 3]) for n in range(1 + number % 2))]
    return [
        [
            *render([*begin, f"Question {n}?"], header="[{id}] ", footer="\n"),
            Segment(answer, "text", train=True),
        ]
        for n, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("line_length", [None, 190])
def test_texts_behind_one_context_read_as_if_alone(pair, attention, line_length):
    model, tokenizer = pair
    model.decoder.set_attn_implementation(attention)
    texts = [
        *questions(0, SENTENCES),
        segments(2),
        *questions(1, ["Yes.", "It is a sequence of objects."]),
    ]
    groups = [5, 5, 5, 0, 7, 7]
    expand = [[0], [0], [0], "none", "none", "none"]
    apart = tokenizer.build(texts, expand=expand, padding_side="right")
    shared = tokenizer.build(
        texts, expand=expand, padding_side="right", line_length=line_length, groups=groups
    )
    assert shared["attention_mask"].sum() < 0.8 * apart["attention_mask"].sum()

    def read(batch):
        model.train()
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return output.logits.detach(), output.loss.item(), gradients

    logits, loss, gradients = read(apart)
    logits_shared, loss_shared, gradients_shared = read(shared)
    assert loss == pytest.approx(loss_shared, rel=1e-5)
    for number in range(len(texts)):
        own = shared["branch_ids"] == number
        length = int(own.sum())
        alone = logits[number, : int(apart["attention_mask"][number].sum())]
        assert (alone[-length:] - logits_shared[own]).abs().max() < 1e-5 * alone.abs().max()
        expected = apart["position_ids"][number, len(alone) - length : len(alone)]
        assert torch.equal(shared["position_ids"][own], expected)
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert (gradient - gradients_shared[name]).abs().max() < 1e-3 * scale + 1e-7, name


def test_what_is_trained_is_never_shared_and_nothing_is_shared_in_vain(pair):
    _, tokenizer = pair
    same = [Segment("One beginning. ", "text"), Segment("Learnt.", "text", train=True)]
    texts = [[*same, Segment("A.", "text", train=True)], [*same, Segment("B.", "text")]]
    batch = tokenizer.build(texts, groups=[0, 0])
    assert "branch_ids" not in batch
    assert batch["input_ids"].shape[0] == 2


def test_an_attention_without_masks_is_refused_for_shared_contexts(pair):
    model, tokenizer = pair
    batch = tokenizer.build(questions(0, SENTENCES), groups=[0, 0, 0])
    model.decoder.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="cannot read texts that share"):
        model(**batch)
    model.decoder.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="cannot be continued"):
        model.generate(**batch, max_new_tokens=1)
