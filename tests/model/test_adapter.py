"""LoRA on the decoder: what it is without its adapter, and what trains."""

from __future__ import annotations

import pytest
import torch

from refrag_lightning import RefragModel
from refrag_lightning.model.adapter import is_adapter_key, without_adapter


@pytest.fixture
def model():
    model = RefragModel.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, lora={"r": 2}
    )
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if is_adapter_key(name):
                parameter.normal_(std=0.1)
    return model


def test_without_its_adapter_the_decoder_is_the_base(model):
    base = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = base.decoder(ids).logits
        with_adapter = model.decoder(ids).logits
        with without_adapter(model.decoder):
            without = model.decoder(ids).logits
        again = model.decoder(ids).logits
    assert torch.equal(without, expected)
    assert torch.equal(again, with_adapter)
    assert not torch.allclose(with_adapter, expected)


@pytest.mark.parametrize("parts", [["projector"], ["projector", "decoder"]])
def test_a_frozen_adapter_stays_frozen(model, parts):
    model.set_trainable(parts)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="broken off"), without_adapter(model.decoder):
        raise RuntimeError("broken off")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert any(trains[name] for name in trains if is_adapter_key(name)) == ("decoder" in parts)


def test_the_hub_is_not_asked_for_the_vocabulary(model, tmp_path, monkeypatch):
    from peft.utils import save_and_load

    def refuse(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", refuse)
    model.save_pretrained(tmp_path, full=True)
    loaded = RefragModel.from_pretrained(tmp_path)
    adapter = {name: p for name, p in model.named_parameters() if is_adapter_key(name)}
    again = dict(loaded.named_parameters())
    assert adapter and all(torch.equal(p, again[name]) for name, p in adapter.items())
