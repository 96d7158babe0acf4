import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from refrag_lightning import hub
from refrag_lightning.model import BaseMismatchError, RefragModel, files
from tests.model.batches import ROWS, TEXTS, make_batch


def scramble(model):
    """Moves everything that trains away from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.05 if "lora" not in name else 0.3)
    return model


def stored(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def same(first, second):
    theirs = dict(second.named_parameters())
    mine = dict(first.named_parameters())
    assert mine.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


def variants():
    return [
        {"parts": ["projector"]},
        {"parts": ["projector", "encoder"]},
        {"parts": ["projector", "encoder", "decoder"]},
        {"parts": ["encoder", "decoder"], "train_word_embeddings": True},
        {"parts": ["projector", "decoder"], "lora": {"r": 2}},
    ]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("arguments", variants())
def test_round_trip_is_bit_exact(based, tmp_path, arguments, full):
    based.set_trainable(**arguments)
    scramble(based)
    based.save_pretrained(tmp_path / "model", full=full)
    trains = {name for name, p in based.named_parameters() if p.requires_grad}
    for load in (RefragModel.from_pretrained, AutoModel.from_pretrained):
        loaded = load(tmp_path / "model")
        assert type(loaded) is RefragModel
        assert not loaded.training
        assert same(based, loaded)
        again = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trains <= again
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        assert torch.equal(based(**batch).logits, loaded(**batch).logits)


def test_the_folder_holds_the_difference_and_nothing_else(based, tmp_path):
    based.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert all(name.startswith("projector.") for name in stored(tmp_path))
    based.set_trainable(["encoder"])
    based.save_pretrained(tmp_path)
    keys = stored(tmp_path)
    assert "encoder.encoder.layer.0.attention.self.query.weight" in keys
    assert "encoder.embeddings.word_embeddings.weight" not in keys
    assert not any(name.startswith("decoder.") for name in keys)


def test_frozen_parts_are_bit_equal_to_their_bases(based, tmp_path):
    scramble(based).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    decoder = AutoModelForCausalLM.from_pretrained(hub.resolve("tiny/decoder").path)
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.decoder.state_dict()[name], value), name
    encoder = AutoModel.from_pretrained(hub.resolve("tiny/encoder").path, add_pooling_layer=False)
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], value), name


def test_the_adapter_is_one_that_peft_loads(based, tmp_path):
    based.set_trainable(["decoder"], lora={"r": 2, "alpha": 8})
    scramble(based).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(hub.resolve("tiny/decoder").path)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = based.decoder(input_ids=ids).logits
        assert torch.allclose(by_peft(input_ids=ids).logits, expected, atol=1e-5)
        with by_peft.disable_adapter():
            assert not torch.allclose(by_peft(input_ids=ids).logits, expected, atol=1e-2)


def test_a_full_folder_needs_no_base(based, tmp_path, monkeypatch):
    based.set_trainable(["projector", "decoder"], lora={"r": 2})
    scramble(based).save_pretrained(tmp_path / "full", full=True)

    def refuse(*_, **__):
        raise AssertionError("a base was asked for")

    monkeypatch.setattr(hub, "resolve", refuse)
    assert same(based, RefragModel.from_pretrained(tmp_path / "full"))


def test_a_full_folder_in_half_precision_keeps_its_positions_whole(based, tmp_path):
    scramble(based).save_pretrained(tmp_path / "full", full=True)
    model = RefragModel.from_pretrained(
        tmp_path / "full", dtype="bfloat16", attn_implementation="eager"
    )
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    rotary = dict(model.decoder.named_buffers())["model.rotary_emb.inv_freq"]
    assert rotary.dtype == torch.float32
    for part in (model.encoder, model.decoder):
        assert part.config._attn_implementation == "eager"


def test_a_full_folder_can_be_saved_as_a_difference_again(based, tmp_path):
    scramble(based).save_pretrained(tmp_path / "full", full=True)
    RefragModel.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "small")
    assert all(name.startswith("projector.") for name in stored(tmp_path / "small"))
    assert same(based, RefragModel.from_pretrained(tmp_path / "small"))


def test_shards(based, tmp_path):
    scramble(based).save_pretrained(tmp_path, full=True, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same(based, RefragModel.from_pretrained(tmp_path))
    based.save_pretrained(tmp_path, full=True)
    full = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == full
    based.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_saved_in_half_precision(based, tmp_path):
    based.save_pretrained(tmp_path, dtype="bfloat16")
    assert all(
        v.dtype == torch.bfloat16 for v in load_file(tmp_path / "model.safetensors").values()
    )
    loaded = RefragModel.from_pretrained(tmp_path)
    assert loaded.projector.scale.dtype == torch.float32
    assert loaded.projector.scale.item() == pytest.approx(based.projector.scale.item(), rel=0.01)


def test_dtype_of_the_bases(based, tmp_path):
    based.save_pretrained(tmp_path)
    for options in ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}):
        loaded = AutoModel.from_pretrained(tmp_path, **options)
        assert loaded.decoder.dtype == loaded.encoder.dtype == torch.bfloat16
        assert loaded.projector.scale.dtype == torch.float32
    with pytest.raises(ValueError, match="'half-ish'"):
        RefragModel.from_pretrained(tmp_path, dtype="half-ish")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_are_not_exactly_the_difference_are_refused(based, tmp_path, change):
    based.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["projector.layers.0.weight"]
    elif change == "unexpected":
        tensors["encoder.embeddings.word_embeddings.weight"] = torch.zeros(2, 2)
    else:
        tensors["projector.layers.0.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    named = {"missing": "layers.0.weight", "unexpected": "word_embeddings", "shape": "0.bias"}
    with pytest.raises(ValueError, match=named[change]):
        RefragModel.from_pretrained(tmp_path)


def test_an_adapter_of_another_shape_is_refused(based, tmp_path):
    based.set_trainable(["decoder"], lora={"r": 2})
    based.save_pretrained(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(ValueError, match="1 keys differ"):
        RefragModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_base_with_other_weights_is_refused_in_one_line(based, tmp_path, part):
    based.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    found = config[f"{part}_revision"]
    wanted = config[f"{part}_revision"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(config))
    with pytest.raises(BaseMismatchError) as error:
        RefragModel.from_pretrained(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert wanted in message
    assert found in message
    assert f"tiny/{part}" in message
    with pytest.warns(UserWarning, match="0000"):
        loaded = RefragModel.from_pretrained(tmp_path, allow_base_mismatch=True)
    assert same(based, loaded)


def copy_of(part, folder):
    AutoModel.from_pretrained(hub.resolve(f"tiny/{part}").path).save_pretrained(folder)
    return folder


def test_a_base_folder_that_moved_is_found_by_override(based, tmp_path):
    first = copy_of("encoder", tmp_path / "first")
    model = RefragModel.from_encoder_decoder(str(first), "tiny/decoder", compression=4)
    model.save_pretrained(tmp_path / "model")
    first.rename(tmp_path / "second")
    with pytest.raises(OSError, match=r"give encoder=\.\.\. to from_pretrained"):
        RefragModel.from_pretrained(tmp_path / "model")
    for load in (RefragModel.from_pretrained, AutoModel.from_pretrained):
        assert same(model, load(tmp_path / "model", encoder=str(tmp_path / "second")))


def test_unknown_options_are_named(based, tmp_path):
    based.save_pretrained(tmp_path)
    for load in (RefragModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(TypeError, match="quantize"):
            load(tmp_path, quantize=4)


def test_a_missing_folder_and_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="nowhere"):
        RefragModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"no config\.json"):
        RefragModel.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_folder(based, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    based.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = files.save_file

    def fail(tensors, path, **options):
        original(tensors, path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        scramble(based).save_pretrained(folder)
    with pytest.raises(KeyboardInterrupt):
        based.save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_what_others_keep_in_the_folder_stays(based, tmp_path):
    folder = tmp_path / "model"
    based.set_trainable(["decoder"], lora={"r": 2})
    based.save_pretrained(folder)
    (folder / "refrag_tokenizer.json").write_text("{}")
    (folder / "decoder_tokenizer").mkdir()
    (folder / "decoder_tokenizer" / "tokenizer.json").write_text("[]")
    fresh = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    fresh.save_pretrained(folder)
    assert (folder / "refrag_tokenizer.json").read_text() == "{}"
    assert (folder / "decoder_tokenizer" / "tokenizer.json").read_text() == "[]"
    # But not the adapter of the model that was there.
    assert not (folder / "adapter").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_saving_onto_a_file_is_refused(based, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        based.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("part", ["projector", "adapter"])
def test_weights_that_are_no_numbers_are_refused(based, tmp_path, part):
    based.set_trainable(["projector", "decoder"], lora={"r": 2})
    based.save_pretrained(tmp_path)
    file = "model.safetensors" if part == "projector" else "adapter/adapter_model.safetensors"
    tensors = load_file(tmp_path / file)
    name = sorted(tensors)[0]
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name.removeprefix('base_model.model.')}' hold NaN"):
        RefragModel.from_pretrained(tmp_path)


def test_files_of_weights_outside_the_folder_are_refused(based, tmp_path):
    folder = tmp_path / "model"
    based.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    RefragModel.from_pretrained(folder)
    for path in folder.glob("model-*.safetensors"):
        path.rename(tmp_path / path.name)
    for wrong in ("../{}", f"{tmp_path}/{{}}"):
        tensors = {name: wrong.format(file) for name, file in values["weight_map"].items()}
        index.write_text(json.dumps({**values, "weight_map": tensors}))
        with pytest.raises(ValueError, match=r"only .* files in the model's own folder are read"):
            RefragModel.from_pretrained(folder)
