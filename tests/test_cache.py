from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from refrag_lightning import cache
from refrag_lightning.cache import (
    Process,
    build_folder,
    cache_dir,
    replace_file,
    replace_folder,
    sole_writer,
    take_away_leftovers,
    weights_digest,
    write_text,
)


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
    (part,) = tmp_path.glob(".folder.*.partial")  # what the next writer has to remove
    assert (part / "file").exists()

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


# Files and folders that take the place of others


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another_and_keeps_its_mode(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path)
    path.chmod(0o640)
    with replace_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(KeyboardInterrupt), replace_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and names(tmp_path) == ["report.md"]


def _umask(tmp_path: Path) -> int:
    """The process's umask, from what a folder gets; asking the system would set it."""
    probe = tmp_path / "probe"
    probe.mkdir()
    mode = probe.stat().st_mode
    probe.rmdir()
    return ~mode & 0o777


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_ordinary_ones_and_the_umask_is_not_touched(tmp_path, umask):
    """safetensors writes files for their owner alone."""
    code = (
        "import os, sys\n"
        f"os.umask({umask})\n"
        "os.umask = None\n"
        "from refrag_lightning.cache import replace_folder\n"
        "with replace_folder(sys.argv[1]) as part:\n"
        "    (part / 'sub').mkdir()\n"
        "    (part / 'sub' / 'weights').touch(0o600)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
    modes = [(tmp_path / "model" / name).stat().st_mode & 0o777 for name in (".", "sub/weights")]
    assert modes == [0o777 & ~umask, 0o666 & ~umask]


def test_links_are_followed(tmp_path):
    for name in ("file", "folder"):
        (tmp_path / f"{name}-link").symlink_to(name)
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "file-link", "x")
    with replace_folder(tmp_path / "folder-link") as part:
        (part / "inside").touch()
    assert (tmp_path / "file").read_text() == "x" and names(tmp_path / "folder") == ["inside"]
    assert (tmp_path / "file-link").is_symlink() and (tmp_path / "folder-link").is_symlink()


def test_what_is_no_ordinary_file_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through the pipe")
    reader.join()
    assert got == ["through the pipe"] and (tmp_path / "pipe").is_fifo()
    write_text("/dev/null", "nowhere")
    assert Path("/dev/null").is_char_device()
    code = "from refrag_lightning.cache import write_text; write_text('/dev/stdout', 'out')"
    for kind in ("pipe", "file"):
        with (tmp_path / "out").open("w+") as file:
            target = subprocess.PIPE if kind == "pipe" else file
            done = subprocess.run([sys.executable, "-c", code], stdout=target, text=True)
            assert done.returncode == 0
        assert (done.stdout or (tmp_path / "out").read_text()) == "out"


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    for path in (tmp_path / "nowhere" / "file", tmp_path):
        with pytest.raises(OSError) as error:
            write_text(path, "x")
        assert error.value.filename == str(path)
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match="file is a file"),
        replace_folder(tmp_path / "file"),
    ):
        pass
    assert names(tmp_path) == ["file"]


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("n" * 255, "é" * 127, "文" * 85):
        for _ in range(2):
            write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len(names(tmp_path)) == 3


