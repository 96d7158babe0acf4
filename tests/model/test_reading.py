"""Packed texts, and activation checkpointing: the same logits and gradients as without."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from refrag_lightning.model import PlainModel, RefragModel
from refrag_lightning.model.reading import TooLongError, naming_texts
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment, render
from refrag_lightning.text.tokenizer import RefragTokenizer

SENTENCES = (
    "The Seine flows through Paris and on to the sea.",
    "A list is a sequence of objects, and so is a tuple of them.",
    "An expression is evaluated from left to right.",
)


_SIZE = {
    "vocab_size": 2000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OTHER = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma3": {"num_key_value_heads": 2, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon-alibi": {"alibi": True, "new_decoder_architecture": False},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "num_key_value_heads": 2},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
}


def random_decoder(family, **options):
    """A decoder of a family with weights large enough for leaks to show."""
    values = _SIZE | _OTHER.get(family, {}) | options
    kind = {"falcon-alibi": "falcon", "gemma3": "gemma3_text"}.get(family, family)
    if kind in ("gpt2", "xglm", "bloom"):
        for name in ("intermediate_size", "num_hidden_layers", "num_attention_heads"):
            values.pop(name)
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return decoder


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


# Families that tell packed texts apart by their positions, and those that do not.
FAMILIES = {
    "llama": True,
    "mixtral": True,
    "gemma3": True,
    "gpt2": True,
    "opt": False,
    "falcon": False,
    "falcon-alibi": False,
    "xglm": False,
    "biogpt": False,
    "gpt_oss": False,
    "lfm2": False,
    "recurrent_gemma": False,
    "bloom": False,
    "mamba": False,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_no_text_sees_another_in_any_family(family, kind):
    model = PlainModel(random_decoder(family))
    model.set_trainable(["decoder"])
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    texts, groups = TEXTS[:3], None
    if kind == "shared":
        texts, groups = questions(0, SENTENCES), [0, 0, 0]
    apart = tokenizer.build(texts, text_only=True, padding_side="right")
    options = {"line_length": 300} if kind == "packed" else {}
    line = tokenizer.build(texts, text_only=True, padding_side="right", groups=groups, **options)
    assert len(line["input_ids"]) < len(texts)
    modes = [module.training for module in model.train().modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expects_said = not model.keeps_apart(line)
        model.keeps_apart(line)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert len([w for w in said if "would see each other" in str(w.message)]) == expects_said
    if kind == "packed":
        assert model.keeps_apart(line) == FAMILIES[family]

    def read(batch):
        model.eval()
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output.logits.detach(), output.loss.item(), gradients

    logits, loss, gradients = read(apart)
    on_line, loss_on_line, gradients_on_line = read(line)
    owners = line.get("branch_ids", line.get("segment_ids"))
    for number in range(len(texts)):
        own = owners == number
        alone = logits[number, : int(apart["attention_mask"][number].sum())][-int(own.sum()) :]
        assert (on_line[own] - alone).abs().max() < 1e-5 * alone.abs().max(), number
    assert loss == pytest.approx(loss_on_line, rel=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert (gradient - gradients_on_line[name]).abs().max() < 1e-3 * scale + 1e-6, name


def test_a_few_logits_of_texts_that_are_read_apart():
    model = PlainModel(random_decoder("opt"))
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    line = tokenizer.build(TEXTS[:3], text_only=True, line_length=300)
    del line["labels"]
    whole = model(**line).logits
    places = torch.tensor([1, 5])
    for kept, expected in ((2, whole[:, -2:]), (places, whole[:, places])):
        assert torch.allclose(model(**line, logits_to_keep=kept).logits, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "opt"])
def test_rounding_is_not_taken_for_a_leak(family, dtype):
    model = PlainModel(random_decoder(family).to(dtype))
    batch = {"attention_mask": torch.ones(1, 200), "segment_ids": torch.zeros(1, 200)}
    assert model.keeps_apart(batch, warns=False) == FAMILIES[family]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_text_longer_than_the_decoder_reads_is_named(family):
    model = PlainModel(random_decoder(family, max_position_embeddings=40))
    ids = torch.randint(5, 60, (2, 45))
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(max=44)
    message = "text 1 of the batch takes 45 positions, but the decoder has 40"
    for call in (model, model.hidden):
        with pytest.raises(TooLongError, match=message):
            call(**batch) if call is model else call(batch)
    named = naming_texts(["example 'a'", "example 'b'"], "cut it")
    with pytest.raises(TooLongError, match=r"example 'b' takes 45 .* 40: cut it"), named:
        model(**batch)
    prompts = {name: value[:, :38] for name, value in batch.items()}
    with pytest.raises(TooLongError, match=r"text 0 .* 38 positions and max_new_tokens \(3\)"):
        model.generate(**prompts, max_new_tokens=3)
    assert model.generate(**prompts, max_new_tokens=2, do_sample=False).shape[1] == 2
    # So they are where the new tokens are told in another way, or not at all: 20 by default.
    for options, more in (
        ({"max_length": 41}, 3),
        ({"generation_config": GenerationConfig(max_length=41)}, 3),
        ({}, 20),
    ):
        with pytest.raises(TooLongError, match=rf"text 0 .* 38 .*max_new_tokens \({more}\)"):
            model.generate(**prompts, **options)
    assert model.generate(**prompts, max_length=40, do_sample=False).shape[1] == 2
    model.decoder.generation_config.max_length = 42
    with pytest.raises(TooLongError, match=r"text 0 .* 38 .*max_new_tokens \(4\)"):
        model.generate(**prompts)
    # Lines may be longer than the texts on them.
    packed = {name: torch.cat([value[:1, :30], value[:1, :30]], 1) for name, value in batch.items()}
    packed["segment_ids"] = torch.tensor([[0] * 30 + [1] * 30])
    assert model(**packed).logits.shape[1] == 60
