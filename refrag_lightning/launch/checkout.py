"""A git checkout as one tar, the same bytes for the same files, kept in S3 under its hash.

In the tar is what git tracks or would track: the index and the untracked files that no ignore rule
names, as they lie on the disk now, without what was deleted; submodules and repositories inside the
checkout are listed in the same way, by themselves. Nothing that git ignores gets in, so no models,
runs or environments. Owners, times and the order of listing are left out of the tar, so that an
unchanged checkout has the same hash tomorrow and is not uploaded again. (Another version of zlib
may compress to other bytes; that costs one more upload.)
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from refrag_lightning.git_state import checkout_state
from refrag_lightning.launch.batch_secrets import file_secrets

MAX_FILE_MB = 50.0
_NEW = timedelta(days=7)
# What tells this project's checkouts from others; the job runs it.
_BOOTSTRAP = "refrag_lightning/launch/bootstrap.py"
# Set inside git's hooks, these would send git to another repository than the folder's own.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


@dataclass(frozen=True)
class Checkout:
    """A packed checkout.

    Attributes:
        data: The gzipped tar.
        sha256: Its SHA-256, in hexadecimal.
        num_files: Files and symbolic links in it.
        num_bytes: What the files hold together, unpacked.
        largest: What the largest file holds, in bytes.
        commit: The commit it was made from, with `-dirty` where the files differ from it.
    """

    data: bytes
    sha256: str
    num_files: int
    num_bytes: int
    largest: int
    commit: str

    def key(self, prefix: str) -> str:
        """The object's name in the bucket: `<prefix>/<sha256>.tar.gz`."""
        return "/".join(part for part in (prefix.strip("/"), f"{self.sha256}.tar.gz") if part)


def find_root(folder: Path) -> Path:
    """The top of the checkout that `folder` lies in.

    Raises:
        ValueError: If it lies in no git checkout, or in one of another project.
    """
    root = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel")).rstrip("\n"))
    if not (root / _BOOTSTRAP).is_file():
        raise ValueError(f"{root} is no checkout of refrag_lightning: it has no {_BOOTSTRAP}")
    return root


def list_files(root: Path) -> list[str]:
    """What git tracks or would track in a checkout, submodules included.

    Args:
        root: The top of the checkout.

    Returns:
        Paths of files and symbolic links from `root`, sorted by their bytes. A submodule that is
        not checked out has no files.

    Raises:
        ValueError: If `root` is no git checkout.
    """
    out = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files: set[str] = set()
    for name in filter(None, out.split(b"\0")):
        relative = os.fsdecode(name).rstrip("/")
        path = root / relative
        # Below a folder that became a symbolic link, a listed file is gone for git.
        parents = (root / parent for parent in PurePosixPath(relative).parents)
        if any(parent.is_symlink() for parent in parents if parent != root):
            continue
        if path.is_dir() and not path.is_symlink():
            # A submodule, or a repository that nobody added. Without .git, git would answer for the
            # checkout around it.
            if (path / ".git").exists():
                files.update(f"{relative}/{inner}" for inner in list_files(path))
        elif os.path.lexists(path):
            files.add(relative)
    return sorted(files, key=os.fsencode)


