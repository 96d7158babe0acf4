import pytest
import torch
from transformers import AutoConfig

from refrag_lightning.model import RefragConfig
from tests.model.conftest import DECODERS, TINY_ENCODER


def config(**values):
    return RefragConfig(encoder_config=TINY_ENCODER, decoder_config=DECODERS["gemma3"], **values)


def test_round_trip_through_a_folder(tmp_path):
    first = config(
        compression=16,
        pooling="attention",
        context="document",
        chunk_by="sentence",
        num_slots=2,
        projector="linear",
        projector_scale=0.125,
        trained=["decoder"],
        lora={"r": 4},
        encoder_name="a/b",
        encoder_revision="sha256:0",
        train_word_embeddings=True,
    )
    first.save_pretrained(tmp_path)
    for second in (RefragConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(second) is RefragConfig
        mine, theirs = first.to_dict(), second.to_dict()
        for key in mine.keys() - {"transformers_version", "architectures", "_name_or_path"}:
            assert theirs[key] == mine[key], key
        assert second.decoder_config.final_logit_softcapping == 3.0
        assert second.decoder_config.model_type == "gemma3_text"


def test_trained_is_ordered_and_holds_the_projector():
    assert config().trained == ["projector"]
    assert config(trained=["decoder", "encoder"]).trained == ["projector", "encoder", "decoder"]


def test_lora_defaults():
    assert config(lora={"r": 4}).lora == {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
    }


def test_row_size():
    assert config().row_size == 16
    assert config(pooling="concat", compression=4).row_size == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compression": 0}, r"compression \(0\)"),
        ({"pooling": "max"}, r"pooling \('max'\) must be one of mean, cls"),
        ({"context": "page"}, r"context \('page'\)"),
        ({"chunk_by": "words"}, r"chunk_by \('words'\)"),
        ({"projector": "conv"}, r"projector \('conv'\)"),
        ({"projector_scale": 0.0}, r"projector_scale \(0.0\)"),
        ({"num_slots": 0}, r"num_slots \(0\)"),
        ({"num_slots": 9}, r"num_slots \(9\).*compression \(8\)"),
        ({"pooling": "cls", "context": "document"}, r"pooling \('cls'\).*'document'"),
        ({"pooling": "cls", "num_slots": 2}, r"pooling \('cls'\).*num_slots \(2\)"),
        ({"pooling": "concat", "num_slots": 2}, r"pooling \('concat'\).*num_slots \(2\)"),
        ({"pooling": "concat", "chunk_by": "decoder"}, r"chunk_by \('decoder'\)"),
        ({"trained": ["head"]}, "head"),
        ({"lora": {"rank": 8}}, "rank"),
        ({"lora": {"r": 0}}, r"lora r \(0\)"),
    ],
)
def test_bad_values_are_quoted(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_configurations_of_living_models_keep_their_attention():
    # The base class sets it to None inside: the decoder would lose its causal mask.
    decoder = AutoConfig.for_model("llama", vocab_size=8)
    decoder._attn_implementation = "sdpa"
    RefragConfig(encoder_config=TINY_ENCODER, decoder_config=decoder)
    assert decoder._attn_implementation == "sdpa"


def test_dtype_survives(tmp_path):
    first = config(dtype="bfloat16")
    first.save_pretrained(tmp_path)
    assert RefragConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
