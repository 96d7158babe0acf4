"""Models that say what a test expects, in run folders."""

import pytest
from safetensors.torch import load_file, save_file

from refrag_lightning.inference.pipeline import RefragPipeline
from tests.inference.chat.scripted import scripted_decoder, scripted_refrag

SAYS = "The **Seine** flows through Paris [1]."
ENDLESS = "The Seine flows through Paris. "


@pytest.fixture(scope="session")
def seine(tmp_path_factory):
    """A run folder whose model answers everything with `SAYS`."""
    return scripted_refrag(tmp_path_factory.mktemp("seine"), SAYS)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory):
    """A run folder whose base is no longer what it was; it would answer the same all the same."""
    folder = scripted_refrag(tmp_path_factory.mktemp("other"), SAYS)
    weights = folder / "base" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A run folder whose model says `ENDLESS` again and again."""
    return scripted_refrag(tmp_path_factory.mktemp("endless"), ENDLESS, endless=True)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A folder of a causal language model alone that answers everything with `SAYS`."""
    return scripted_decoder(tmp_path_factory.mktemp("plain"), SAYS)


@pytest.fixture(scope="session")
def pipeline(seine):
    return RefragPipeline.from_pretrained(seine)


@pytest.fixture(scope="session")
def endless_pipeline(endless):
    return RefragPipeline.from_pretrained(endless)
