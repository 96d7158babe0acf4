"""Where a store is: a folder, or an address on another machine; and who may write to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from lancedb.db import DBConnection

_REMOTE = re.compile(r"[a-z][a-z0-9+]+://")
_LOCK = ".build.lock"
# Readers look for a newer version before each query; over a network not that often.
_FRESH_LOCAL, _FRESH_REMOTE = timedelta(0), timedelta(seconds=5)


def local_path(uri: str | Path) -> Path | None:
    """The folder that an address is; None where it is on another machine."""
    name = str(uri)
    if name.startswith("file://"):
        return Path(url2pathname(urlsplit(name).path))
    return None if _REMOTE.match(name) else Path(name).expanduser()


def make_folder(uri: str | Path) -> None:
    """Makes the folder of a local place.

    Raises:
        NotADirectoryError: The place is a file.
    """
    folder = local_path(uri)
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{str(uri)!r} is a file, so no index can be made there")
        folder.mkdir(parents=True, exist_ok=True)


def connect(uri: str | Path) -> DBConnection:
    """Connects to the database at a place; makes the folder if there is none."""
    import lancedb

    folder = local_path(uri)
    if folder is None:
        connection: DBConnection = lancedb.connect(
            str(uri), read_consistency_interval=_FRESH_REMOTE
        )
        return connection
    connection = lancedb.connect(str(folder), read_consistency_interval=_FRESH_LOCAL)
    return connection


@contextmanager
def builder_lock(uri: str | Path) -> Iterator[None]:
    """Keeps other builders away from a local store; the system lets go if this one is killed.

    At an address there is no lock: there, see to it that only one builder runs.

    Raises:
        OSError: Another build runs.
    """
    folder = local_path(uri)
    if folder is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"another build of the index {str(uri)!r} is running") from None
    try:
        yield
    finally:
        lock.release()
