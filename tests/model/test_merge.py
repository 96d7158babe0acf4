"""A decoder with its adapter merged."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from refrag_lightning import RefragModel
from refrag_lightning.model import PlainModel
from refrag_lightning.model.adapter import without_adapter
from refrag_lightning.model.merge import merge_adapter, merged_decoder
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import DECODERS, SMALL, build


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


@pytest.mark.parametrize("decoder", ["llama", "mixtral"])
def test_an_adapter_is_the_same_without_it_from_disk_and_in_peft(decoder, tmp_path):
    model = with_adapter(build(decoder))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model.decoder(ids).logits
        with without_adapter(model.decoder):
            base = model.decoder(ids).logits
        model.save_pretrained(tmp_path, full=True)
        loaded = RefragModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.decoder(ids).logits, expected)
        merge_adapter(loaded)
        assert torch.allclose(loaded.decoder(ids).logits, expected, atol=1e-4)
        # A plain decoder with the base's weights, and the adapter as peft itself loads it.
        plain = build(decoder).decoder
        assert torch.equal(plain(ids).logits, base)
        assert not torch.allclose(base, expected, atol=0.1)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.allclose(adapted(ids).logits, expected, atol=1e-4)


def test_a_router_that_cannot_have_lora_is_refused_before_training():
    size = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("phimoe", **SMALL | size)
    decoder = AutoModelForCausalLM.from_config(config)
    model = PlainModel(decoder)
    with pytest.raises(ValueError, match=r"PhimoeForCausalLM cannot have lora.*name other"):
        model.set_trainable(["decoder"], lora={"r": 2})
    model = PlainModel(AutoModelForCausalLM.from_config(config))
    model.set_trainable(["decoder"], lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert merged_decoder(model.decoder) is not None


def test_experts_refuse_dropout_by_name():
    with pytest.raises(ValueError, match=r"dropout \(0.1\).*ParamWrapper does not work"):
        with_adapter(build("mixtral"), dropout=0.1)


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
