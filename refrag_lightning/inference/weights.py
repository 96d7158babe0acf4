"""What weights a folder holds, from the headers of its files alone."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def describe_weights(folder: Path) -> str:
    """Parameters, types and size of all safetensors files of a folder, at any depth.

    Args:
        folder: The folder.

    Returns:
        Such as `134,515,008 parameters, bfloat16, 269.1 MB`, the commonest type first.
    """
    count, size = 0, 0
    kinds: dict[str, int] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        size += path.stat().st_size
        for tensor in _tensors(path):
            number = prod(tensor["shape"])
            count += number
            kind = _DTYPES.get(tensor["dtype"], tensor["dtype"].lower())
            kinds[kind] = kinds.get(kind, 0) + number
    types = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind])) or "nothing"
    return f"{count:,} parameters, {types}, {size / 1e6:,.1f} MB"


def _tensors(path: Path) -> list[dict[str, Any]]:
    """The headers of a safetensors file: 8 bytes of length, then JSON (the format's README)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]