def pack(
    root: Path,
    *,
    max_file_mb: float = MAX_FILE_MB,
    secrets: Mapping[str, str] | None = None,
    allowed: Collection[str] = (),
) -> Checkout:
    """Packs a checkout.

    Args:
        root: The top of the checkout.
        max_file_mb: The largest file that may be in it, in MB of 10^6 bytes.
        secrets: Values that no file may hold, by the names to call them in a message.
        allowed: Files that may hold secrets, by their paths from `root`.

    Raises:
        ValueError: If a file is too large, holds a secret or what looks like one, or is a symbolic
            link that leads out of the checkout; if a file of `allowed` is not there; or if there is
            nothing to pack.
    """
    files = list_files(root)
    if not files:
        raise ValueError(f"git knows no files in {root}")
    if missing := sorted(set(allowed) - set(files)):
        raise ValueError(
            f"--send-anyway {missing[0]}: no such file is sent; name it as from {root}"
        )
    _refuse_large(root, files, max_file_mb)
    forbidden = {name: value.encode() for name, value in (secrets or {}).items()}
    sent, found, sizes = set(files), [], []
    buffer = io.BytesIO()
    with (
        # No file name and no time in gzip's header either.
        gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in files:
            member, data = _member(root, name)
            if name not in allowed:
                found += _secrets(root, name, data, forbidden, sent)
            if not found:
                tar.addfile(member, io.BytesIO(data))
                sizes.append(len(data))
    if found:
        _refuse_secrets(found)
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    return Checkout(data, sha256, len(files), sum(sizes), max(sizes), commit(root))


def commit(root: Path) -> str:
    """The checkout's commit, with `-dirty` where files differ from it; `none` if there is none."""
    found = checkout_state(root, untracked=True)
    return "none" if found is None else found.label()


def upload(s3: Any, checkout: Checkout, *, bucket: str, prefix: str) -> bool:
    """Puts a packed checkout into S3, unless it is there and new.

    One of some days ago is put there again: the bucket may delete checkouts by their age, and a job
    may wait long for its machine.

    Args:
        s3: A boto3 client of S3.
        checkout: The packed checkout.
        bucket: The bucket.
        prefix: What the object's name begins with.

    Returns:
        Whether it was uploaded.

    Raises:
        botocore.exceptions.ClientError: If S3 refuses.
    """
    from botocore.exceptions import ClientError

    key = checkout.key(prefix)
    try:
        found = s3.head_object(Bucket=bucket, Key=key)
        if datetime.now(timezone.utc) - found["LastModified"] < _NEW:
            return False
    except ClientError as error:
        # 403: without the right to list the bucket, S3 does not say that an object is missing.
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404):
            raise
    s3.put_object(
        Bucket=bucket,
        Key=key,
        Body=checkout.data,
        ContentType="application/gzip",
        # S3 stores nothing that arrives as other bytes.
        ChecksumSHA256=base64.b64encode(bytes.fromhex(checkout.sha256)).decode(),
    )
    return True


def _refuse_large(root: Path, files: list[str], max_file_mb: float) -> None:
    large = []
    for name in files:
        status = (root / name).lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size > max_file_mb * 1e6:
            large.append(f"{name} ({status.st_size / 1e6:.1f} MB)")
    if large:
        more = f" and {len(large) - 5} more" if len(large) > 5 else ""
        raise ValueError(
            f"larger than {max_file_mb:g} MB: {', '.join(large[:5])}{more}; let .gitignore name "
            "it, or raise --max-file-mb"
        )


def _secrets(
    root: Path, name: str, data: bytes, forbidden: Mapping[str, bytes], sent: Collection[str]
) -> list[tuple[str, str]]:
    """The secrets of a file: where they are (`path:line`) and what they are."""
    place = root / name
    if place.is_symlink():
        # A link by the name of a secret file says what the file that it leads to is.
        target = os.path.relpath(os.path.realpath(place), os.path.realpath(root))
        if target not in sent or not place.is_file():
            return []
        data = place.read_bytes()
    found = [(f"{name}:{line}" if line else name, kind) for line, kind in file_secrets(name, data)]
    for variable, value in forbidden.items():
        if (at := data.find(value)) >= 0:
            line = data.count(b"\n", 0, at) + 1
            found.append((f"{name}:{line}", f"the value of {variable}"))
    return found


def _refuse_secrets(found: list[tuple[str, str]]) -> NoReturn:
    told = ", ".join(f"{place!r} ({kind})" for place, kind in found[:10])
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    raise ValueError(
        f"secrets would be uploaded: {told}{more}; take them out, or let .gitignore name a file "
        "that git does not track; --send-anyway FILE sends a file as it is"
    )


def _member(root: Path, name: str) -> tuple[tarfile.TarInfo, bytes]:
    """A file's entry and contents; those of a symbolic link are where it leads."""
    path = root / name
    mode = path.lstat().st_mode
    member = tarfile.TarInfo(name)
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    if stat.S_ISLNK(mode):
        target = os.readlink(path)
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        if os.path.isabs(target) or not inside:
            raise ValueError(f"the symbolic link {name} leads out of the checkout, to {target}")
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
        return member, b""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is neither a file nor a symbolic link")
    # Read before it is measured: a file that grows meanwhile cannot break the tar.
    data = path.read_bytes()
    member.size, member.mode = len(data), 0o755 if mode & 0o100 else 0o644
    return member, data


def _git(folder: Path, *arguments: str) -> bytes:
    environment = {name: v for name, v in os.environ.items() if name not in _GIT_VARIABLES}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
    except FileNotFoundError:
        raise ValueError("git is not installed, and says what belongs to the checkout") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["git failed"]
        raise ValueError(f"{folder} cannot be read as a git checkout: {said[0]}")
    return done.stdout
