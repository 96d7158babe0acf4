"""What every test runs under: no Hub, few threads, and the models that several tests share."""

from __future__ import annotations

import os
import signal

# Libraries read these when they are imported, which the tests' modules do after this file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where tests run beside one another (pytest-xdist), each process has a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

# A shell starts what runs in its background with SIGINT ignored, and a child inherits that: then
# tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from refrag_lightning import hub, offline_models, tiny_models

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("here", max_examples=50, **_COMMON)
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def tiny_cache() -> dict[str, Path]:
    """The folders of the tiny models, by name; built in the user's cache if they are not there."""
    return {name: Path(hub.resolve(name, weights=False).path) for name in tiny_models.NAMES}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of tiny models that runs at rows of 4 and of 8 tokens."""
    import torch

    from refrag_lightning import RefragModel, RefragTokenizer

    shape = {"compression": 4, "rates": [4, 8], "context": "document"}
    names = "tiny/encoder", "tiny/decoder"
    folder = tmp_path_factory.mktemp("models") / "two-rates"
    torch.manual_seed(0)
    RefragModel.from_encoder_decoder(*names, **shape).save_pretrained(folder)
    RefragTokenizer.from_encoder_decoder(*names, **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_pair() -> tuple[str, str]:
    """The names of the two default models, (encoder, decoder); skips where they are not at hand."""
    decoder, encoder = offline_models.SOURCES
    for name in (encoder, decoder):
        try:
            hub.resolve(name, weights=False)
        except hub.ModelNotFoundError as error:
            pytest.skip(str(error))
    return encoder, decoder
