import pytest
import torch

from refrag_lightning.model import RefragModel
from refrag_lightning.text.tokenizer import RefragTokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model folder of random weights that runs at the rates 4 and 8."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"compression": 4, "rates": [4, 8]}
    model = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", **shape)
    model.save_pretrained(folder)
    tokenizer = RefragTokenizer.from_encoder_decoder("tiny/encoder", "tiny/decoder", **shape)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def loaded(model_folder):
    """The folder's model and tokenizer."""
    return (
        RefragModel.from_pretrained(model_folder),
        RefragTokenizer.from_pretrained(model_folder),
    )
