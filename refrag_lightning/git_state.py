"""Which commit a run was started from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

COMMIT_VARIABLE = "GIT_COMMIT"
"""Says the commit where there is no checkout, with `-dirty` behind it if it had been changed."""


class GitState(NamedTuple):
    """A checkout.

    Attributes:
        commit: The commit's hash.
        dirty: Whether files that git tracks differ from it.
        remote: Where `origin` lies, without user and password; "" if there is none.
    """

    commit: str
    dirty: bool
    remote: str

    def label(self, digits: int | None = None) -> str:
        """The commit, or its first digits, with `-dirty` where files differ from it."""
        return self.commit[:digits] + ("-dirty" if self.dirty else "")


def git_state(folder: str | Path | None = None) -> GitState | None:
    """The checkout that a folder is in, or what the environment says of it; None if nothing does.

    Args:
        folder: The folder; this package's by default, and then the current one.
    """
    folders = [Path(folder)] if folder else [Path(__file__).parent, Path.cwd()]
    for place in folders:
        found = checkout_state(place)
        if found is not None:
            return found
    told = os.environ.get(COMMIT_VARIABLE, "")
    return GitState(told.removesuffix("-dirty"), told.endswith("-dirty"), "") if told else None


def checkout_state(folder: Path, *, untracked: bool = False) -> GitState | None:
    """The checkout that a folder is in; None if it is in none, or there is no commit yet.

    Args:
        folder: The folder.
        untracked: Whether files that nobody added make it dirty.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    files = "normal" if untracked else "no"
    changed = _git(folder, "status", "--porcelain", f"--untracked-files={files}")
    remote = _git(folder, "config", "--get", "remote.origin.url") or ""
    return GitState(commit, bool(changed), without_credentials(remote))


def without_credentials(url: str) -> str:
    """An address without the user, password, query and fragment that it may have."""
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _git(folder: Path, *words: str) -> str | None:
    # What git exports to its hooks would point it to another checkout.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
