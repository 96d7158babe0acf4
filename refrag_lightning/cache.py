"""The cache folder, the digest that names a model's weights, and how anything gets to the disk.

What is written gets its name when it is complete and on the disk, in one step: whenever the writer
is killed, there is the old file or folder, or the new one, and never a part. Until then it lies
beside its place under a name that says which process writes it, so the next writer of the same
thing takes away what dead processes left. No torch here: commands that only look start fast.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from refrag_lightning.plain_text import say

# Seconds after which what another machine began to write, or what cannot be asked, counts as left.
_ABANDONED = 86_400.0
# Of a name beside a place: the writer's machine, process, start and a number of its own.
_OWNED = re.compile(r"([0-9a-f]{8})-([0-9]+)-([0-9]+)-[0-9a-f]{4}\.(partial|old)")
# Seconds between two signs of life of a holder, and how long others wait for one.
_BEAT, _PATIENCE = 10.0, 60.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def cache_dir() -> Path:
    """The package's cache folder: `$REFRAG_CACHE`, else `~/.cache/refrag_lightning`.

    Sub-folders: `models/` (offline copies), `tiny/` (random test models), `data/` (prepared data).
    """
    configured = os.environ.get("REFRAG_CACHE")
    return (Path(configured) if configured else Path("~/.cache/refrag_lightning")).expanduser()


# Files and folders that appear in one step


def write_text(path: str | Path, text: str) -> None:
    """Writes a file in UTF-8, in one step; see `replace_file`."""
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Gives a path to write a file to, which takes the place of `path` at the end.

    A link is followed, and the mode of a file that is there is kept. What is no ordinary file, such
    as `/dev/stdout` or a named pipe, is written to itself.

    Args:
        path: The file; its folder must exist.

    Yields:
        The path. If the block fails, `path` stays as it was.

    Raises:
        OSError: `path` is a folder, or cannot be written; its `filename` is `path`.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    stream = str(place).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    if stream or (place.exists() and not place.is_file()) or _is_unfinished(place):
        yield place
        return
    place = Path(os.path.realpath(place))
    mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else None
    if mode is not None and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with beside(place) as part:
        yield part
        if mode is not None:
            part.chmod(mode)
        put(part, place)


@contextmanager
def replace_folder(
    folder: str | Path, *, keep: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of `folder` at the end.

    A link is followed. All files get the mode that an ordinary file has here: safetensors writes
    them for their owner alone. A folder that is itself being written by this function is given as
    it is, so writers can be put together.

    Args:
        folder: The place; may exist.
        keep: Says of a file or folder directly in the old `folder` whether the new one takes it
            over, by its name; what the block wrote goes first.

    Yields:
        The folder to write to. If the block fails, `folder` stays as it was.

    Raises:
        OSError: `folder` is a file, or cannot be written.
    """
    place = Path(folder).expanduser()
    if _is_unfinished(place):
        place.mkdir(parents=True, exist_ok=True)
        yield place
        return
    place = Path(os.path.realpath(place))
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so no folder can be written there")
    place.parent.mkdir(parents=True, exist_ok=True)
    with beside(place) as part:
        part.mkdir()
        yield part
        mode = part.stat().st_mode & 0o666
        for path in part.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
        if place.is_dir():
            for entry in place.iterdir():
                if keep(entry.name) and not os.path.lexists(part / entry.name):
                    _carry_over(entry, part / entry.name)
        put(part, place)


def build_folder(
    folder: Path,
    write: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool] = Path.is_dir,
) -> bool:
    """Writes a folder unless it is there, one writer at a time; the others wait for it.

    Args:
        folder: where the folder shall be. An incomplete one is replaced.
        write: fills the empty folder it is given. If it raises, nothing is left.
        is_complete: says whether `folder` needs no writing; asked under the lock.

    Returns:
        True if `write` was called, False if another writer had finished it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        take_away_leftovers(folder)
        if is_complete(folder):
            return False
        with replace_folder(folder) as part:
            write(part)
    return True


@contextmanager
def beside(place: Path) -> Iterator[Path]:
    """A name beside `place` that nobody else writes to; what has it at the end is removed.

    Args:
        place: What is to be written. What dead processes left under such names of it goes first.
    """
    take_away_leftovers(place)
    part = _name_beside(place, "partial")
    try:
        yield part
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(place)
        raise
    finally:
        remove(part)


def put(new: Path, place: Path) -> None:
    """Gives a complete file or folder the name `place`, in one step; what had the name goes.

    Where a file system cannot exchange two folders, the old one has another name for a moment; if
    the process is killed just then, `take_away_leftovers` gives it its name back.
    """
    for path in [*(new.rglob("*") if new.is_dir() else ()), new]:
        # No links and no pipes, which would be waited for; what was taken over may be anything.
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            with suppress(PermissionError):  # taken over from somebody else
                _sync(path)
    try:
        os.replace(new, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        # A folder cannot be replaced, but exchanged.
        if not _exchange(new, place):
            old = _name_beside(place, "old")
            place.rename(old)
            try:
                new.rename(place)
            except BaseException:
                old.rename(place)
                raise
            new = old
    _sync(place.parent)
    remove(new)


def take_away_leftovers(place: Path) -> None:
    """Removes what dead writers of `place` left, or gives it its name back if it has none.

    Args:
        place: A file or folder; it and its parent may be missing.
    """
    try:
        names = os.listdir(place.parent)
    except OSError:
        return
    left = [place.with_name(name) for name in names if _is_left(name, place)]
    for path in left:
        if path.suffix == ".old" and not os.path.lexists(place):
            with suppress(OSError):  # another process did it
                path.rename(place)
    for path in left:
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _name_beside(place: Path, kind: str) -> Path:
    me = Process.current()
    owner = f"{me.host}-{me.pid}-{me.started}-{secrets.token_hex(2)}"
    return place.with_name(f"{_beginning(place)}{owner}.{kind}")


def _beginning(place: Path) -> str:
    # Names have 255 bytes at most.
    return "." + os.fsencode(place.name)[:150].decode(errors="ignore") + "."


def _is_unfinished(path: Path) -> bool:
    """Whether a path is being written by `beside`, or lies in a folder that is."""
    names = path.absolute().parts
    return any(_OWNED.fullmatch(".".join(name.split(".")[-2:])) for name in names)


def _is_left(name: str, place: Path) -> bool:
    """Whether a dead writer of `place` gave this name to something beside it."""
    beginning = _beginning(place)
    match = _OWNED.fullmatch(name, len(beginning)) if name.startswith(beginning) else None
    if match is None:
        return False
    alive = Process(match[1], int(match[2]), int(match[3])).is_alive()
    if alive is not None:
        return not alive
    try:
        return time.time() - place.with_name(name).lstat().st_mtime > _ABANDONED
    except OSError:
        return False


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    call = _renameat2()
    if call is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


@lru_cache(maxsize=1)
def _renameat2() -> Any:
    """Linux's renameat2 of the C library, which Python has no name for; None elsewhere."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None


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


