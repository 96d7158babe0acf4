import pytest
import torch

from refrag_lightning.model import RefragModel
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import build


def names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_new_model_trains_its_projector_alone(based):
    assert names(based) == {
        "projector.scale",
        "projector.layers.0.weight",
        "projector.layers.0.bias",
        "projector.layers.2.weight",
        "projector.layers.2.bias",
    }


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_word_embeddings_and_a_tied_head_stay_frozen_unless_asked(based, part):
    assert based.decoder.config.tie_word_embeddings
    table = getattr(based, part).get_input_embeddings().weight
    based.set_trainable([part])
    trains = {id(parameter) for parameter in based.parts(part)}
    assert trains
    assert id(table) not in trains
    assert not based.config.train_word_embeddings
    based.set_trainable([part], train_word_embeddings=True)
    assert id(table) in {id(parameter) for parameter in based.parts(part)}
    assert based.config.train_word_embeddings


def test_a_head_of_its_own_trains_with_the_decoder():
    model = build("mistral")
    assert not model.decoder.config.tie_word_embeddings
    model.set_trainable(["decoder"])
    assert "decoder.lm_head.weight" in names(model)
    assert "decoder.model.embed_tokens.weight" not in names(model)


def test_parts_that_trained_earlier_still_count_as_changed(based):
    based.set_trainable(["encoder", "projector"])
    based.set_trainable(["projector"])
    assert based.config.trained == ["projector", "encoder"]
    assert based.parts("encoder") == []


def test_lora_trains_the_adapter_alone(based):
    based.set_trainable(["projector", "decoder"], lora={"r": 2})
    decoder = {name for name in names(based) if name.startswith("decoder.")}
    assert decoder
    assert all(".lora_" in name for name in decoder)
    assert not any("lm_head" in name or "embed" in name for name in decoder)
    # The adapter is recorded apart: the decoder's own weights are still the base's.
    assert based.config.trained == ["projector"]
    assert based.config.lora["r"] == 2
    based.set_trainable(["projector"])
    assert not any(name.startswith("decoder.") for name in names(based))
    with pytest.raises(ValueError, match="adapter"):
        based.set_trainable(["decoder"], lora={"r": 4})


def test_a_new_adapter_changes_nothing(based):
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        before = based(**batch).logits
        based.set_trainable(["decoder"], lora={"r": 2})
        assert torch.allclose(based(**batch).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"parts": ["head"]}, "head"), ({"parts": ["projector"], "lora": {"r": 2}}, "leave out")],
)
def test_bad_parts_are_refused(based, arguments, message):
    with pytest.raises(ValueError, match=message):
        based.set_trainable(**arguments)
    with pytest.raises(ValueError, match="'head'"):
        based.parts("head")


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_trained_state_round_trip(based, lora):
    based.set_trainable(["projector", "encoder", "decoder"], lora=lora)
    state = {name: torch.randn_like(value) for name, value in based.trained_state_dict().items()}
    assert set(state) == names(based)
    other = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    other.set_trainable(["projector", "encoder", "decoder"], lora=lora)
    other.load_trained_state_dict(state)
    for name, value in other.trained_state_dict().items():
        assert torch.equal(value, state[name])


def test_trained_state_that_does_not_match_is_refused_by_name(based):
    state = based.trained_state_dict()
    state["encoder.extra"] = state.pop("projector.scale")
    with pytest.raises(ValueError, match=r"missing \(projector.scale\).*\(encoder.extra\)"):
        based.load_trained_state_dict(state)
    state = {**based.trained_state_dict(), "projector.scale": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"projector.scale has shape \(3,\)"):
        based.load_trained_state_dict(state)


def test_an_adapter_of_a_bfloat16_decoder_is_float32(tmp_path):
    model = RefragModel.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, decoder_dtype="bfloat16", lora={"r": 2}
    )
    assert model.decoder.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    batch = make_batch(TEXTS, ROWS)
    for each in (model, RefragModel.from_pretrained(tmp_path, dtype="bfloat16")):
        assert {p.dtype for p in each.parts("decoder")} == {torch.float32}
        each.train()(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in each.parts("decoder"))
