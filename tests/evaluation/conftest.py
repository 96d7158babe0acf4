"""A tiny model with two rates, and one that is a decoder alone."""

import pytest

from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.model.load import load


@pytest.fixture
def reader(folder):
    """The model of the folder."""
    return Reader(*load(folder))


@pytest.fixture
def plain():
    """The decoder alone."""
    return Reader(*load("tiny/decoder"))
