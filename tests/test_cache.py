from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_lightning.cache import build_folder, cache_dir, weights_digest


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("REFRAG_CACHE", "/some/where")
    assert cache_dir() == Path("/some/where")
    monkeypatch.delenv("REFRAG_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "refrag_lightning"


def test_build_folder_writes_once(tmp_path):
    folder = tmp_path / "deep" / "folder"

    def write(part: Path) -> None:
        assert not folder.exists()
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("x")
        (part / "sub" / "file").chmod(0o600)

    assert build_folder(folder, write) is True
    assert (folder / "sub" / "file").read_text() == "x"
    assert (folder / "sub" / "file").stat().st_mode & 0o044 == 0o044
    assert build_folder(folder, write) is False
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["folder"]


def test_build_folder_leaves_nothing_when_the_writer_raises(tmp_path):
    def write(part: Path) -> None:
        (part / "file").write_text("x")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        build_folder(tmp_path / "folder", write)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_build_folder_replaces_an_incomplete_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("x")
    build_folder(
        folder,
        lambda part: (part / "new").touch(),
        is_complete=lambda path: (path / "new").exists(),
    )
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["folder"]


_BUILD = """
import os, signal, sys, time
from pathlib import Path
from refrag_lightning import cache

def write(part):
    (part / "file").write_text("x" * 1000)
    if sys.argv[2] == "write":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "slow":
        time.sleep(0.3)

if sys.argv[2] == "sync":
    cache._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
print(cache.build_folder(Path(sys.argv[1]), write))
"""


def _build(folder: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(folder), mode], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("where", ["write", "sync"])
def test_a_killed_writer_leaves_no_folder_and_is_cleaned_up_after(tmp_path, where):
    folder = tmp_path / "folder"
    assert _build(folder, where).wait() == -signal.SIGKILL
    assert not folder.exists()
    assert (tmp_path / ".folder.part" / "file").exists()  # what the next writer has to remove

    done = _build(folder, "whole")
    assert done.communicate()[0].strip() == "True"
    assert (folder / "file").read_text() == "x" * 1000
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["folder"]


def test_of_two_writers_at_once_one_writes(tmp_path):
    both = [_build(tmp_path / "folder", "slow") for _ in range(2)]
    answers = sorted(process.communicate()[0].strip() for process in both)
    assert answers == ["False", "True"]


def test_weights_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    lines = "".join(
        f"{name}.safetensors\0{hashlib.sha256(content).hexdigest()}\n"
        for name, content in (("a", b"one"), ("b", b"two"))
    )
    expected = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    assert weights_digest(tmp_path) == expected

    (tmp_path / "config.json").write_text('{"edited": true}')
    assert weights_digest(tmp_path) == expected

    status = (tmp_path / "a.safetensors").stat()
    (tmp_path / "a.safetensors").write_bytes(b"One")
    os.utime(tmp_path / "a.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_digest(tmp_path) != expected  # same size and time, another content

    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert weights_digest(tmp_path) == expected
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert weights_digest(tmp_path) != expected


def test_weights_digest_needs_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        weights_digest(tmp_path)
