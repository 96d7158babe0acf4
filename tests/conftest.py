"""What every test runs under: no Hub, few threads, and the models that several tests share."""

from __future__ import annotations

import os

# Libraries read these when they are imported, which the tests' modules do after this file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

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
def real_pair() -> tuple[str, str]:
    """The names of the two default models, (encoder, decoder); skips where they are not at hand."""
    decoder, encoder = offline_models.SOURCES
    for name in (encoder, decoder):
        try:
            hub.resolve(name, weights=False)
        except hub.ModelNotFoundError as error:
            pytest.skip(str(error))
    return encoder, decoder
