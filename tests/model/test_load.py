import pytest
import torch

from refrag_lightning.hub import ModelNotFoundError
from refrag_lightning.model import PlainModel, RefragModel
from refrag_lightning.model.load import is_refrag, load, model_folder
from refrag_lightning.text.tokenizer import RefragTokenizer

NAMES = ("tiny/encoder", "tiny/decoder")
TEXT = "Where? <doc>The Seine flows through Paris.</doc> Answer:"


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as training leaves it: the model with its tokenizer in `model/`."""
    model = RefragModel.from_encoder_decoder(*NAMES, compression=4, rates=[2, 4])
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer = RefragTokenizer.from_encoder_decoder(*NAMES, compression=4, rates=[2, 4])
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run", model, tokenizer


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_run_folder_and_its_model_folder(run_folder, inner):
    folder, model, tokenizer = run_folder
    assert is_refrag(folder / inner)
    loaded, other = load(folder / inner)
    assert isinstance(loaded, RefragModel)
    with torch.no_grad():
        assert torch.equal(loaded(**other(TEXT)).logits, model(**tokenizer(TEXT)).logits)
    _, four = load(str(folder / inner), compression=2)
    assert (four.compression, four.rates) == (2, [2, 4])


def test_a_plain_folder_with_its_tokenizer(tmp_path):
    PlainModel.from_pretrained("tiny/gemma").save_pretrained(tmp_path / "model")
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/gemma", compression=1, header="")
    tokenizer.save_pretrained(tmp_path / "model")
    assert not is_refrag(tmp_path)
    for folder in (tmp_path, tmp_path / "model"):
        model, loaded = load(folder, dtype="bfloat16")
        assert isinstance(model, PlainModel)
        assert model.decoder.dtype == torch.bfloat16
        assert loaded.settings == tokenizer.settings
        assert model(**loaded(TEXT, expand="all")).logits.isfinite().all()


def test_any_causal_language_model_by_name():
    model, tokenizer = load("tiny/llama3", footer="!")
    assert isinstance(model, PlainModel)
    assert not model.training
    assert (tokenizer.encoder, tokenizer.compression, tokenizer.footer) == (None, 1, "!")
    assert not is_refrag("tiny/llama3")
    tokens = model.generate(**tokenizer(TEXT, expand="all"), max_new_tokens=3, eos_token_id=None)
    assert tokens.shape == (1, 3)


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="tiny/nothing"):
        load("tiny/nothing")
    assert model_folder("owner/name") == "owner/name"