def test_a_folder_takes_over_what_it_is_told_to_keep(tmp_path):
    place = tmp_path / "model"
    for name in ("weights", "notes", "sub/deep"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("old")
    (place / "link").symlink_to("nowhere")
    os.mkfifo(place / "pipe")
    with replace_folder(place, keep=lambda name: name != "weights") as part:
        (part / "notes").write_text("new")
        # A writer within a writer writes to the same folder.
        with replace_folder(part) as inner:
            assert inner == part
        write_text(part / "file", "x")
        assert not [name for name in names(part) if name.startswith(".")]
    assert names(place) == ["file", "link", "notes", "pipe", "sub"]
    assert [(place / name).read_text() for name in ("notes", "sub/deep")] == ["new", "old"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a file system that cannot
        monkeypatch.setattr(cache, "_exchange", lambda first, second: False)
    for number in range(3):
        with replace_folder(tmp_path / "model") as part:
            (part / str(number)).touch()
        assert names(tmp_path / "model") == [str(number)] and names(tmp_path) == ["model"]


_REPLACE = """
import os, signal, sys
from pathlib import Path
from refrag_lightning import cache

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

place, kind, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if where == "writing":
    cache._sync = die
if where in ("between", "removing"):
    exchange = cache._exchange
    cache._exchange = lambda *names: where == "removing" and exchange(*names)
    rename = Path.rename
    Path.rename = lambda self, to: die() if cache._OWNED.search(str(self)) else rename(self, to)
    cache.remove = die
if kind == "file":
    if where != "writing":
        os.replace = lambda *names: die()
    cache.write_text(place, "new" * 10_000)
else:
    with cache.replace_folder(place) as part:
        (part / "a").write_text("new")
        (part / "b").write_text("new")
"""


@pytest.mark.parametrize("where", ["writing", "between", "removing"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_or_the_new_and_the_next_one_cleans_up(
    tmp_path, kind, where
):
    place = tmp_path / "place"

    def write(text: str) -> None:
        if kind == "file":
            write_text(place, text)
            return
        with replace_folder(place) as part:
            for name in ("a", "b"):
                (part / name).write_text(text)

    def read() -> set[str]:
        return {p.read_text() for p in ([place] if kind == "file" else place.iterdir())}

    write("old")
    command = [sys.executable, "-c", _REPLACE, str(place), kind, where]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) > 1 or (where == "removing" and kind == "file")
    take_away_leftovers(place)  # as whoever reads a folder that is not there
    assert read() == ({"new"} if (kind, where) == ("folder", "removing") else {"old"})
    write("newer")
    assert read() == {"newer"} and names(tmp_path) == ["place"]


def test_only_what_dead_writers_of_the_same_place_left_goes(tmp_path):
    me = Process.current()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [
        f".a.{me.host}-{dead.pid}-1-0000.partial",
        # Its number was given to another process since.
        f".a.{me.host}-{me.pid}-{me.started - 1}-0000.partial",
        f".a.0123abcd-{me.pid}-{me.started}-0000.partial",
    ]
    stays = [
        "a",
        f".a.{me.host}-{me.pid}-{me.started}-0000.partial",
        f".a.b.{me.host}-{dead.pid}-1-0000.partial",
        f".a.b.{me.host}-{dead.pid}-1-0000.old",
        ".a.0123abcd-1-1-0001.partial",  # on another machine, and not old
        ".a.partial",
        f"{me.host}-{dead.pid}-1-0000.partial",
        ".a.lock",
    ]
    for name in gone + stays:
        (tmp_path / name).touch()
    long_ago = time.time() - cache._ABANDONED - 1
    os.utime(tmp_path / gone[2], (long_ago, long_ago))
    take_away_leftovers(tmp_path / "a")
    assert names(tmp_path) == sorted(stays)
    take_away_leftovers(tmp_path / "nowhere" / "a")


def test_sigkill_at_random_moments_tears_nothing(tmp_path):
    """A file and a folder that are written again and again, by one process after another."""
    code = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from refrag_lightning.cache import replace_folder, write_text\n"
        "print('ready', flush=True)\n"
        "for number in itertools.count():\n"
        "    text = f'{number}\\n' * 20_000\n"
        "    write_text(Path(sys.argv[1]) / 'file', text)\n"
        "    with replace_folder(Path(sys.argv[1]) / 'folder') as part:\n"
        "        for name in 'abc':\n"
        "            (part / name).write_text(text)\n"
    )
    chosen = random.Random(0)
    for turn in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(chosen.uniform(0.02, 0.2))
            process.kill()
        if turn:
            files = [tmp_path / "file", *(tmp_path / "folder" / name for name in "abc")]
            lines = [path.read_text().splitlines() for path in files]
            assert all(len(each) == 20_000 and len(set(each)) == 1 for each in lines)
            assert lines[1] == lines[2] == lines[3]
    for name in ("file", "folder"):
        take_away_leftovers(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]


# Who writes

_HOLD = """
import sys
from pathlib import Path
from refrag_lightning.cache import sole_writer
with sole_writer(Path(sys.argv[1]), advice="wait"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def hold(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "run", advice="wait for its end"):
        (entry,) = tmp_path.glob(".run.lock")
        assert json.loads(entry.read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path, holder):
    with pytest.raises(OSError, match=f"run is being written by process {holder.pid} on ") as error:
        hold(tmp_path)
    assert str(error.value).endswith("; wait for its end") and "\n" not in str(error.value)
    holder.communicate("\n")
    hold(tmp_path)


def test_a_copy_of_what_is_held_is_free(tmp_path, holder):
    shutil.copytree(tmp_path, tmp_path / "copy")
    with sole_writer(tmp_path / "copy" / "run", advice="wait"):
        pass
    # The same place under another name is not.
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        pytest.raises(OSError, match=f"process {holder.pid}"),
        sole_writer(tmp_path / "link" / "run", advice="wait"),
    ):
        pass


def test_after_a_kill_the_next_writer_begins_at_once(tmp_path, holder):
    holder.kill()
    # Not waited for: a killed process keeps its number until its parent asks for it.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    begun = time.monotonic()
    hold(tmp_path)
    assert time.monotonic() - begun < 2


def test_a_lock_that_was_cut_short_is_free(tmp_path):
    for text in ("", '{"host": "0123', "[]", "null"):
        (tmp_path / ".run.lock").write_text(text)
        hold(tmp_path)


def test_a_writer_on_another_machine_counts_while_it_shows_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BEAT", 0.05)
    monkeypatch.setattr(cache, "_PATIENCE", 0.5)
    entry = {"host": "0123abcd", "pid": 7, "started": 1, "machine": "other", "since": "noon"}
    path = tmp_path / ".run.lock"
    path.write_text(json.dumps(entry))
    ended = threading.Event()
    there = Process("0123abcd", 7, 1)
    thread = threading.Thread(target=cache._touch, args=(path, there, ended))
    thread.start()
    with pytest.raises(OSError, match="written by process 7 on other since noon"):
        hold(tmp_path)
    ended.set()
    thread.join()
    hold(tmp_path)


def test_of_many_that_find_a_dead_holder_one_takes_its_place(tmp_path):
    code = _HOLD.replace("sys.stdin.readline()", "import time; time.sleep(2)")
    entry = {**vars(Process.current()), "started": 1, "machine": "here", "since": "noon"}
    (tmp_path / ".run.lock").write_text(json.dumps(entry))
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in many]
    assert sorted(process.returncode for process in many) == [0, 1, 1, 1]
    assert sorted(outputs) == ["", "", "", "held\n"]
