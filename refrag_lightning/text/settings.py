"""The settings of a tokenizer, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from refrag_lightning.text.assemble import Context
from refrag_lightning.text.lines import PaddingSide
from refrag_lightning.text.packing import ChunkBy

_CHOICES: dict[str, Any] = {"chunk_by": ChunkBy, "context": Context, "padding_side": PaddingSide}


def check_choice(name: str, value: str) -> None:
    """Raises ValueError unless a setting has one of its values."""
    choices = get_args(_CHOICES[name])
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {choices}")


def sorted_rates(rates: Sequence[int] | None, compression: int) -> list[int]:
    """Every rate, rising; `compression` alone if there are none.

    Raises:
        ValueError: If `compression` is none of them, or one is less than 1.
    """
    chosen = sorted({compression} if rates is None else set(rates))
    if compression not in chosen:
        raise ValueError(f"compression ({compression}) must be one of rates ({chosen})")
    if chosen[0] < 1:
        raise ValueError(f"compression ({chosen[0]}) must be at least 1")
    return chosen


def check_settings(settings: dict[str, Any]) -> None:
    """Checks a tokenizer's settings.

    Raises:
        ValueError: If a setting is not one of its values, or two do not fit each other.
    """
    for name in _CHOICES:
        check_choice(name, settings[name])
    for name in ("header", "footer"):
        if not isinstance(settings[name], str):
            raise ValueError(f"{name} ({settings[name]!r}) must be a text")
    num_slots, compression = settings["num_slots"], settings["compression"]
    chunk_by, rates = settings["chunk_by"], settings["rates"]
    if not 1 <= num_slots <= compression:
        raise ValueError(f"num_slots ({num_slots}) must be 1 to compression ({compression})")
    if num_slots > 1 and chunk_by != "encoder":
        raise ValueError(f"num_slots ({num_slots}) must be 1 with chunk_by={chunk_by!r}")
    if num_slots > 1 and len(rates) > 1:
        raise ValueError(f"num_slots ({num_slots}) must be 1 with several rates ({rates})")
    if settings["max_sentence"] < 1:
        raise ValueError(f"max_sentence ({settings['max_sentence']}) must be at least 1")
