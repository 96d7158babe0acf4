"""Names by content: of texts, of documents, and of the settings that states depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def text_key(text: str) -> str:
    """The name of a text: 32 hex digits (128 bits) of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def state_key(settings: dict[str, Any]) -> str:
    """The name of what `states.state_settings` gave: 16 hex digits of the SHA-256 of its JSON.

    The encoder's name is left out, since a folder may move; its weights and revision count.
    """
    return _digest({name: value for name, value in settings.items() if name != "encoder"})[:16]


def document_key(*parts: Any) -> str:
    """The name of a document's content and of how it is split: 32 hex digits of a SHA-256."""
    return _digest(parts)[:32]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
