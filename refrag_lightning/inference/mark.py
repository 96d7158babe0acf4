"""What an export writes, and the file that marks a folder as one that an export wrote.

The mark, `refrag_export.json`, holds the card's digest, so that a card which was changed by hand is
noticed, and the model's history, for the card of an export that is made from this one.
"""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from refrag_lightning import __version__

MARK = "refrag_export.json"
CARD = "README.md"

# What a model and its tokenizer are on disk; of the folder that is exported nothing else is copied,
# but for the terms under which it may be used.
FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "refrag_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
TERMS = ("LICENSE*", "NOTICE*")
FOLDERS = ("adapter", "encoder_adapter", "encoder_tokenizer", "decoder_tokenizer")


def belongs(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name is one of these."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def write_mark(folder: Path, *, card: str, history: dict[str, Any]) -> None:
    """Marks a folder.

    Args:
        folder: The folder.
        card: The card that the export wrote, or would have written.
        history: `History.data()`.
    """
    mark = {
        "written_by": f"refrag_lightning {__version__}",
        "card": _digest(card),
        "history": history,
    }
    text = json.dumps(mark, indent=1, ensure_ascii=False)
    (folder / MARK).write_text(text + "\n", encoding="utf-8")


def read_mark(folder: Path) -> dict[str, Any] | None:
    """A folder's mark, or None where no export wrote it."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and {"card", "history"} <= mark.keys() else None


def check_place(out: Path) -> None:
    """Refuses a place that holds what no export wrote.

    Raises:
        OSError: If it is a file, or a folder that is neither empty nor marked.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, so no folder can be written there")
    if out.is_dir() and any(out.iterdir()) and read_mark(out) is None:
        raise FileExistsError(
            f"{out} is not empty and no export wrote it; give another folder, or empty this one"
        )


def changed_by_hand(out: Path) -> bool:
    """Whether a folder has a card other than the one that its export wrote."""
    mark, card = read_mark(out), out / CARD
    if mark is None or not card.is_file():
        return False
    return _digest(card.read_text(encoding="utf-8")) != mark["card"]


def replaced(out: Path) -> tuple[str, ...]:
    """What of a folder a new export takes away; the rest stays, a card changed by hand too."""
    if not out.is_dir():
        return ()
    patterns = (*FILES, *FOLDERS, MARK, *(() if changed_by_hand(out) else (CARD,)))
    return tuple(path.name for path in out.iterdir() if belongs(path.name, patterns))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
