import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from refrag_lightning import hub
from refrag_lightning.model import RefragModel
from refrag_lightning.model.base import as_dtype, load_base


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


def sharded(folder, part="decoder"):
    """A base model in several files, and their index."""
    model, _ = load_base(part, f"tiny/{part}")
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_files_of_weights_outside_the_folder_are_refused(tmp_path, part):
    index = sharded(tmp_path / "model", part)
    load_base(part, str(tmp_path / "model"))
    values = json.loads(index.read_text())
    inside = next(iter(values["weight_map"].values()))
    (tmp_path / "model" / "sub").mkdir()
    for place in (tmp_path / inside, tmp_path / "model" / "sub" / inside):
        shutil.copy(tmp_path / "model" / inside, place)
    for wrong in (f"../{inside}", str(tmp_path / inside), f"sub/{inside}", "x.bin", "..", 7):
        tensors = dict.fromkeys(values["weight_map"], wrong)
        index.write_text(json.dumps({**values, "weight_map": tensors}))
        with pytest.raises(ValueError, match="files in the model's own folder") as error:
            load_base(part, str(tmp_path / "model"))
        assert repr(wrong) in str(error.value) and index.name in str(error.value)
    # Another index, which the configuration asks for.
    index.rename(index.with_name("other.safetensors.index.json"))
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(
        json.dumps({**values, "transformers_weights": "other.safetensors.index.json"})
    )
    with pytest.raises(ValueError, match=r"other\.safetensors\.index\.json names"):
        load_base(part, str(tmp_path / "model"))


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"weight_map": ["x"]}'])
def test_an_index_that_is_none(tmp_path, text):
    sharded(tmp_path).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        load_base("decoder", str(tmp_path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, bad, dtype):
    model, _ = load_base("decoder", "tiny/decoder", dtype=as_dtype(dtype))
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' hold NaN"):
        load_base("decoder", str(tmp_path), dtype=as_dtype(dtype))
