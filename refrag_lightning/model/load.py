"""Loading whatever a folder or a name stands for, model and tokenizer together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from refrag_lightning import hub
from refrag_lightning.cache import take_away_leftovers
from refrag_lightning.model.config import RefragConfig
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.refrag import RefragModel
from refrag_lightning.text.saving import SETTINGS_FILE
from refrag_lightning.text.tokenizer import RefragTokenizer


def load(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    allow_base_mismatch: bool = False,
    **settings: Any,
) -> tuple[RefragModel | PlainModel, RefragTokenizer]:
    """Loads a model and its tokenizer.

    Args:
        name: A folder that `RefragModel` or `PlainModel` wrote with its tokenizer, a run folder
            that has one as `model/`, or the name or folder of any causal language model, whose
            documents are then read as text.
        device: Where to put the model.
        dtype: Of the base models; float32 if None.
        attn_implementation: As transformers takes it; its own choice if None.
        allow_base_mismatch: As in `RefragModel.from_pretrained`.
        settings: Of the tokenizer, in place of its own: `compression`, `header`, ...

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        OSError: Nothing is found by that name.
        ValueError: It is no causal language model, or its weights do not fit.
    """
    place = model_folder(name)
    if is_refrag(place):
        if not Path(place).is_dir():
            from huggingface_hub import snapshot_download

            place = snapshot_download(place)
        model = RefragModel.from_pretrained(
            place,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            allow_base_mismatch=allow_base_mismatch,
        )
        return model, RefragTokenizer.from_pretrained(place, **settings)
    plain = PlainModel.from_pretrained(
        place, device=device, dtype=dtype, attn_implementation=attn_implementation
    )
    if (Path(place) / SETTINGS_FILE).is_file():
        return plain, RefragTokenizer.from_pretrained(place, **settings)
    return plain, RefragTokenizer.from_encoder_decoder(
        None, place, **{"compression": 1, **settings}
    )


def model_folder(name: str | os.PathLike[str]) -> str:
    """The model's folder inside a run folder; any other folder or name as it is."""
    place = Path(name).expanduser()
    take_away_leftovers(place / "model")
    if not (place / "config.json").is_file() and (place / "model" / "config.json").is_file():
        return str(place / "model")
    return str(place) if place.is_dir() else os.fspath(name)


def is_refrag(name: str | os.PathLike[str]) -> bool:
    """Whether a folder or name is a `RefragModel`, by its configuration.

    Raises:
        OSError: Nothing is found by that name.
    """
    path = hub.resolve(model_folder(name), weights=False).path
    return isinstance(hub.load("AutoConfig", path), RefragConfig)
