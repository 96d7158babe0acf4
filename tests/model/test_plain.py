import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from refrag_lightning import hub
from refrag_lightning.model import PlainModel, RefragModel, files
from refrag_lightning.model.losses import target_losses
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.model.batches import make_batch
from tests.model.conftest import build

NAMES = ("tiny/decoder", "tiny/gemma", "tiny/llama3")
CHAT = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello there."}],
    [{"role": "user", "content": "A longer one."}, {"role": "assistant", "content": "No."}],
]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def tokenizer_of(name):
    return RefragTokenizer.from_encoder_decoder(None, name, compression=1)


def with_adapter(name):
    model = PlainModel.from_pretrained(name)
    model.set_trainable(["decoder"], lora={"r": 4})
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    return model


def test_logits_and_loss_are_those_of_transformers(name):
    model = PlainModel.from_pretrained(name)
    decoder = AutoModelForCausalLM.from_pretrained(hub.resolve(name).path).eval()
    batch = tokenizer_of(name).apply_chat(CHAT, padding_side="right", add_generation_prompt=False)
    with torch.no_grad():
        output = model(**batch)
        expected = decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
    real = batch["attention_mask"] == 1
    assert torch.allclose(output.logits[real], expected.logits[real], atol=1e-5)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    with torch.no_grad():
        hidden = model.hidden(batch)
        assert torch.allclose(model.head(hidden), output.logits, atol=1e-5)
        assert torch.equal(model.hidden(batch, inputs_embeds=model.embed(batch)), hidden)
        # The loss by target, too.
        flat = batch["labels"].flatten()
        places = (flat >= 0).nonzero().flatten()
        losses = target_losses(model.head, hidden.flatten(0, 1)[places - 1], flat[places])
    assert losses.nll_P.mean().item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_it_reads_what_a_refrag_model_reads_with_every_row_expanded():
    reader = build()
    batch = make_batch([[5, 6, 7], [8, 9]], [])
    plain = PlainModel(reader.decoder)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, reader(**batch).logits)


def test_generation_is_that_of_transformers(name):
    model = PlainModel.from_pretrained(name)
    decoder = AutoModelForCausalLM.from_pretrained(hub.resolve(name).path).eval()
    tokenizer = tokenizer_of(name)
    texts = ["Hello", "A longer one, and a bit more."]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for side in ("left", "right"):
        got = model.generate(**tokenizer(texts, padding_side=side), **options)
        for text, line in zip(texts, got, strict=True):
            alone = tokenizer([text])["input_ids"]
            expected = decoder.generate(alone, attention_mask=torch.ones_like(alone), **options)
            assert line.tolist() == expected[0, alone.shape[1] :].tolist()
    packed = tokenizer.build([[]], line_length=8)
    with pytest.raises(ValueError, match="packed batch"):
        model.generate(**packed)


def test_vectors_are_refused():
    model = PlainModel(build().decoder)
    batch = make_batch([[5, -1, 7]], [[20, 21]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="compressed documents"):
            call(**batch)
    with pytest.raises(ValueError, match="compressed documents"):
        model.hidden(batch)
    given = make_batch([[5, -1, 7]], [])
    given["row_states_mask"] = torch.tensor([True])
    given["row_states"] = torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="compressed documents"):
        model.embed(given)
    # Rows that are given but stand as their own tokens need no encoder.
    given["slot_ids"][:] = -1
    assert model.embed(given).shape == (1, 3, 32)


def test_what_trains():
    model = PlainModel.from_pretrained("tiny/decoder")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == []
    model.set_trainable(["decoder"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "decoder.model.layers.0.mlp.up_proj.weight" in names
    assert "decoder.model.embed_tokens.weight" not in names
    assert model.parts("projector") == model.parts("encoder") == []
    assert len(model.parts("decoder")) == len(names)
    assert model.trained_state_dict().keys() == names
    model.load_trained_state_dict(
        {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    )
    assert all((p == 0).all() for p in model.parts("decoder"))
    model.set_trainable(["decoder"], lora={"r": 2})
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"\['encoder'\]\) must be among \['decoder'\]"):
        model.set_trainable(["decoder", "encoder"])


@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_its_folder_is_an_ordinary_one_with_the_adapter_merged(name, tmp_path, shard):
    model = with_adapter(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = tokenizer_of(name).apply_chat(CHAT)
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "folder", max_shard_size=shard)
    # The live model is left as it was, adapter and all.
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    decoder, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(hub.resolve(name).path)
    assert {n for n, _ in decoder.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert decoder.generation_config.eos_token_id == base.generation_config.eos_token_id
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits = decoder.eval()(**inputs).logits
        unmerged = base.eval()(**inputs).logits
    real = batch["attention_mask"] == 1
    assert torch.allclose(logits[real], expected[real], atol=1e-4)
    assert (unmerged - expected)[real].abs().max() > 0.1
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) == (1 if shard == "5GB" else 3)


def test_dtype_of_the_folder(tmp_path):
    model = with_adapter("tiny/decoder")
    model.save_pretrained(tmp_path, dtype="bfloat16")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert decoder.dtype == torch.bfloat16
    key = "model.layers.1.self_attn.q_proj"
    layer = model.decoder.get_submodule(key)
    scaling = 2  # alpha / r, 2 * r / r
    merged = layer.weight + scaling * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.equal(decoder.get_parameter(f"{key}.weight"), merged.bfloat16())
    assert model.decoder.dtype == torch.float32


def test_a_folder_of_its_own_is_a_base_for_a_refrag_model(tmp_path):
    with_adapter("tiny/decoder").save_pretrained(tmp_path / "sft")
    reader = RefragModel.from_encoder_decoder("tiny/encoder", str(tmp_path / "sft"), compression=4)
    plain = PlainModel.from_pretrained(tmp_path / "sft")
    assert reader.config.decoder_revision == plain.source.revision
    for first, second in zip(reader.decoder.parameters(), plain.decoder.parameters(), strict=True):
        assert torch.equal(first, second)


def test_an_interrupted_save_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    PlainModel.from_pretrained("tiny/decoder").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = with_adapter("tiny/decoder")

    def fail(self, *arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model.decoder), "save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]
    model.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / files.WEIGHTS).read_bytes() != before[files.WEIGHTS]


def test_an_adapter_on_word_embeddings_cannot_be_merged(tmp_path):
    model = PlainModel.from_pretrained("tiny/decoder")
    model.set_trainable(["decoder"], lora={"r": 2, "target_modules": ["embed_tokens"]})
    with pytest.raises(ValueError, match=r"word embeddings .*embed_tokens"):
        model.save_pretrained(tmp_path / "model")


def test_an_encoder_is_no_causal_language_model():
    with pytest.raises(ValueError, match=r"lacks [0-9]+ weights"):
        PlainModel.from_pretrained("tiny/encoder")
