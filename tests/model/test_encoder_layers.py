"""An encoder made of a causal language model's first layers: shared weights, LoRA, folder."""

import pytest
import torch

from refrag_lightning.hub import EncoderLayers
from refrag_lightning.model import RefragModel
from refrag_lightning.text.tokenizer import RefragTokenizer

LAYERS = {"layers_of": "tiny/decoder", "num_layers": 1}
TEXTS = [
    'Where? <doc id="1">The Seine flows through Paris, and so it is.</doc> Answer:',
    "Why? <doc>A list is a sequence of objects.</doc> <doc>It is.</doc>",
]


def build(*, causal=True, **options):
    layers = {**LAYERS, "causal": causal}
    tokenizer = RefragTokenizer.from_encoder_decoder(
        layers, "tiny/decoder", compression=4, rates=[2, 4]
    )
    options = {"encoder_lora": {"r": 2}, "lora": {"r": 2}, **options}
    model = RefragModel.from_encoder_decoder(
        layers, "tiny/decoder", compression=4, rates=[2, 4], **options
    )
    return model, tokenizer


def noise(model):
    """Moves everything that trains, so that a forgotten tensor shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_rows_are_the_decoders_own_tokens_and_states_those_of_its_layers():
    model, tokenizer = build(encoder_lora=None, lora=None)
    batch = tokenizer(["<doc>The Seine flows through Paris.</doc>"])
    (ids,) = [tokenizer.plain_decoder(["The Seine flows through Paris."])[0].ids]
    assert batch["encoder_input_ids"][batch["encoder_row_ids"] >= 0].tolist() == ids.tolist()
    states = model.encoder(input_ids=torch.from_numpy(ids[None, :4])).last_hidden_state
    with torch.no_grad():
        full = model.decoder.base_model(
            input_ids=torch.from_numpy(ids[None, :4]), output_hidden_states=True
        )
        expected = model.decoder.base_model.norm(full.hidden_states[1])
    assert torch.allclose(states, expected, atol=1e-5)


def test_weights_are_shared_and_cost_no_memory():
    model, _ = build(encoder_lora=None, lora=None)
    assert model.config.shares_weights
    own = num_parameters(model.projector) + num_parameters(model.pool)
    assert num_parameters(model) == own + num_parameters(model.decoder)


@pytest.mark.parametrize("causal", [True, False])
def test_a_folder_of_two_adapters_gives_the_same_logits(tmp_path, causal):
    model, tokenizer = build(causal=causal, row_order=True)
    noise(model)
    expected = model(**tokenizer(TEXTS)).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "encoder_tokenizer").exists()
    loaded = RefragModel.from_pretrained(tmp_path)
    tokens = RefragTokenizer.from_pretrained(tmp_path)
    assert tokens.encoder is tokens.decoder
    assert loaded.config.shares_weights
    assert torch.equal(loaded(**tokens(TEXTS)).logits, expected)
    full = tmp_path / "full"
    model.save_pretrained(full, full=True)
    assert torch.equal(RefragModel.from_pretrained(full)(**tokens(TEXTS)).logits, expected)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert any(name.startswith("encoder.") and ".lora_" in name for name in trains)
    assert not any(name.startswith("encoder.") and ".lora_" not in name for name in trains)


def test_without_causality_a_state_sees_what_follows():
    for causal in (True, False):
        model, tokenizer = build(causal=causal)
        first, second = (
            tokenizer([f"<doc>{text}</doc>"])["encoder_input_ids"]
            for text in ("a b c d", "a b c e")
        )
        assert first[0, 0] == second[0, 0] and first[0, -1] != second[0, -1]
        # With and without padding: then there is no mask, and each layer's own flag decides.
        for pad in (0, 2):
            ids = torch.nn.functional.pad(torch.cat([first[:1], second[:1]]), (0, pad))
            mask = (torch.arange(ids.shape[1]) < first.shape[1]).long().expand(len(ids), -1)
            states = model.encoder(
                input_ids=ids, attention_mask=mask if pad else None
            ).last_hidden_state
            same = torch.allclose(states[0, 0], states[1, 0], atol=1e-6)
            assert same == causal, (causal, pad)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_base_that_moves_is_taken_apart_from_the_other(part, tmp_path):
    model, tokenizer = build(encoder_lora=None, lora=None)
    batch = tokenizer(TEXTS)
    before = model(**batch).logits
    model.set_trainable(["projector", part])
    assert not model.config.shares_weights
    assert torch.equal(model(**batch).logits, before)
    other = "decoder" if part == "encoder" else "encoder"
    kept = {n: p.clone() for n, p in getattr(model, other).named_parameters()}
    noise(model)
    for name, parameter in getattr(model, other).named_parameters():
        assert torch.equal(parameter, kept[name]), name
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(RefragModel.from_pretrained(tmp_path)(**batch).logits, expected)


def test_the_order_of_a_row_starts_at_nothing_and_is_learnt():
    plain, tokenizer = build(encoder_lora=None, lora=None)
    ordered, _ = build(encoder_lora=None, lora=None, row_order=True)
    ordered.projector.load_state_dict(plain.projector.state_dict())
    batch = tokenizer.at(2)(TEXTS)
    assert torch.equal(ordered(**batch).logits, plain(**batch).logits)
    ordered(**batch).logits.sum().backward()
    assert ordered.pool.order.grad.abs().sum() > 0
    with torch.no_grad():
        ordered.pool.order.normal_()
    states = ordered.encode(batch)
    hidden = ordered.encoder(
        input_ids=batch["encoder_input_ids"][:1, :2], attention_mask=torch.ones(1, 2)
    ).last_hidden_state[0]
    maps = ordered.pool.order.view(4, *[hidden.shape[-1]] * 2)
    expected = sum(h + h @ maps[place] for place, h in enumerate(hidden)) / 2
    assert torch.allclose(states[0, 0], expected, atol=1e-4)


def test_a_chat_template_of_ones_own_is_kept_in_the_folder(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = RefragTokenizer.from_encoder_decoder(
        LAYERS, "tiny/decoder", compression=4, chat_template=template
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = RefragTokenizer.from_pretrained(tmp_path)
    batch = loaded.apply_chat([{"role": "user", "content": "Why?"}], add_generation_prompt=False)
    assert loaded.decode(batch["input_ids"][0]) == "user: Why?\n"
    other = RefragTokenizer.from_pretrained(tmp_path, chat_template="{{ messages[0]['content'] }}")
    batch = other.apply_chat([{"role": "user", "content": "Why?"}])
    assert other.decode(batch["input_ids"][0]) == "Why?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": {"layers_of": "tiny/decoder", "num_layers": 99}},
            r"num_layers \(99\) is more",
        ),
        ({"encoder": {"layers_of": "tiny/decoder", "num_layers": 0}}, r"num_layers \(0\)"),
        ({"encoder": LAYERS, "row_order": True, "pooling": "last"}, "row_order"),
        ({"encoder": LAYERS, "row_order": True, "chunk_by": "sentence"}, "row_order"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RefragModel.from_encoder_decoder(**{"decoder": "tiny/decoder", "compression": 4, **options})


def test_layers_as_an_object_are_the_same():
    by_object = RefragModel.from_encoder_decoder(
        EncoderLayers("tiny/decoder", 1), "tiny/decoder", compression=4
    )
    assert by_object.config.encoder_layers == 1
