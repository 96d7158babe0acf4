"""Files at addresses such as `s3://bucket/folder`, through fsspec: there as a whole, or not at all.

An object store shows an object when all of it has arrived. Elsewhere a file is written beside its
place and moved. A folder, such as a sharded checkpoint, cannot be put in one step: its files go to
a folder of their own, and then a small file `<name>.json` says which folder it is and what has to
be in it. Until then the one before counts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from refrag_lightning.cache import build_folder, cache_dir

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"}


def is_address(place: object) -> bool:
    """Whether `place` is an address for fsspec, and not a local path."""
    return "://" in str(place)


class RemoteFolder:
    """A folder at an address.

    Args:
        address: Such as `s3://bucket/runs/align/7`.

    Raises:
        ValueError: If there is no such kind of address, or what it needs is not installed.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        try:
            self.fs, path = url_to_fs(self.address)
        except ImportError as error:
            advice = ": pip install 'refrag-lightning[aws]'" if "s3" in address[:3] else ""
            raise ValueError(f"{address} needs another package{advice} ({error})") from error
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from error
        self.path = str(path).rstrip("/")
        protocol = self.fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.is_object_store = bool(protocols & _OBJECT_STORES)

    def __truediv__(self, part: str) -> RemoteFolder:
        return RemoteFolder(f"{self.address}/{part}")

    def is_file(self, name: str) -> bool:
        """Whether there is such a file.

        Raises:
            OSError: If that cannot be found out, which is no "no": a run that took it for one would
                begin anew, and write over its checkpoint.
        """
        with self._told():
            try:
                return bool(self.fs.info(self._at(name))["type"] == "file")
            except FileNotFoundError:
                return False

    def names(self) -> dict[str, dict[str, Any]]:
        """All files in the folder and its folders: name -> what the file system knows of it."""
        with self._told():
            try:
                found = self.fs.find(self.path, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self.path) + 1
        return {path[start:]: info for path, info in found.items() if len(path) >= start}

    def stamp(self, name: str) -> str:
        """Another text for every other content of a file."""
        with self._told():
            return str(self.fs.ukey(self._at(name)))

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""
        with self._told():
            try:
                return bytes(self.fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def get(self, name: str, path: Path) -> None:
        """Copies a file from here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self.fs.get_file(self._at(name), str(path))

    def put(self, path: Path, name: str) -> None:
        """Copies a file to here; who looks sees the old one or the new one, whole."""
        place = self._at(name)
        with self._told():
            if self.is_object_store:
                self.fs.put_file(str(path), place)
                return
            self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(path), f"{place}.partial")
            self.fs.mv(f"{place}.partial", place)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        place = self._at(name)
        with self._told():
            if self.is_object_store:
                self.fs.pipe_file(place, content)
                return
            self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(f"{place}.partial", content)
            self.fs.mv(f"{place}.partial", place)

    def remove(self, name: str) -> None:
        """Removes a file or folder, if it is there."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm(self._at(name), recursive=True)

    # Folders that count as one thing

    def put_folder(self, folder: Path, name: str, *, version: str) -> None:
        """Copies a folder to here, in whose place any older version counts until it is complete.

        Args:
            folder: The folder.
            name: What it is to be called.
            version: A word that no older version had.
        """
        place = f"{name}-{version}"
        sizes = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                part = path.relative_to(folder).as_posix()
                sizes[part] = path.stat().st_size
                self.put(path, f"{place}/{part}")
        content = json.dumps({"folder": place.rpartition("/")[2], "files": sizes})
        self.write(f"{name}.json", content.encode())
        parent, _, stem = name.rpartition("/")
        beside = self / parent
        for old in {part.split("/")[0] for part in beside.names() if "/" in part}:
            if old.startswith(f"{stem}-") and old != f"{stem}-{version}":
                beside.remove(old)

    def parts(self, name: str) -> dict[str, Any] | None:
        """What `put_folder` wrote: the folder that counts as `name`, and its files with sizes.

        Raises:
            OSError: If one of them is not there.
        """
        content = self.read(f"{name}.json")
        if content is None:
            return None
        parts: dict[str, Any] = json.loads(content)
        parent = name.rpartition("/")[0]
        there = (self / f"{parent}/{parts['folder']}".lstrip("/")).names()
        for part, size in parts["files"].items():
            if part not in there or there[part]["size"] != size:
                raise OSError(f"{self.address}/{parts['folder']}/{part} is missing or incomplete")
        return parts

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what a file system raises into an OSError that names the address."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            raise OSError(f"{self.address}: {type(error).__name__}: {text}") from error


def has_checkpoint(folder: RemoteFolder, name: str) -> bool:
    """Whether a checkpoint, a file or a complete folder, is at an address."""
    return folder.is_file(name) or folder.is_file(f"{name}.json")


def fetch_checkpoint(address: str) -> Path:
    """Copies a checkpoint into the cache, once for all processes of a machine.

    Args:
        address: Of a checkpoint, such as `s3://bucket/runs/align/7/checkpoints/last.ckpt`.

    Returns:
        The local file, or folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
    """
    parent, _, name = address.rstrip("/").rpartition("/")
    remote = RemoteFolder(parent)
    if remote.is_file(name):
        files = {name: name}
        stamp = remote.stamp(name)
    else:
        parts = remote.parts(name)
        if parts is None:
            raise FileNotFoundError(f"there is no checkpoint {address}")
        files = {f"{parts['folder']}/{part}": f"{name}/{part}" for part in parts["files"]}
        stamp = json.dumps(parts, sort_keys=True)
    return _fetch(remote, address, files, stamp) / name


def fetch_model(address: str) -> str:
    """Copies a model folder, or that in a run folder, into the cache, once for a machine.

    Args:
        address: Of the model's folder or of the run's.

    Returns:
        The local folder.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
    """
    remote = RemoteFolder(address)
    if not remote.is_file("config.json"):
        remote = remote / "model"
    if not remote.is_file("config.json"):
        raise FileNotFoundError(f"there is no model at {address}")
    files = remote.names()
    stamp = json.dumps({name: remote.stamp(name) for name in sorted(files)})
    files_here = {name: f"model/{name}" for name in files}
    return str(_fetch(remote, address, files_here, stamp) / "model")


def _fetch(remote: RemoteFolder, address: str, files: Mapping[str, str], stamp: str) -> Path:
    """Copies files (there -> here) into a folder of the cache; an older version is removed."""
    for name in (*files, *files.values()):
        # An object store takes any name; as a path, one that goes up leads out of the cache.
        if name.startswith("/") or ".." in name.split("/"):
            raise OSError(f"{address} has a file whose name leads out of the folder: {name!r}")

    def write(part: Path) -> None:
        for source, target in files.items():
            remote.get(source, part / target)

    parent = cache_dir() / "fetched" / _digest(address.rstrip("/"))
    folder = parent / _digest(stamp)
    build_folder(folder, write)
    for old in parent.iterdir():
        if old.is_dir() and not old.name.startswith(".") and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
