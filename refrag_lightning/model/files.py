"""Tensors and model folders on disk: what is written, and what is refused when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from refrag_lightning import cache

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Beside weights, what a model folder has by our hand.
OURS = ("config.json", "generation_config.json", "adapter", "encoder_adapter")
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


def write_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str | int,
) -> None:
    """Writes `model.safetensors`, or shards and their index, as transformers names them.

    Args:
        tensors: What to write; no two may share memory.
        folder: Where to.
        dtype: Of the floating-point tensors; as they are if None.
        max_shard_size: Largest size of one file.
    """
    ready = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        ready[name] = value.contiguous()
    split = split_torch_state_dict_into_shards(
        ready,
        filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1),
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: ready[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads what `write_tensors` wrote.

    Raises:
        OSError: A file is missing.
        ValueError: The index names a file outside the folder, or a number is NaN or infinite.
    """
    shards = check_shards(folder)
    files = sorted(set(shards.get(INDEX, {}).values())) or [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"{folder} has no {file}")
        tensors.update(load_file(folder / file))
    check_finite(tensors.items(), what=str(folder))
    return tensors


def check_shards(folder: Path) -> dict[str, dict[str, str]]:
    """Refuses a model folder whose index of weights leads to anything but files directly in it.

    transformers follows such names wherever they lead. The digest that names a folder's weights
    (`cache.weights_digest`) is over these files alone.

    Returns:
        For each index directly in the folder its tensors' names -> their files' names.

    Raises:
        ValueError: An index cannot be read, or names something else.
    """
    found = {}
    # Any of them: config.json can say which one transformers reads.
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of weights: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise ValueError(
                    f"{path} names {name!r}; only *.safetensors files in the model's own folder "
                    "are read"
                )
        if path.parent == folder:
            found[path.name] = weight_map
    return found


def check_finite(tensors: Iterable[tuple[str, Tensor]], *, what: str) -> None:
    """Refuses weights that are NaN or infinite: all that is computed with them would be.

    One pass over the memory: 0.1 s for a model of 135 million weights in float32.

    Args:
        tensors: Their names and values; such as `model.named_parameters()`.
        what: Where they come from, for the message.

    Raises:
        ValueError: With the first such tensor's name.
    """
    for name, tensor in tensors:
        values = tensor.detach()
        if not values.is_floating_point() or values.is_meta or not values.numel():
            continue
        if values.element_size() == 1:  # no arithmetic in 8 bits
            values = values.float()
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"{what}: the weights {name!r} hold NaN or infinity, so nothing can be computed "
                "with them; get or train them anew"
            )


def replace_folder(folder: Path, *, ours: tuple[str, ...] = OURS) -> AbstractContextManager[Path]:
    """`cache.replace_folder` for a model: files of other kinds in the folder stay.

    Args:
        folder: The place; may exist.
        ours: Names that belong to the writer and are not taken over from the old folder; weights
            and their index belong to it too.
    """
    return cache.replace_folder(
        folder, keep=lambda name: name not in ours and not _is_weights(name)
    )


def _is_weights(name: str) -> bool:
    return name == INDEX or (name.startswith("model") and name.endswith(".safetensors"))
