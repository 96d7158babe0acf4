"""What a container starts with: the sent checkout over the image's, then the command line.

    python -m refrag_lightning.launch.bootstrap fit --config configs/align.yaml
    python -m refrag_lightning.launch.bootstrap --exec jupyter lab

It is the image's entry point. Without REFRAG_CHECKOUT it only becomes `python -m refrag_lightning`
with the arguments given, or with `--exec` the command that follows. With it, the working folder is
first made to hold what was sent:

1. The tar at REFRAG_CHECKOUT (`s3://bucket/key`) is fetched, with growing pauses between attempts.
2. Its SHA-256 has to be REFRAG_CHECKOUT_SHA256.
3. It is unpacked into a new folder inside the working folder. Names that are absolute or go up,
   anything but files, folders and symbolic links, and links that lead out are refused.
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
trying again cannot help: a wrong hash, an unsafe tar, an address that is none.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

ADDRESS = "REFRAG_CHECKOUT"
SHA256 = "REFRAG_CHECKOUT_SHA256"
# Pauses of 1, 2, 4, ... seconds between attempts, about a minute in all.
ATTEMPTS = 7
# Files that say which packages an image has to have.
_REQUIREMENTS = ("setup.cfg", "constraints.txt", "pyproject.toml")


class CheckoutError(Exception):
    """The checkout is not what was sent, or cannot be: another attempt would fail too."""


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
        CheckoutError: If the address is none, the hash is another, or the tar is unsafe.
        OSError: If it cannot be fetched or put in place; the files are then as they were.
    """
    if len(sha256) != 64:
        raise CheckoutError(f"{SHA256} has to be the SHA-256 of {address}, not {sha256!r}")
    if os.path.lexists(folder / ".git"):
        raise CheckoutError(
            f"{folder} is a git checkout, and files would be replaced; unset {ADDRESS}"
        )
    data = fetch(address)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckoutError(f"{address} has SHA-256 {found}, not {sha256}: refused")
    before = _requirements(folder)
    num_files = overlay(data, folder)
    _tell(f"{num_files} files of {address} are in {folder}")
    changed = [name for name, text in _requirements(folder).items() if before.get(name) != text]
    if before and changed:
        _tell(f"{', '.join(changed)} differs from the image's: the packages are still the image's")


def fetch(address: str) -> bytes:
    """The object at an address, tried several times.

    Args:
        address: `s3://bucket/key`.

    Raises:
        CheckoutError: If the address is none, or S3 says that there is no such object or no right
            to read it.
        OSError: If the last attempt failed.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise CheckoutError(f"{ADDRESS} has to be s3://bucket/key, not {address!r}")

    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _client(boto3).get_object(Bucket=bucket, Key=key)["Body"].read()
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


def overlay(data: bytes, folder: Path) -> int:
    """Unpacks a tar and puts its files in the place of a folder's.

    Args:
        data: The gzipped tar.
        folder: The folder. Its top-level folders that the tar has too lose every other file.

    Returns:
        The number of files and symbolic links.

    Raises:
        CheckoutError: If the tar is unsafe or broken.
        OSError: If a file cannot be put in place. Its files are then as they were.
    """
    # On the folder's own disk, so that files move by renaming.
    work = Path(tempfile.mkdtemp(prefix=".checkout-", dir=folder))
    try:
        names = _unpack(data, work / "new")
        _swap(folder, work / "new", work / "old", names)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(names)


def _unpack(data: bytes, to: Path) -> list[str]:
    """Unpacks a tar, and returns the names of its files and links."""
    if not hasattr(tarfile, "data_filter"):
        raise CheckoutError("this Python cannot unpack safely: it needs 3.10.12, 3.11.4 or later")
    names = []
    to.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            members = tar.getmembers()
            for member in members:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise CheckoutError(f"the checkout has an unsafe name: {member.name!r}")
                if not (member.isreg() or member.issym() or member.isdir()):
                    raise CheckoutError(f"the checkout has a special file: {member.name!r}")
                if not member.isdir():
                    names.append(member.name)
            tar.extractall(to, members=members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise CheckoutError(f"the checkout cannot be unpacked: {error}") from None
    return names


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
    print(f"bootstrap: {message}", file=sys.stderr, flush=True)


def _fail(message: str, *, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
