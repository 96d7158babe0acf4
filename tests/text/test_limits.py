"""How many positions a model has for a text, by its configuration."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refrag_lightning.model import RefragModel
from refrag_lightning.text.limits import num_positions
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.text.loading import hugging_face

SIZE = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1}
GPT2 = {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
OPT = SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32}

# What reads the first position behind the padding id, and what does not: what it has of 40.
ENCODERS = {
    "roberta": ({}, 38),
    "xlm-roberta": ({}, 38),
    "camembert": ({}, 38),
    "roberta-prelayernorm": ({}, 38),
    "data2vec-text": ({}, 38),
    "mpnet": ({}, 38),
    "longformer": ({"attention_window": 8}, 38),
    "ibert": ({}, 38),
    "esm": ({"position_embedding_type": "absolute"}, 38),
    "markuplm": ({}, 38),
    "bert": ({}, 40),
    "distilbert": ({"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}, 40),
    "modernbert": ({"local_attention": 8}, 40),
}


def encoder(kind: str, **options: object) -> object:
    values = SIZE | ENCODERS[kind][0] | options
    return AutoConfig.for_model(kind, **values)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions(kind: str) -> None:
    model = AutoModel.from_config(encoder(kind)).eval()
    positions = num_positions(model)
    assert positions == ENCODERS[kind][1]
    ids = torch.randint(5, 600, (1, positions))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if positions < 40:
            ids = torch.randint(5, 600, (1, positions + 1))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["mpnet", "longformer", "ibert", "esm", "data2vec-text"])
def test_a_long_document_is_cut_to_what_the_encoder_reads(kind: str, tmp_path) -> None:
    # A tokenizer that does not know its model's limit.
    hugging_face("tiny/encoder").__class__.from_pretrained(
        hugging_face("tiny/encoder").name_or_path, model_max_length=int(1e30)
    ).save_pretrained(tmp_path)
    encoder(kind).save_pretrained(tmp_path)
    options = {"compression": 8, "context": "document"}
    tokenizer = RefragTokenizer.from_encoder_decoder(str(tmp_path), "tiny/decoder", **options)
    assert tokenizer.max_encoder_length == 38
    batch = tokenizer(f"<doc>{'The Seine flows through Paris. ' * 20}</doc>")
    assert batch["encoder_input_ids"].shape[1] <= 38


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("gpt2", GPT2, 40),
        ("opt", OPT, 40),
        ("llama", SIZE, 40),
        ("mistral", SIZE | {"sliding_window": 8, "num_key_value_heads": 2}, 40),
        ("llama", SIZE | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 160),
        (
            "qwen2",
            SIZE
            | {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 40,
                }
            },
            160,
        ),
        ("bloom", {"vocab_size": 600, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
        ("falcon", SIZE | {"alibi": True}, None),
        ("falcon", SIZE | {"alibi": False}, 40),
        ("xlnet", {"vocab_size": 600, "d_model": 32, "n_layer": 2, "n_head": 4}, None),
        ("mamba", {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_decoder_reads(kind: str, values: dict, expected: int | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    assert num_positions(model) == expected


def test_a_sequence_that_the_encoder_cannot_read_is_refused_in_one_line() -> None:
    model = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    options = {"context": "document", "max_encoder_length": 1000}
    tokenizer = RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, **options
    )
    batch = tokenizer(f"<doc>{'The Seine flows through Paris. ' * 300}</doc>")
    message = r"has \d+ tokens, but the encoder reads 512: give the tokenizer max_encoder_length"
    with pytest.raises(ValueError, match=message):
        model.encode(batch)
