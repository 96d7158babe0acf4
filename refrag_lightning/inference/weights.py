"""What weights a folder holds, from the headers of its files alone."""

from __future__ import annotations

from math import prod
from pathlib import Path

from safetensors import safe_open

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
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                tensor = file.get_slice(name)
                number = prod(tensor.get_shape())
                count += number
                kind = _DTYPES.get(tensor.get_dtype(), tensor.get_dtype().lower())
                kinds[kind] = kinds.get(kind, 0) + number
    types = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind])) or "nothing"
    return f"{count:,} parameters, {types}, {size / 1e6:,.1f} MB"