def _sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Who writes


@dataclass(frozen=True)
class Process:
    """A process, as another one can ask for it later.

    Attributes:
        host: Digest of the machine, its boot and its table of processes; a container has its own.
        pid: Its number there.
        started: When it started, in the system's ticks; 0 where that is not known.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls(_host(), os.getpid(), _started(os.getpid())[1])

    def is_alive(self) -> bool | None:
        """Whether it still runs; None where it cannot be asked, since it is on another machine."""
        if self.host != _host():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # somebody else's
            pass
        state, started = _started(self.pid)
        # A number is given again, and a killed process keeps its own until its parent asks for it.
        return state not in ("Z", "X") and (not started or started == self.started)


def _started(pid: int) -> tuple[str, int]:
    """A process's state and when it started; "" and 0 where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", 0
    # The name before the parenthesis may hold anything; starttime is the 22nd field of proc(5).
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@contextmanager
def sole_writer(place: Path, *, advice: str) -> Iterator[None]:
    """Refuses to begin while another process is between begin and end of this for the same place.

    The file `.NAME.lock` beside it names the holder. A holder on this machine counts as long as its
    process lives, so after a SIGKILL the next one begins at once. One that cannot be asked counts
    as long as it touches the file, which it does every ten seconds: whoever finds it waits for up
    to a minute to see that. A process forked by the holder holds nothing, and neither does a copy
    of the file elsewhere.

    Args:
        place: A file or folder, which need not be there.
        advice: What the user can do, the end of the message.

    Raises:
        OSError: Another process is at it; the message names it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}.lock")
    me = Process.current()
    dead = None
    while (found := _take(path, me, dead)) is not None:
        holder, text = found
        if holder.is_alive() is None and not _is_touched(path, text):
            dead = text
            continue
        since = json.loads(text)["since"]
        raise OSError(
            f"{place} is being written by process {holder.pid} on "
            f"{json.loads(text)['machine']} since {since}; {advice}"
        )
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, me, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with _locked(path) as handle:
            if _holder(_read(handle)) == me:
                path.unlink()


def _take(path: Path, me: Process, dead: str | None) -> tuple[Process, str] | None:
    """Writes this process into a lock file, or says who is in it and lives as far as is known."""
    with _locked(path) as handle:
        text = _read(handle)
        holder = _holder(text)
        place, inode = os.path.realpath(path), os.fstat(handle).st_ino
        if holder is not None and holder != me and text != dead and holder.is_alive() is not False:
            entry = json.loads(text)
            # Both are others in a copy of the holder's folder; one of them may be under a mount.
            if entry.get("place", place) == place or entry.get("inode") == inode:
                return holder, text
        entry = {
            **asdict(me),
            "place": place,
            "inode": inode,
            "machine": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(entry).encode(), 0)
        os.fsync(handle)
        return None


def _is_touched(path: Path, text: str) -> bool:
    """Whether a lock file changes, or is touched, within the time in which a living holder does."""
    say(f"waiting up to {_PATIENCE:.0f} s for the holder of {path} to show itself", flush=True)
    with _locked(path) as handle:
        before = os.fstat(handle).st_mtime_ns
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        time.sleep(_BEAT / 5)
        # Opened each time: a network file system may answer from its memory otherwise.
        with _locked(path) as handle:
            if _read(handle) != text:
                return False
            if os.fstat(handle).st_mtime_ns != before:
                return True
    return False


def _touch(path: Path, me: Process, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with suppress(OSError), _locked(path) as handle:
            if _holder(_read(handle)) != me:
                say(f"note: another process has taken {path}, and writes too", file=sys.stderr)
                return
            os.utime(handle)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A lock file, open and kept from others for as short as it takes to read and write it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(ImportError, OSError):  # a system or file system without such locks
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
            # Its last holder may have removed it just then.
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(handle)):
                yield handle
                return
        finally:
            os.close(handle)


def _read(handle: int) -> str:
    return os.pread(handle, 1 << 16, 0).decode(errors="replace")


def _holder(text: str) -> Process | None:
    """Who is in a lock file; nobody if it was killed while it wrote."""
    try:
        entry = json.loads(text)
        return Process(entry["host"], int(entry["pid"]), int(entry["started"]))
    except (ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=1)
def _host() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


# What names contents


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
