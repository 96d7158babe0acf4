"""What a container starts with: the sent checkout over the image's, then the command line.

    python -m refrag_lightning.launch.bootstrap fit --config configs/align.yaml
    python -m refrag_lightning.launch.bootstrap --exec jupyter lab

It is the image's entry point. Without REFRAG_CHECKOUT it only becomes `python -m refrag_lightning`
with the arguments given, or with `--exec` the command that follows. With it, the working folder is
first made to hold what was sent:

1. The tar at REFRAG_CHECKOUT (`s3://bucket/key`) is fetched, with growing pauses between attempts.
2. Its SHA-256 has to be REFRAG_CHECKOUT_SHA256.
3. It is read to its end, and refused before anything is written if it is unsafe (names that are
   absolute or go up, anything but files, folders and symbolic links, links that lead out), if two
   of its names would be one file, or if it is larger than the limits: REFRAG_CHECKOUT_MAX_MB of
   files in all (4000), REFRAG_CHECKOUT_MAX_FILE_MB in one (1000), REFRAG_CHECKOUT_MAX_FILES of them
   (200000). Then it is unpacked into a new folder inside the working folder.
4. File by file, by renaming, it takes the place of what lay there. If a step fails, everything is
   put back, and nothing is started.

Afterwards the top-level folders that the checkout has are exactly the checkout's: a module that
was renamed since the image was built is gone, and so are its compiled leftovers. What else lies at
the top stays as the image or a mount has it (installed metadata, runs, caches), and so do mounts
inside. A folder with a .git is refused: this is meant for images, not for the place where somebody
works.

The process is replaced, so a signal to the container reaches the command. As process 1 it would
ignore SIGTERM where nothing handles it: containers should run with an init (`docker run --init`,
`initProcessEnabled` in a job definition).

Errors are one line. Exit codes: 1 where the tar could not be fetched or put in place, 2 where
trying again cannot help: a wrong hash, an unsafe, broken or too large tar, an address that is none.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

ADDRESS = "REFRAG_CHECKOUT"
SHA256 = "REFRAG_CHECKOUT_SHA256"
# Pauses of 1, 2, 4, ... seconds between attempts, about a minute in all.
ATTEMPTS = 7
# S3's rule for names of buckets, which are parts of host names.
_BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Of a key, the characters that S3's documentation calls safe; no part begins with "-" or is "..".
_KEY_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9!_.*'()][A-Za-z0-9!_.*'()-]*")
_MAX_KEY = 1024
# What a tar may say of one member: its headers are read into memory, whatever size they claim.
_MAX_HEADER = 2**20
# Linux's limits of a name and a path, less what is put before it.
_MAX_NAME, _MAX_PATH = 255, 3500
# Files that say which packages an image has to have.
_REQUIREMENTS = ("setup.cfg", "constraints.txt", "pyproject.toml")


class CheckoutError(Exception):
    """The checkout is not what was sent, or cannot be: another attempt would fail too."""


@dataclass(frozen=True)
class Limits:
    """The largest checkout that is unpacked. MB are 10^6 bytes.

    Attributes:
        max_mb: Of all files together.
        max_file_mb: Of one file.
        max_files: Files, folders and links.
    """

    max_mb: float = 4000
    max_file_mb: float = 1000
    max_files: float = 200_000

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Limits:
        """The limits that variables set, such as `REFRAG_CHECKOUT_MAX_MB`.

        Raises:
            ValueError: If one is not a positive number.
        """
        given = {}
        for field in fields(cls):
            variable = f"{ADDRESS}_{field.name.upper()}"
            if (text := variables.get(variable)) is not None:
                if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text, re.ASCII) or not float(text):
                    raise ValueError(f"{variable} has to be a positive number, not {text!r}")
                given[field.name] = float(text)
        return cls(**given)

    def check(self, *, num_files: int, num_bytes: int, largest: int) -> None:
        """Compares a checkout with the limits.

        Args:
            num_files: Its files, folders and links.
            num_bytes: What its files hold together.
            largest: What the largest holds, in bytes.

        Raises:
            ValueError: If it is larger. The message names the variable that sets the limit.
        """
        for field, value, what in (
            ("max_files", num_files, f"has more than {self.max_files:.0f} files"),
            ("max_file_mb", largest / 1e6, f"has a file of more than {self.max_file_mb:g} MB"),
            ("max_mb", num_bytes / 1e6, f"holds more than {self.max_mb:g} MB"),
        ):
            if value > getattr(self, field):
                variable = f"{ADDRESS}_{field.upper()}"
                raise ValueError(f"the checkout {what}; the variable {variable} sets the limit")


DEFAULT_LIMITS = Limits()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Puts the checkout in place where one was sent, and becomes the command.

    Args:
        arguments: The arguments; None takes those of the process.

    Raises:
        SystemExit: With 1 or 2, if it cannot; see the module's docstring.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--"]:
        del words[0]
    if words[:1] == ["--exec"]:
        command = words[1:]
        if not command:
            _fail("--exec needs a command", code=2)
    else:
        command = [sys.executable, "-m", "refrag_lightning", *words]
    address = os.environ.get(ADDRESS)
    if address:
        try:
            prepare(address, os.environ.get(SHA256, ""), Path.cwd())
        except CheckoutError as error:
            _fail(str(error), code=2)
        except OSError as error:
            _fail(str(error), code=1)
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _fail(f"{command[0]}: {error.strerror}", code=127)


def prepare(address: str, sha256: str, folder: Path) -> None:
    """Makes a folder hold a checkout.

    Args:
        address: The tar's address, `s3://bucket/key`.
        sha256: What its SHA-256 has to be, in hexadecimal.
        folder: The folder.

    Raises:
        CheckoutError: If the address is none, the hash is another, or the tar is unsafe or larger
            than the limits.
        OSError: If it cannot be fetched or put in place; the files are then as they were.
    """
    if len(sha256) != 64:
        raise CheckoutError(f"{SHA256} has to be the SHA-256 of {address}, not {sha256!r}")
    if os.path.lexists(folder / ".git"):
        raise CheckoutError(
            f"{folder} is a git checkout, and files would be replaced; unset {ADDRESS}"
        )
    try:
        limits = Limits.of(os.environ)
    except ValueError as error:
        raise CheckoutError(str(error)) from None
    data = fetch(address, limits)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckoutError(f"{address} has SHA-256 {found}, not {sha256}: refused")
    before = _requirements(folder)
    num_files = overlay(data, folder, limits)
    _tell(f"{num_files} files of {address} are in {folder}")
    changed = [name for name, text in _requirements(folder).items() if before.get(name) != text]
    if before and changed:
        _tell(f"{', '.join(changed)} differs from the image's: the packages are still the image's")


def check_bucket(name: str) -> None:
    """Raises ValueError if S3 cannot have a bucket of that name."""
    if not _BUCKET.fullmatch(name):
        raise ValueError(
            f"{name!r} is not the name of a bucket: S3 takes 3 to 63 small letters, digits, '.' "
            "and '-', with a letter or digit at both ends"
        )


def check_key(key: str) -> None:
    """Raises ValueError unless a key is made of plain names: `checkouts/abc.tar.gz`."""
    if len(key) > _MAX_KEY or not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(
            f"{key!r} is not a key that is used here: parts between '/' take letters, digits and "
            "!_.*'()-, do not begin with '-', and are not '.' or '..'"
        )


def fetch(address: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The object at an address, tried several times.

    Args:
        address: `s3://bucket/key`.
        limits: A larger object is not read.

    Raises:
        CheckoutError: If the address is none, or S3 says that there is no such object or no right
            to read it; or if it is too large.
        OSError: If the last attempt failed.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise CheckoutError(f"{ADDRESS} has to be s3://bucket/key, not {address!r}")
    try:
        check_bucket(bucket)
        check_key(key)
    except ValueError as error:
        raise CheckoutError(f"{ADDRESS}: {error}") from None

    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            found = _client(boto3).get_object(Bucket=bucket, Key=key)
            _check(limits, num_bytes=found.get("ContentLength", 0))
            return found["Body"].read()
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status < 500 and status != 429:
                said = error.response["Error"]
                raise CheckoutError(
                    f"{address}: {said.get('Code')}: {said.get('Message')}"
                ) from None
            reason: Exception = error
        except (BotoCoreError, HTTPClientError, OSError) as error:
            reason = error
        if attempt < ATTEMPTS:
            pause = 2 ** (attempt - 1)
            _tell(f"{_line(reason)}; again in {pause} s")
            time.sleep(pause)
    raise OSError(f"{address} could not be fetched in {ATTEMPTS} attempts: {_line(reason)}")


def overlay(data: bytes, folder: Path, limits: Limits = DEFAULT_LIMITS) -> int:
    """Unpacks a tar and puts its files in the place of a folder's.

    Args:
        data: The gzipped tar.
        folder: The folder. Its top-level folders that the tar has too lose every other file.
        limits: The largest tar that is unpacked.

    Returns:
        The number of files and symbolic links.

    Raises:
        CheckoutError: If the tar is unsafe, broken or too large.
        OSError: If a file cannot be put in place. In both cases the files are as they were.
    """
    if not hasattr(tarfile, "data_filter"):
        raise CheckoutError("this Python cannot unpack safely: it needs 3.10.12, 3.11.4 or later")
    members = _read(data, limits)
    # On the folder's own disk, so that files move by renaming.
    work = Path(tempfile.mkdtemp(prefix=".checkout-", dir=folder))
    try:
        names = _unpack(data, members, work / "new")
        _swap(folder, work / "new", work / "old", names)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(names)


class _Headers(gzip.GzipFile):
    """A tar's bytes while its headers are read; files are passed over by seeking."""

    left = _MAX_HEADER

    def read(self, size: int | None = -1) -> bytes:
        self.left -= size or 0
        if size is None or size < 0 or self.left < 0:
            raise CheckoutError(f"the checkout has a header of more than {_MAX_HEADER} bytes")
        return super().read(size)


