import inspect
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from refrag_lightning.model import RefragConfig, RefragModel
from tests.model.batches import ROWS, TEXTS, make_batch, real
from tests.model.conftest import DECODERS, TINY_ENCODER, build


def test_embed_puts_each_vector_at_its_slots_and_embeddings_elsewhere(model):
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        embeds = model.embed(batch)
        vectors = model.project(model.encode(batch))
        table = model.decoder.get_input_embeddings()
    # Left-padded to 6: row 1 stands in the first and in the third text.
    assert torch.equal(embeds[0, 2], vectors[0, 0])
    assert torch.equal(embeds[0, 3], vectors[1, 0])
    assert torch.equal(embeds[2, 3], vectors[1, 0])
    assert torch.equal(embeds[1, 5], vectors[2, 0])
    assert torch.equal(embeds[0, 0], table(torch.tensor(5)))
    assert torch.equal(embeds[2, 2], table(torch.tensor(11)))


def test_embed_takes_embedding_outputs_where_the_decoder_scales_them():
    model = build("gemma3")
    batch = make_batch([[5, 6, 7]], [])
    weight = model.decoder.get_input_embeddings().weight
    expected = weight[torch.tensor([5, 6, 7])] * 32**0.5
    assert torch.allclose(model.embed(batch)[0], expected, atol=1e-4)


def test_without_slots_the_logits_are_the_decoders_own(model):
    batch = make_batch([[5, 6, 7, 8]], [])
    with torch.no_grad():
        expected = model.decoder(input_ids=batch["input_ids"]).logits
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


def test_two_slots_a_row_stand_where_slot_ids_say():
    model = build(num_slots=2)
    batch = make_batch([[5, -1, -2, -3]], ROWS[:2])
    batch["encoder_row_ids"] = batch["encoder_row_ids"]
    with torch.no_grad():
        states = model.encode(batch)
        assert states.shape == (2, 2, 16)
        assert torch.equal(states[1, 1], torch.zeros(16))
        vectors = model.project(states).flatten(0, 1)
        assert torch.equal(model.embed(batch)[0, 1:], vectors[:3])


def test_one_encoder_call_for_all_rows(model):
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.encoder_max_tokens = None
    model(**make_batch(TEXTS, ROWS))
    assert len(calls) == 1


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def test_encoding_many_rows_is_far_faster_than_one_call_a_row(based, one_thread):
    # With an encoder this small the calls cost more than the arithmetic. With a real one on a CPU
    # the arithmetic bounds the gain.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 2000, (2048, 16), generator=generator).tolist()
    batch = make_batch([[5, -1]], rows)
    singles = [make_batch([[5, -1]], [row]) for row in rows[:128]]
    with torch.no_grad():
        alone = torch.cat([based.encode(single) for single in singles])
        together = based.encode(batch)
        # The quickest of three: other processes take the caches away.
        one_call = min(seconds(lambda: based.encode(batch)) for _ in range(3))
        calls = min(seconds(lambda: [based.encode(s) for s in singles]) for _ in range(3))
    assert torch.allclose(together[:128], alone, atol=1e-5)
    ratio = calls * len(rows) / len(singles) / one_call
    assert ratio > 10, ratio


def test_a_row_is_encoded_alike_alone_and_in_a_batch(model):
    with torch.no_grad():
        together = model.encode(make_batch(TEXTS, ROWS))
        for index, row in enumerate(ROWS):
            alone = model.encode(make_batch([[-1]], [row]))
            assert torch.allclose(alone[0], together[index], atol=1e-5)


@pytest.mark.parametrize("given", [[True, True, True], [False, True, False]])
def test_row_states_given_from_outside_change_nothing(model, given):
    full = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        states = model.encode(full)
        expected = model(**full).logits
        rest = [index for index, known in enumerate(given) if not known]
        partial = make_batch(TEXTS, [ROWS[index] for index in rest])
        for line, index in enumerate(rest):
            partial["encoder_row_ids"][line][partial["encoder_row_ids"][line] >= 0] = index + 10
        for index in rest:
            ids = partial["encoder_row_ids"]
            ids[ids == index + 10] = index
        partial["row_states_mask"] = torch.tensor(given)
        partial["row_states"] = torch.where(
            partial["row_states_mask"][:, None, None], states, torch.full_like(states, 1e6)
        )
        assert torch.allclose(model(**partial).logits, expected, atol=1e-4)
        if all(given):
            model.encoder.forward = None  # not called at all
            model(**partial)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "mistral"])
