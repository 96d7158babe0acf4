"""What a `RefragTokenizer` is on disk: two tokenizers and a file of settings.

With an encoder: `encoder_tokenizer/`, `decoder_tokenizer/` and `refrag_tokenizer.json`. An encoder
made of the decoder's layers has no tokenizer of its own, and no folder. Without an encoder the
decoder's tokenizer lies in the folder itself, as in every Hugging Face folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refrag_lightning.cache import replace_folder
from refrag_lightning.hub import EncoderLayers, encoder_name, load, resolve
from refrag_lightning.text.limits import configured_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE = "refrag_tokenizer.json"
_ENCODER, _DECODER = "encoder_tokenizer", "decoder_tokenizer"


def write(
    folder: Path,
    encoder: PreTrainedTokenizerBase | None,
    decoder: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> None:
    """Writes both tokenizers and the settings into a folder, in one step; other files stay."""
    # These two may be of another tokenizer, which was here before.
    with replace_folder(folder, keep=lambda name: name not in (_ENCODER, _DECODER)) as new:
        if encoder is None:
            decoder.save_pretrained(new)
        else:
            if encoder is not decoder:
                encoder.save_pretrained(new / _ENCODER)
            decoder.save_pretrained(new / _DECODER)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (new / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def read(
    folder: Path,
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase, dict[str, Any]]:
    """Reads what `write` wrote: the encoder's tokenizer or None, the decoder's, the settings.

    Raises:
        FileNotFoundError: If the folder holds no tokenizer of this kind.
    """
    if not (folder / SETTINGS_FILE).is_file():
        found = f"it has no {SETTINGS_FILE}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{str(folder)!r} is no model folder: {found}")
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if not (folder / _DECODER).is_dir():
        return None, load("AutoTokenizer", folder), settings
    decoder = load("AutoTokenizer", folder / _DECODER)
    if not (folder / _ENCODER).is_dir():
        return decoder, decoder, settings
    return load("AutoTokenizer", folder / _ENCODER), decoder, settings


def by_name(
    encoder: str | EncoderLayers | Mapping[str, Any] | None, decoder: str
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase, int | None]:
    """Loads both tokenizers by Hugging Face name or folder.

    Returns:
        The encoder's tokenizer (the decoder's, where it is made of its layers), the decoder's, and
        the most tokens that the encoder reads at once, special tokens counted; None twice where
        there is no encoder.

    Raises:
        ModelNotFoundError: If a name is neither a folder, nor an offline copy, nor on the Hub.
    """
    decoder_tokenizer = load("AutoTokenizer", resolve(decoder, weights=False).path)
    if encoder is None:
        return None, decoder_tokenizer, None
    encoder = EncoderLayers.parse(encoder)
    path = resolve(encoder_name(encoder), weights=False).path
    tokenizer = decoder_tokenizer
    if not (isinstance(encoder, EncoderLayers) and encoder.layers_of == decoder):
        tokenizer = load("AutoTokenizer", path)
    positions = configured_positions(path) or tokenizer.model_max_length
    return tokenizer, decoder_tokenizer, min(positions, tokenizer.model_max_length)
