"""A tiny model with two rates, and one that is a decoder alone."""

import pytest
import torch

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.model.load import load

SHAPE = {"compression": 4, "rates": [4, 8], "context": "document"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder."""
    place = tmp_path_factory.mktemp("models") / "refrag"
    torch.manual_seed(0)
    RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", **SHAPE).save_pretrained(place)
    tokenizer = RefragTokenizer.from_encoder_decoder("tiny/encoder", "tiny/decoder", **SHAPE)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def reader(folder):
    """The model of the folder."""
    return Reader(*load(folder))


@pytest.fixture
def plain():
    """The decoder alone."""
    return Reader(*load("tiny/decoder"))
