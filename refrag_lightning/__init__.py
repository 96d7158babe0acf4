"""Retrieval-augmented generation with compressed documents, in the manner of REFRAG."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refrag_lightning.model import RefragConfig, RefragModel
    from refrag_lightning.text.tokenizer import RefragTokenizer

__all__ = ["RefragConfig", "RefragModel", "RefragTokenizer", "__version__"]
__version__ = "0.1.0"

_MODULES = {
    "RefragConfig": "refrag_lightning.model",
    "RefragModel": "refrag_lightning.model",
    "RefragTokenizer": "refrag_lightning.text.tokenizer",
}


def __getattr__(name: str) -> object:
    """Import the public classes when they are used: torch and transformers take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
