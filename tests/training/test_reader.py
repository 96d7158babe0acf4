"""ReaderModule: where a model comes from and what folder comes out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.training import AlignmentModule, PretrainModule, SFTModule

PAIR = {"encoder": "tiny/encoder", "decoder": "tiny/decoder", "context": "document"}
TEXT = 'Where? <doc id="1">The Seine flows through Paris, to the sea.</doc> Answer:'


def build(cls=SFTModule, **options):
    module = cls(**options)
    torch.manual_seed(0)
    module.configure_model()
    return module


def test_rates_of_a_new_model():
    module = build(**PAIR, compression=[8, 4, 16])
    assert module.tokenizer.compression == module.model.config.compression == 8
    assert list(module.tokenizer.rates) == module.model.config.rates == [4, 8, 16]
    assert build(**PAIR).tokenizer.rates == build(**PAIR).model.config.rates == [8]


def test_a_folder_keeps_its_rates_unless_others_are_given(tmp_path):
    build(**PAIR, compression=[4, 8]).export(tmp_path / "model")
    same = build(init_from=str(tmp_path / "model"))
    assert (same.tokenizer.compression, same.tokenizer.rates) == (4, [4, 8])
    other = build(PretrainModule, init_from=str(tmp_path), compression=[16, 4])
    assert (other.tokenizer.compression, other.tokenizer.rates) == (16, [4, 16])
    assert (other.model.config.compression, other.model.config.rates) == (16, [4, 16])
    one = build(AlignmentModule, init_from=str(tmp_path), compression=8)
    assert (one.tokenizer.compression, one.tokenizer.rates) == (8, [8])
    # What comes out runs as the module did.
    other.export(tmp_path / "again")
    tokenizer = RefragTokenizer.from_pretrained(tmp_path / "again")
    model = RefragModel.from_pretrained(tmp_path / "again")
    assert tokenizer.settings == other.tokenizer.settings
    batch = tokenizer(TEXT)
    assert batch.compression == 16
    torch.testing.assert_close(model(**batch).logits, other.model(**batch).logits)


@pytest.mark.parametrize("compression", [[], [4, 4], 0, [8, -1]])
def test_bad_rates_are_named(compression):
    with pytest.raises(ValueError, match=r"compression \(.*whole number above 0"):
        SFTModule(**PAIR, compression=compression)


def test_a_bad_shape_fails_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"pooling \('cls'\) does not fit context"):
        SFTModule("no/encoder", "no/decoder", pooling="cls", context="document")


def test_a_run_folder_is_its_model_folder(tmp_path):
    build(**PAIR, compression=4).export(tmp_path / "run" / "model")
    expected = build(init_from=str(tmp_path / "run" / "model"))
    module = build(init_from=str(tmp_path / "run"))
    assert module.tokenizer.settings == expected.tokenizer.settings
    batch = module.tokenizer(TEXT)
    torch.testing.assert_close(module.model(**batch).logits, expected.model(**batch).logits)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError, match=str(place)):
            SFTModule(init_from=str(place))


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_plain_training_gives_an_ordinary_folder(tmp_path, lora):
    module = build(encoder=None, decoder="tiny/decoder", lora=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.05 * noise
    module.export(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = module.model.decoder(input_ids=ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"adapter", "adapter_config.json", "encoder_tokenizer"}
    assert "AutoModelForCausalLM" in module.usage(tmp_path / "model")
    # It starts plain training again, and is the decoder of a reader.
    again = build(init_from=str(tmp_path / "model"))
    assert again.plain
    torch.testing.assert_close(
        again.model.decoder(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4
    )
    reader = build(AlignmentModule, **PAIR | {"decoder": str(tmp_path / "model")}, compression=4)
    torch.testing.assert_close(
        reader.model.decoder(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("cls", [AlignmentModule, PretrainModule])
def test_only_sft_takes_a_decoder_alone(tmp_path, cls):
    with pytest.raises(ValueError, match=f"encoder .null..*{cls.__name__}"):
        cls(encoder=None, decoder="tiny/decoder")
    build(encoder=None, decoder="tiny/decoder").export(tmp_path)
    with pytest.raises(ValueError, match=f"init_from .*{cls.__name__}"):
        cls(init_from=str(tmp_path))


def test_export_dtype_and_shards(tmp_path):
    options = {"export_dtype": "bfloat16", "export_shard_size": "100KB"}
    module = build(encoder=None, decoder="tiny/decoder", **options)
    module.export(tmp_path / "plain")
    files = list((tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 1
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for name, value in module.model.decoder.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value.bfloat16()), name
    assert next(module.model.parameters()).dtype == torch.float32

    module = build(**PAIR, train=["projector", "encoder"], **options)
    module.export(tmp_path / "reader")
    assert len(list((tmp_path / "reader").glob("*.safetensors"))) > 1
    saved = RefragModel.from_pretrained(tmp_path / "reader")
    weights = dict(saved.named_parameters())
    for name, value in module.model.named_parameters():
        # What did not train comes from the base models, as it is there.
        expected = value.bfloat16().float() if value.requires_grad else value
        assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize("encoder", ["tiny/encoder", None])
def test_decoder_dtype_is_for_what_stays_frozen(tmp_path, encoder):
    options = {"encoder": encoder, "decoder": "tiny/decoder", "decoder_dtype": "bfloat16"}
    module = build(**options, lora={"r": 2})
    kinds = {
        ".lora_" in name: parameter.dtype
        for name, parameter in module.model.decoder.named_parameters()
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    module = build(**options | {"decoder_dtype": None}, lora={"r": 2})
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"decoder_dtype \(bfloat16\) is for a frozen decoder"):
        build(**options)
    with pytest.raises(ValueError, match="dtype"):
        SFTModule(**options | {"decoder_dtype": "float31"})


def test_what_trains_by_default():
    expected = {
        AlignmentModule: {"projector"},
        PretrainModule: {"projector", "encoder"},
        SFTModule: {"projector", "encoder", "decoder"},
    }
    for cls, parts in expected.items():
        model = build(cls, **PAIR).model
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == parts


def test_hyper_parameters_are_all_there():
    module = SFTModule(**PAIR, compression=[4, 8], lr=0.5, teacher="self", export_dtype="bfloat16")
    names = ("encoder", "compression", "lr", "teacher", "export_dtype", "init_from", "warmup")
    assert [module.hparams[name] for name in names] == [
        "tiny/encoder", [4, 8], 0.5, "self", "bfloat16", None, 0.05,
    ]  # fmt: skip


def test_the_decoder_alone_takes_the_attention_asked_for():
    usual, eager = build(**PAIR), build(**PAIR, attn_implementation="eager")
    assert eager.model.decoder.config._attn_implementation == "eager"
    assert eager.model.encoder.config._attn_implementation == "sdpa"
    batch = usual.tokenizer(TEXT)
    torch.testing.assert_close(eager.model(**batch).logits, usual.model(**batch).logits)


@pytest.mark.parametrize(
    ("dtype", "message"), [("float16", r"decoder_dtype \(float16\)"), ("int64", "'int64'")]
)
def test_a_decoder_dtype_that_cannot_work_is_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        SFTModule(**PAIR, decoder_dtype=dtype)
