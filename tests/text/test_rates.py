"""One tokenizer at several rates, and one without an encoder."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.strategies import PYDOC
from tests.text.loading import hugging_face, refrag

TEXT = f"Where? <doc title=Topics>{PYDOC[:400]}</doc> Answer:"


def assert_equal(batch, other):
    assert sorted(batch) == sorted(other)
    for key in batch:
        assert torch.equal(batch[key], other[key]), key


@pytest.mark.parametrize("settings", [{}, {"chunk_by": "sentence"}, {"context": "document"}])
def test_each_rate_gives_what_a_tokenizer_of_that_rate_alone_gives(settings):
    tokenizer = refrag(compression=8, rates=(16, 4, 8), **settings)
    assert tokenizer.rates == [4, 8, 16]
    sizes = set()
    for rate in tokenizer.rates:
        at = tokenizer.at(rate)
        alone = refrag(compression=rate, **settings)
        assert at.settings == {**alone.settings, "rates": [4, 8, 16]}
        for expand in ("none", [1]):
            assert_equal(at(TEXT, expand=expand), alone(TEXT, expand=expand))
        assert at(TEXT).compression == rate
        sizes.add(at(TEXT).num_rows)
    assert len(sizes) == 3
    assert tokenizer.at(4).at(16) is tokenizer.at(16)
    assert tokenizer.at(4).at(8) is tokenizer
    assert tokenizer.at(4).plain_encoder is tokenizer.plain_encoder


def test_a_rate_that_was_not_given_is_refused():
    with pytest.raises(ValueError, match=r"compression \(5\) must be one of rates \(\[4, 8\]\)"):
        refrag(compression=8, rates=(4, 8)).at(5)


def test_rates_are_saved_and_another_default_may_be_chosen(tmp_path):
    tokenizer = refrag(compression=8, rates=(4, 8))
    tokenizer.save_pretrained(tmp_path)
    assert RefragTokenizer.from_pretrained(tmp_path).settings == tokenizer.settings
    four = RefragTokenizer.from_pretrained(tmp_path, compression=4)
    assert (four.compression, four.rates) == (4, [4, 8])
    assert_equal(four(TEXT), tokenizer.at(4)(TEXT))
    other = RefragTokenizer.from_pretrained(tmp_path, compression=3)
    assert (other.compression, other.rates) == (3, [3])
    more = RefragTokenizer.from_pretrained(tmp_path, compression=3, rates=[3, 4, 8])
    assert (more.compression, more.rates) == (3, [3, 4, 8])
    # A folder from before there were rates has one.
    path = tmp_path / "refrag_tokenizer.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["rates"], settings["max_sentence"]
    path.write_text(json.dumps(settings), "utf-8")
    assert RefragTokenizer.from_pretrained(tmp_path).rates == [8]


# Without an encoder.


@pytest.fixture(params=["tiny/decoder", "tiny/gemma", "tiny/llama3"])
def text_only(request):
    return RefragTokenizer.from_encoder_decoder(None, request.param, compression=4)


def test_documents_are_read_as_text(text_only):
    texts = [TEXT, "none", "<doc></doc><doc>a</doc>"]
    batch = text_only(texts, expand="all")
    both = RefragTokenizer(hugging_face("tiny/encoder"), text_only.decoder, compression=4)
    expected = both(texts, expand="all")
    for key in set(expected) - {"row_states_mask"}:
        assert torch.equal(batch[key], expected[key]), key
    # Each document that is not empty is one row.
    assert [[row.state for row in trace] for trace in batch.trace] == [["tokens"], [], ["tokens"]]
    assert_equal(text_only(texts, expand=[[0], [], [0]]), batch)


def test_a_document_that_is_not_expanded_is_refused(text_only):
    for expand in ("none", [[0], []]):
        with pytest.raises(ValueError, match="give expand='all'"):
            text_only([TEXT, TEXT], expand=expand)
    assert text_only("No document.")["input_ids"].numel()
    with pytest.raises(ValueError, match="has no encoder"):
        _ = text_only.plain_encoder


def test_its_folder_is_a_tokenizer_of_hugging_face_too(text_only, tmp_path):
    # Where a tokenizer with an encoder was before, nothing of it is read.
    refrag(compression=8, header="", footer="").save_pretrained(tmp_path)
    text_only.save_pretrained(tmp_path)
    loaded = RefragTokenizer.from_pretrained(tmp_path)
    assert loaded.encoder is None
    assert loaded.settings == text_only.settings
    assert_equal(loaded(TEXT, expand="all"), text_only(TEXT, expand="all"))
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain("Hello")["input_ids"] == text_only.decoder("Hello")["input_ids"]
    assert plain.chat_template == text_only.decoder.chat_template