def test_padding_on_either_side_changes_nothing(name):
    model = build(name)
    with torch.no_grad():
        left = make_batch(TEXTS, ROWS, side="left", width=9)
        right = make_batch(TEXTS, ROWS, side="right", width=9)
        both = zip(
            real(left, model(**left).logits), real(right, model(**right).logits), strict=True
        )
        for text, (from_left, from_right) in zip(TEXTS, both, strict=True):
            alone = model(**make_batch([text], ROWS)).logits[0]
            assert torch.allclose(from_left, alone, atol=1e-4)
            assert torch.allclose(from_right, alone, atol=1e-4)


def packed(texts, rows, *, padding):
    """All texts in one line, with padding at both ends, and once more in another order."""
    lines = []
    for order in (range(len(texts)), reversed(range(len(texts)))):
        order = list(order)
        line = make_batch([[entry for index in order for entry in texts[index]]], rows)
        line["position_ids"] = torch.cat([torch.arange(len(texts[i])) for i in order])[None]
        line["segment_ids"] = torch.cat(
            [torch.full((len(texts[i]),), place) for place, i in enumerate(order)]
        )[None]
        for key, value in (("input_ids", 0), ("slot_ids", -1), ("segment_ids", -1)):
            line[key] = F.pad(line[key], (padding, padding), value=value)
        for key in ("attention_mask", "position_ids"):
            line[key] = F.pad(line[key], (padding, padding), value=0)
        lines.append(line)
    batch = dict(lines[0])
    keys = ("input_ids", "attention_mask", "position_ids", "slot_ids", "segment_ids")
    for key in keys:
        batch[key] = torch.cat([line[key] for line in lines])
    return batch


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("padding", [0, 3])
def test_packed_is_separate(name, padding):
    model = build(name)
    batch = packed(TEXTS, ROWS, padding=padding)
    with torch.no_grad():
        alone = [model(**make_batch([text], ROWS)).logits[0] for text in TEXTS]
        first, second = real(batch, model(**batch).logits)
    assert torch.allclose(first, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert torch.allclose(second, torch.cat(alone[::-1]), atol=1e-5, rtol=1e-5)


def test_packed_without_segment_ids_would_differ(model):
    # What the key is for: the same batch read as one long text gives other logits.
    batch = packed(TEXTS, ROWS, padding=0)
    with torch.no_grad():
        right = model(**batch).logits
        del batch["segment_ids"]
        assert (model(**batch).logits - right).abs().max() > 1e-2


def test_loss_is_the_shifted_cross_entropy_of_the_labels(model):
    batch = make_batch(TEXTS, ROWS)
    labels = torch.where(batch["slot_ids"] < 0, batch["input_ids"], -100)
    labels[batch["attention_mask"] == 0] = -100
    with torch.no_grad():
        output = model(**batch, labels=labels)
        log_probabilities = model(**batch).logits.log_softmax(-1)
    terms = [
        -log_probabilities[line, column - 1, labels[line, column]]
        for line in range(3)
        for column in range(1, 6)
        if labels[line, column] >= 0
    ]
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_logits_to_keep(model):
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        kept = model(**batch, logits_to_keep=2).logits
        assert torch.allclose(kept, model(**batch).logits[:, -2:], atol=1e-6)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**batch, labels=batch["input_ids"], logits_to_keep=2)


def test_forward_names_every_key_of_a_batch():
    from refrag_lightning.text import batch as batch_module

    names = set(inspect.signature(RefragModel.forward).parameters)
    keys = {
        line.split("`")[1] for line in batch_module.__doc__.splitlines() if line.startswith("| `")
    }
    assert len(keys) >= 10
    assert keys <= names


