import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from refrag_lightning import hub
from refrag_lightning.model import RefragModel
from refrag_lightning.model.base import load_base


def test_base_parts_are_whole_quiet_and_in_evaluation_mode(capfd):
    for part in ("encoder", "decoder"):
        model, source = load_base(part, f"tiny/{part}")
        assert not model.training
        assert model.dtype == torch.float32
        assert source.revision.startswith("sha256:")
        assert model.config._attn_implementation == "sdpa"
    assert capfd.readouterr() == ("", "")


def test_a_base_that_lacks_weights_is_refused(tmp_path):
    model, _ = load_base("decoder", "tiny/decoder")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*up_proj"):
        load_base("decoder", str(tmp_path))


def test_an_encoder_decoder_model_is_refused_as_encoder(tmp_path):
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model("t5", **sizes)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"):
        load_base("encoder", str(tmp_path))


def test_names_and_revisions_are_recorded(based):
    for part in ("encoder", "decoder"):
        assert getattr(based.config, f"{part}_name") == f"tiny/{part}"
        assert getattr(based.config, f"{part}_revision") == hub.resolve(f"tiny/{part}").revision


def test_two_decoder_families_with_one_encoder():
    for decoder in ("tiny/gemma", "tiny/llama3"):
        model = RefragModel.from_encoder_decoder("tiny/encoder", decoder, compression=8)
        assert model.config.decoder_config is model.decoder.config
