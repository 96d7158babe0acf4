"""Tensors and folders on disk: safetensors files, and a folder replaced in one step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
    """
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"{folder} has no {file}")
        tensors.update(load_file(folder / file))
    return tensors


@contextmanager
def replace_folder(folder: Path, *, ours: tuple[str, ...]) -> Iterator[Path]:
    """Gives a fresh folder to write to, which takes the place of `folder` at the end.

    Args:
        folder: The place; may exist.
        ours: Names that belong to the writer and are not carried over from the old folder;
            weights and their index belong to it too.

    Yields:
        A temporary folder beside the place. If the block fails it is removed, and the place stays
        as it was.

    Raises:
        OSError: `folder` is a file.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so no folder can be written there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        # mkdtemp makes a private folder; the result is an ordinary one.
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        yield new
        if not folder.is_dir():
            new.rename(folder)
            return
        for entry in folder.iterdir():
            if entry.name not in ours and not _is_weights(entry.name):
                _carry_over(entry, new / entry.name)
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        folder.rename(old / folder.name)
        new.rename(folder)
        shutil.rmtree(old)
    finally:
        if new.is_dir():
            shutil.rmtree(new)


def ordinary_modes(folder: Path) -> None:
    """Lets everybody read the files who may by the umask; safetensors writes for the owner alone.

    Args:
        folder: Whose files, at any depth.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _is_weights(name: str) -> bool:
    return name == INDEX or (name.startswith("model") and name.endswith(".safetensors"))


def _carry_over(source: Path, target: Path) -> None:
    """Links a file or folder into the new place; copies where the file system cannot link."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target