def test_gradients_reach_the_projector_through_a_frozen_decoder(model):
    model.train()
    model(**make_batch(TEXTS, ROWS), labels=make_batch(TEXTS, ROWS)["input_ids"]).loss.backward()
    for parameter in model.projector.parameters():
        assert parameter.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("kind", ["no rows", "given rows"])
def test_a_batch_without_sequences_still_touches_all_that_trains(pooling, kind):
    model = build(pooling=pooling)
    model.set_trainable(["projector", "encoder", "decoder"], train_word_embeddings=True)
    model.train()
    if kind == "no rows":
        batch = make_batch([[5, 6, 7]], [])
    else:
        batch = make_batch([[5, -1, 7]], [])
        batch["row_states_mask"] = torch.tensor([True])
        batch["row_states"] = torch.randn(1, 1, 16)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []
    if kind == "no rows":
        assert all(p.grad.abs().sum() == 0 for p in model.parts("encoder"))


def test_every_row_expanded_still_gives_the_projector_a_gradient(model):
    model.train()
    batch = make_batch([[5, 6, 7]], ROWS)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() == 0 for p in model.parts("projector"))


def test_frozen_parts_have_no_dropout_in_training_mode():
    model = build()
    assert model.encoder.config.hidden_dropout_prob > 0
    model.train()
    batch = make_batch(TEXTS, ROWS)
    assert model.projector.training
    assert torch.equal(model.encode(batch), model.encode(batch))
    model.set_trainable(["projector", "encoder"])
    assert not torch.equal(model.encode(batch), model.encode(batch))


def test_gradient_checkpointing_recomputes_a_frozen_decoder():
    model = build()
    batch = make_batch(TEXTS, ROWS)
    model.train()
    calls = []
    # Before the layer: recomputing stops as soon as everything that was saved is there again.
    model.decoder.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return model.projector.scale.grad.clone()

    plain = gradient()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    assert torch.allclose(gradient(), plain)
    assert len(calls) == 3
    model.gradient_checkpointing_disable()
    gradient()
    assert len(calls) == 4


def test_a_bfloat16_decoder_reads_a_float32_projector():
    model = build()
    model.decoder.to(torch.bfloat16)
    batch = make_batch(TEXTS, ROWS)
    assert model.embed(batch).dtype == torch.bfloat16
    output = model.train()(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert model.projector.scale.grad.isfinite()


def test_autocast_to_bfloat16_trains():
    model = build()
    model.set_trainable(["projector", "encoder"])
    batch = make_batch(TEXTS, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parts("encoder"))


def test_building_leaves_given_parts_as_they_are():
    encoder = AutoModel.from_config(AutoConfig.for_model(**TINY_ENCODER), add_pooling_layer=False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = RefragConfig(encoder_config=encoder.config, decoder_config=DECODERS["llama"])
    model = RefragModel(config, encoder=encoder)
    assert model.encoder is encoder
    assert all(torch.equal(value, before[n]) for n, value in model.encoder.state_dict().items())


def test_building_works_on_the_meta_device():
    config = RefragConfig(encoder_config=TINY_ENCODER, decoder_config=DECODERS["llama"])
    with torch.device("meta"):
        model = RefragModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_encoder_has_no_pooler(based):
    assert based.encoder.pooler is None


def test_projector_starts_at_the_size_of_embedding_outputs(based):
    batch = make_batch([[-1, -2, -3]], [[10, 11, 12, 13], [14, 15], [200, 201, 202, 203]])
    table = based.decoder.get_input_embeddings().weight
    with torch.no_grad():
        vectors = based.embed(batch)[0]
    ratio = vectors.norm(dim=-1).mean() / table.norm(dim=-1).mean()
    assert 0.7 < ratio < 1.4
    assert based.config.projector_scale == pytest.approx(table.square().mean().sqrt().item(), 1e-4)


def test_bad_values_are_told_before_anything_loads():
    with pytest.raises(ValueError, match=r"compression \(0\)"):
        RefragModel.from_encoder_decoder("no/such", "no/such", compression=0)
