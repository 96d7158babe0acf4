import json
import warnings

import numpy as np
import pytest
import torch

from refrag_lightning.model import RefragModel
from refrag_lightning.retrieval.keys import state_key, text_key
from refrag_lightning.retrieval.states import encode_passages, state_settings
from refrag_lightning.retrieval.store import PassageStore
from refrag_lightning.retrieval.stored_rows import StoredRows, as_table, read_table
from refrag_lightning.text.documents import Document
from refrag_lightning.text.tokenizer import RefragTokenizer

TEXTS = [
    "The Seine flows through Paris, and on to the sea at Le Havre.",
    "\n",  # the encoder reads no token of it
    "The Rhine comes from the Alps. It passes Basel, Cologne and Rotterdam on its way.",
    "Short.",
]


def pair(**shape):
    shape = {"compression": 4, **shape}
    torch.manual_seed(0)
    model_shape = {name: value for name, value in shape.items() if name != "max_sentence"}
    return (
        RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", **model_shape),
        RefragTokenizer.from_encoder_decoder(
            "tiny/encoder",
            "tiny/decoder",
            **{name: value for name, value in shape.items() if name != "pooling"},
        ),
    )


def key_of(model, tokenizer):
    return state_key(state_settings(model, tokenizer))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_slots": 2},
        {"context": "document"},
        {"pooling": "concat"},
        {"pooling": "attention"},
        {"chunk_by": "sentence"},
        {"chunk_by": "decoder"},
    ],
    ids=str,
)
def test_rows_are_what_the_model_encodes_in_a_prompt(shape):
    """Each document alone in a prompt, through the whole tokenizer, gives the same states."""
    model, tokenizer = pair(**shape)
    for text, rows in zip(TEXTS, encode_passages(model, tokenizer, TEXTS), strict=True):
        batch = tokenizer([["Before ", Document(text), " after"]])
        with torch.no_grad():
            states = model.encode(batch).numpy()
        (trace,) = batch.trace
        assert rows.states.dtype == np.float16
        assert rows.states.shape == (len(trace), tokenizer.num_slots, model.config.row_size)
        expected = states[[row.row for row in trace]]
        np.testing.assert_allclose(rows.states, expected, rtol=2**-10, atol=1e-5)
        assert rows.ends.tolist() == [row.end for row in trace]
        assert rows.lost.tolist() == [row.lost for row in trace]
        assert [size == 0 for size in rows.sizes] == [row.state == "empty" for row in trace]
        (packed,) = tokenizer.pack([text])
        assert rows.sizes.tolist() == packed.row_sizes.tolist()
    assert not encode_passages(model, tokenizer, ["\n"])[0].states.any()


