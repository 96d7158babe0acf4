"""A decoder with its adapter merged."""

import pytest
import torch

from refrag_lightning import RefragModel
from refrag_lightning.model import PlainModel
from refrag_lightning.model.merge import merge_adapter, merged_decoder
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import DECODERS, build


def with_adapter(model, **lora):
    torch.manual_seed(0)
    model.set_trainable(["projector", "decoder"], lora={"r": 4, **lora})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_logits_stay(decoder):
    # gpt2's layers are transposed.
    model = with_adapter(build(decoder))
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        model.decoder.disable_adapters()
        without = model(**batch).logits
        model.decoder.enable_adapters()
        merge_adapter(model)
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert (without - expected)[real].abs().max() > 0.1
    assert torch.allclose(logits[real], expected[real], atol=1e-4)
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_what_is_saved_and_trains_afterwards():
    model = with_adapter(build())
    merge_adapter(model)
    assert model.config.lora is None
    assert model.config.trained == ["projector", "decoder"]
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.model.layers.0.mlp.up_proj.weight" in trains
    assert "decoder.model.embed_tokens.weight" not in trains
    assert not any(name.startswith("encoder.") for name in trains)
    assert not model.decoder.training


def test_a_merged_model_is_loaded_on_its_bases(tmp_path):
    model = with_adapter(
        RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    )
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    loaded = RefragModel.from_pretrained(tmp_path)
    for (name, first), second in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
    assert not (tmp_path / "adapter").exists()


def test_the_adapter_of_the_model_itself_stays():
    model = with_adapter(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = merged_decoder(model.decoder, dtype="bfloat16")
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert decoder.config.dtype == torch.bfloat16
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_an_adapter_there_is_nothing_to_merge():
    with pytest.raises(ValueError, match="no LoRA"):
        merge_adapter(build())


def test_an_adapter_on_a_tied_head_is_refused():
    model = PlainModel.from_pretrained("tiny/decoder")
    assert model.config.tie_word_embeddings
    model.set_trainable(["decoder"], lora={"r": 2, "target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match=r"head \(lm_head\) that is tied"):
        merged_decoder(model.decoder)
