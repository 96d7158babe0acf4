"""The cache folder, folders that appear in one step, and the digest that names a model's weights.

A folder is written beside its place and renamed when it is complete, so its existence means that
it is complete, whenever the writer was killed. No torch here: commands that only look start fast.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """The package's cache folder: `$REFRAG_CACHE`, else `~/.cache/refrag_lightning`.

    Sub-folders: `models/` (offline copies), `tiny/` (random test models), `data/` (prepared data).
    """
    configured = os.environ.get("REFRAG_CACHE")
    return (Path(configured) if configured else Path("~/.cache/refrag_lightning")).expanduser()


def build_folder(
    folder: Path,
    write: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool] = Path.is_dir,
) -> bool:
    """Write a folder so that no reader and no crash ever sees a part of it.

    One writer at a time (a file lock, which the system releases if the writer dies); what a killed
    writer left is removed first. An incomplete folder at `folder` is replaced.

    Args:
        folder: where the folder shall be.
        write: fills the empty folder it is given. If it raises, nothing is left.
        is_complete: says whether `folder` needs no writing; asked again under the lock.

    Returns:
        True if `write` was called, False if another writer had finished it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.part"
    replaced = folder.parent / f".{folder.name}.replaced"
    with FileLock(folder.parent / f".{folder.name}.lock"):
        for leftover in (part, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        if is_complete(folder):
            return False
        part.mkdir()
        try:
            write(part)
            for path in [*part.rglob("*"), part]:
                # safetensors writes files that only their owner can read; a cache may be shared.
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
                _sync(path)
            if folder.exists():
                folder.rename(replaced)
            part.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
    return True


def weights_digest(folder: str | Path) -> str:
    """The name of a folder's weights: `sha256:` and a hex digest.

    The digest is over the sorted names and the contents of the `*.safetensors` files directly in
    `folder`, so a renamed, added or changed shard changes it and an edited config does not.

    Raises:
        FileNotFoundError: the folder holds no `*.safetensors` file.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        content = _file_digest(
            str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
        digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    """SHA-256 of a file (1.6 GB/s); the stat fields are cache keys that a changed file changes."""
    return file_sha256(path)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