def test_rows_are_means_of_the_encoders_states(tiny_cache):
    """By transformers alone: a row of four tokens between the special ones, and their mean."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(tiny_cache["tiny/encoder"])
    bert, words = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, tokenizer = pair()
    (rows,) = encode_passages(model, tokenizer, TEXTS[:1])
    ids = words(TEXTS[0], add_special_tokens=False)["input_ids"]
    for number, start in enumerate(range(0, len(ids), 4)):
        part = ids[start : start + 4]
        with torch.no_grad():
            states = bert(
                torch.tensor([[words.cls_token_id, *part, words.sep_token_id]])
            ).last_hidden_state[0, 1:-1]
        np.testing.assert_allclose(
            rows.states[number, 0], states.mean(dim=0).numpy(), rtol=2**-10, atol=1e-5
        )
    assert len(rows.states) == -(-len(ids) // 4)


def test_stored_rows_take_the_place_of_encoding():
    model, tokenizer = pair()
    prompt = [f"Where? <doc>{TEXTS[0]}</doc><doc>{TEXTS[2]}</doc> Answer:"]
    fresh = tokenizer(prompt)
    rows = encode_passages(model, tokenizer, [TEXTS[0], TEXTS[2]])
    states = torch.from_numpy(np.concatenate([each.states for each in rows]).astype(np.float32))
    given = tokenizer(prompt, row_states=states)
    assert given["encoder_input_ids"].shape[0] == 0
    with torch.no_grad():
        difference = (model(**fresh).logits - model(**given).logits).abs().max()
    # float16 keeps 11 bits; logits of this model are of the order of 1.
    assert 0 < difference < 5e-3


def test_a_row_that_float16_cannot_hold_is_refused():
    model, tokenizer = pair()
    with torch.no_grad():
        for norm in model.encoder.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"'The Seine flows .* not finite in float16"):
        encode_passages(model, tokenizer, TEXTS[:1])


def test_without_texts_nothing_is_encoded():
    assert encode_passages(*pair(), []) == []


SHAPES = [
    {},
    {"compression": 8},
    {"num_slots": 2},
    {"context": "document"},
    {"pooling": "last"},
    {"pooling": "concat"},
    {"pooling": "attention"},
    {"chunk_by": "sentence"},
    {"chunk_by": "sentence", "max_sentence": 3},
    {"chunk_by": "decoder"},
]


def test_every_setting_gives_another_key():
    keys = {key_of(*pair(**shape)) for shape in SHAPES}
    assert len(keys) == len(SHAPES)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_the_key_is_of_what_the_encoder_is_and_not_of_the_rest():
    model, tokenizer = pair()
    key = key_of(model, tokenizer)
    model.config.encoder_name = "elsewhere"
    for part in (model.projector, model.decoder):
        for parameter in part.parameters():
            parameter.data.mul_(2)
    assert key_of(model, tokenizer) == key
    # The same weights in bfloat16 count as the same encoder.
    model.encoder.bfloat16()
    assert key_of(model, tokenizer) == key
    model, tokenizer = pair()
    # One weight of all, by as much as one step of training moves it.
    weight = next(model.encoder.parameters())
    weight.data[5, 7] *= 1.01
    assert key_of(model, tokenizer) != key
    model, tokenizer = pair(pooling="attention")
    key = key_of(model, tokenizer)
    model.pool.query.data[3] = 0.5
    assert key_of(model, tokenizer) != key


def test_rates_have_keys_of_their_own(loaded):
    model, tokenizer = loaded
    at4, at8 = (key_of(model, tokenizer.at(rate)) for rate in (4, 8))
    assert at4 != at8
    # The rates beside do not matter.
    assert key_of(*pair(compression=4)) == at4


def test_text_keys():
    # The first 128 bits of SHA-256 of "abc", as FIPS 180-2 gives it.
    assert text_key("abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert text_key("é") != text_key("e\u0301")


def test_a_table_of_rows_gives_them_back():
    rng = np.random.default_rng(0)

    def rows(count):
        layout = rng.integers(0, 99, (3, count)).astype(np.int32)
        return StoredRows(rng.standard_normal((count, 2, 5)).astype(np.float16), *layout)

    given = {"a": rows(3), "b": rows(0), "c": rows(1)}
    table = as_table(list(given), list(given.values()))
    back = dict(read_table(table, {"num_slots": 2, "row_size": 5}))
    assert list(back) == list(given)
    for name, item in given.items():
        for field in ("states", "ends", "sizes", "lost"):
            np.testing.assert_array_equal(getattr(back[name], field), getattr(item, field))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"layer_norm_eps": 0.1}, False),
        ({"hidden_act": "relu"}, False),
        ({"hidden_dropout_prob": 0.3}, True),
        ({"_name_or_path": "elsewhere"}, True),
    ],
    ids=str,
)
def test_the_key_holds_the_encoders_configuration(change, same, tmp_path):
    """The same weights with another layer norm give other states, so they have another key."""
    model, tokenizer = pair()
    key, (rows,) = key_of(model, tokenizer), encode_passages(model, tokenizer, TEXTS[:1])
    model.encoder.save_pretrained(tmp_path)
    tokenizer.encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = RefragModel.from_encoder_decoder(str(tmp_path), "tiny/decoder", compression=4)
    (its,) = encode_passages(other, tokenizer, TEXTS[:1])
    settings = state_settings(other, tokenizer)
    assert settings["encoder_weights"] == state_settings(model, tokenizer)["encoder_weights"]
    # The name is no part of the key, and where the weights lie is none of the content.
    settings["encoder_revision"] = model.config.encoder_revision
    assert np.allclose(rows.states, its.states) == same
    assert (state_key(settings) == key) == same


def test_states_under_another_key_are_not_read_and_it_is_said_once(tmp_path):
    model, tokenizer = pair()
    store = PassageStore.create(tmp_path / "index")
    rows = encode_passages(model, tokenizer, TEXTS[:1])
    settings = state_settings(model, tokenizer)
    # As a version wrote them that did not know of the encoder's configuration.
    old = {name: value for name, value in settings.items() if name != "encoder_config"}
    store.add_states(state_key(old), old, TEXTS[:1], rows)
    with pytest.warns(UserWarning, match="index build --index"):
        assert store.rows(state_key(settings), TEXTS[:1]) == [None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.rows(state_key(settings), TEXTS[:1]) == [None]