def _read(data: bytes, limits: Limits) -> list[tarfile.TarInfo]:
    """The members of a tar that may be unpacked, in their order.

    Raises:
        CheckoutError: If it may not.
    """
    kinds: dict[PurePosixPath, bool] = {}
    members: list[tarfile.TarInfo] = []
    total = 0
    try:
        headers = _Headers(fileobj=io.BytesIO(data))
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            # One by one: what a member says it holds is checked before it is passed over.
            for member in tar:
                headers.left = _MAX_HEADER
                path = _safe_path(member)
                if path in kinds:
                    raise CheckoutError(f"the checkout has {member.name!r} twice")
                kinds[path] = member.isdir()
                members.append(member)
                total += member.size
                _check(limits, num_files=len(members), num_bytes=total, largest=member.size)
    except CheckoutError:
        raise
    # Whatever tarfile, gzip and zlib make of broken bytes; they read from memory.
    except Exception as error:
        raise _broken(error) from None
    if all(kinds.values()):
        raise CheckoutError("the checkout has no files")
    for path in kinds:
        for parent in path.parents:
            if kinds.get(parent, True) is False:
                raise CheckoutError(
                    f"the checkout has {str(path)!r} below {str(parent)!r}, which is not a folder"
                )
    return members


def _safe_path(member: tarfile.TarInfo) -> PurePosixPath:
    """A member's path without `.`; two members of one path would be one file."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in member.name:
        raise CheckoutError(f"the checkout has an unsafe name: {member.name!r}")
    if not (member.isreg() or member.issym() or member.isdir()):
        raise CheckoutError(f"the checkout has a special file: {member.name!r}")
    long = max(len(os.fsencode(part)) for part in path.parts) > _MAX_NAME
    if long or len(os.fsencode(member.name)) > _MAX_PATH:
        raise CheckoutError(f"the checkout has a name that is too long: {member.name[:80]!r}...")
    if member.issym():
        target = member.linkname
        if not target or "\0" in target or len(os.fsencode(target)) > _MAX_PATH:
            raise CheckoutError(f"the checkout has an unsafe link: {member.name!r}")
    if member.size < 0:
        raise CheckoutError(f"the checkout cannot be unpacked: {member.name!r} has a size below 0")
    return path


def _check(limits: Limits, *, num_files: int = 0, num_bytes: int = 0, largest: int = 0) -> None:
    try:
        limits.check(num_files=num_files, num_bytes=num_bytes, largest=largest)
    except ValueError as error:
        raise CheckoutError(f"{error}; nothing was unpacked") from None


def _unpack(data: bytes, members: list[tarfile.TarInfo], to: Path) -> list[str]:
    """Unpacks a tar, and returns the names of its files and links."""
    to.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            tar.extractall(to, members=members, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise _broken(error) from None
    return [str(PurePosixPath(member.name)) for member in members if not member.isdir()]


def _broken(error: Exception) -> CheckoutError:
    return CheckoutError(f"the checkout cannot be unpacked: {_line(error)}")


def _swap(folder: Path, new: Path, old: Path, names: list[str]) -> None:
    """Renames what was in the folder into `old` and what is new into the folder, or does nothing.

    Only files and links are renamed: a container's file system refuses it for an image's folders.
    """
    tops = sorted({PurePosixPath(name).parts[0] for name in names})
    done: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        done.append((source, target))

    try:
        for top in tops:
            for path in _files(folder / top):
                move(path, old / path.relative_to(folder))
            # A file may come where a folder was.
            _prune(folder / top)
        for name in names:
            move(new / name, folder / name)
    except BaseException:
        for source, target in reversed(done):
            # An empty folder may stand where a file was.
            _prune(source)
            source.parent.mkdir(parents=True, exist_ok=True)
            os.replace(target, source)
        for top in tops:
            _prune(folder / top)
        raise


def _files(path: Path) -> list[Path]:
    """Files and links at or below a path, without what is mounted there."""
    if path.is_symlink() or path.is_file():
        return [path]
    if not path.is_dir() or os.path.ismount(path):
        return []
    return [found for entry in sorted(path.iterdir()) for found in _files(entry)]


def _prune(path: Path) -> None:
    """Removes a folder that holds nothing but empty folders, and such folders below it."""
    if path.is_symlink() or not path.is_dir() or os.path.ismount(path):
        return
    for entry in list(path.iterdir()):
        _prune(entry)
    if not any(path.iterdir()):
        path.rmdir()


def _requirements(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in _REQUIREMENTS]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _client(boto3: Any) -> Any:
    from botocore.config import Config

    # The attempts are counted above, where a broken download counts too.
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=60)
    return boto3.client("s3", config=config)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tell(message: str) -> None:
    # Standard output is the command's.
    print(f"bootstrap: {_plain(message)}", file=sys.stderr, flush=True)


def _fail(message: str, *, code: int) -> NoReturn:
    print(f"error: {_plain(message)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _plain(message: str) -> str:
    """A message on one line, without what a terminal obeys; the package is not there yet."""
    return "".join(c for c in " ".join(message.split()) if c.isprintable())


if __name__ == "__main__":
    main()
