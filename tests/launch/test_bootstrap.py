"""The container's start: fetching, checking and overlaying a checkout, and becoming the command."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from secrets import token_hex

import pytest

from refrag_lightning.launch import bootstrap, checkout
from refrag_lightning.launch.bootstrap import CheckoutError
from tests.launch.conftest import REGION, write
from tests.launch.test_checkout import tree

ROOT = Path(__file__).parents[2]


def tarred(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.fixture
def image(tmp_path):
    """A working folder as an image has it, with an older checkout and things of its own."""
    folder = tmp_path / "workspace"
    write(
        folder,
        {
            "setup.cfg": "[metadata]\n",
            "refrag_lightning/__init__.py": "old",
            "refrag_lightning/old_name.py": "old",
            "refrag_lightning/__pycache__/old_name.pyc": "old",
            "refrag_lightning/gone/deep/a.py": "old",
            "refrag_lightning/was_folder/a.py": "old",
            "refrag_lightning/was_file": "old",
            "refrag_lightning.egg-info/PKG-INFO": "mine",
            "runs/last.ckpt": "mine",
        },
    )
    (folder / "refrag_lightning" / "was_link").symlink_to("gone")
    (folder / "was_top_folder").mkdir()
    (folder / "was_top_folder" / "a.py").write_text("old")
    return folder


NEW = tarred(
    ("refrag_lightning/__init__.py", b"new"),
    ("refrag_lightning/new_name.py", b"new"),
    ("refrag_lightning/was_folder", b"new"),
    ("refrag_lightning/was_file/a.py", b"new"),
    ("refrag_lightning/was_link/a.py", b"new"),
    special("refrag_lightning/link", tarfile.SYMTYPE, "new_name.py"),
    ("was_top_folder", b"new"),
    ("added/a.py", b"new"),
)


def test_the_folders_of_the_checkout_become_the_checkout_s_and_others_stay(image):
    assert bootstrap.overlay(NEW, image) == 8
    assert tree(image) == {
        "setup.cfg": b"[metadata]\n",
        "refrag_lightning/__init__.py": b"new",
        "refrag_lightning/new_name.py": b"new",
        "refrag_lightning/was_folder": b"new",
        "refrag_lightning/was_file/a.py": b"new",
        "refrag_lightning/was_link/a.py": b"new",
        "refrag_lightning/link": "new_name.py",
        "was_top_folder": b"new",
        "added/a.py": b"new",
        "refrag_lightning.egg-info/PKG-INFO": b"mine",
        "runs/last.ckpt": b"mine",
    }
    assert not (image / "refrag_lightning" / "gone").exists(), "nor an empty folder"
    assert sorted(path.name for path in image.iterdir()) == [
        "added",
        "refrag_lightning",
        "refrag_lightning.egg-info",
        "runs",
        "setup.cfg",
        "was_top_folder",
    ]


def test_a_packed_checkout_overlays_to_the_checkout(repository, image):
    (repository / "configs" / "link").symlink_to("align.yaml")
    packed = checkout.pack(repository)
    bootstrap.overlay(packed.data, image)
    names = checkout.list_files(repository)
    mine = {name: text for name, text in tree(repository).items() if name in names}
    left = {name: text for name, text in tree(image).items() if text not in (b"mine", b"old")}
    assert left == mine


def test_mounts_inside_are_left_alone(image, monkeypatch):
    mount = image / "refrag_lightning" / "gone"
    monkeypatch.setattr(bootstrap.os.path, "ismount", lambda path: Path(path) == mount)
    bootstrap.overlay(NEW, image)
    assert (mount / "deep" / "a.py").read_text() == "old"
    assert not (image / "refrag_lightning" / "old_name.py").exists()


def test_a_failure_at_any_step_leaves_what_was_there(image, monkeypatch):
    before = tree(image)
    replace, left = os.replace, 0

    def fail_later(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(bootstrap.os, "replace", fail_later)
    steps = 0
    while True:
        steps += 1
        left = steps
        try:
            bootstrap.overlay(NEW, image)
        except OSError:
            assert tree(image) == before
            assert not list(image.glob(".checkout-*"))
        else:
            break
    # 8 files and links of the image have to go (setup.cfg stays), and 8 come.
    assert steps == 8 + 8 + 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tarred(("/etc/passwd", b"")), "unsafe name: '/etc/passwd'"),
        (tarred(("a/../../b", b"")), "unsafe name: 'a/../../b'"),
        (tarred(special("a", tarfile.SYMTYPE, "../b")), "cannot be unpacked: .*outside"),
        (tarred(special("a", tarfile.SYMTYPE, "/etc")), "cannot be unpacked: .*absolute"),
        (tarred(("b", b"1"), special("a", tarfile.LNKTYPE, "b")), "special file: 'a'"),
        (tarred(special("a", tarfile.FIFOTYPE)), "special file: 'a'"),
        (tarred(special("a", tarfile.CHRTYPE)), "special file: 'a'"),
        (NEW[: len(NEW) // 2], "cannot be unpacked"),
        (b"not a tar", "cannot be unpacked"),
    ],
    # A tar holds its time: it would name the tests anew in each process.
    ids=[
        "root",
        "above",
        "link above",
        "link to root",
        "hard link",
        "fifo",
        "device",
        "half",
        "no tar",
    ],
)
def test_an_unsafe_or_broken_tar_changes_nothing(image, data, message):
    before = tree(image)
    with pytest.raises(CheckoutError, match=message):
        bootstrap.overlay(data, image)
    assert tree(image) == before
    assert not list(image.glob(".checkout-*"))


def raw(*headers: bytes) -> bytes:
    """A gzipped tar of headers as they are, and its end."""
    return gzip.compress(b"".join(headers) + bytes(1024))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tarred(("a", b"1"), ("a", b"2")), "has 'a' twice"),
        (tarred(("a/b", b"1"), ("./a//b", b"2")), "has './a//b' twice"),
        (tarred(("a", b"1"), special("a", tarfile.SYMTYPE, "b")), "has 'a' twice"),
        (tarred(("a", b"1"), special("a", tarfile.DIRTYPE)), "has 'a' twice"),
        (tarred(("a", b"1"), ("a/b", b"2")), "has 'a/b' below 'a', which is not a folder"),
        (tarred(special("a", tarfile.SYMTYPE, "b"), ("a/c/d", b"")), "has 'a/c/d' below 'a'"),
        (tarred((".", b"1")), "unsafe name: '.'"),
        (tarred(("a" * 300, b"1")), "a name that is too long"),
        (tarred(("/".join(["a" * 200] * 20), b"1")), "a name that is too long"),
        (tarred(special("a", tarfile.SYMTYPE)), "unsafe link: 'a'"),
        (tarred(), "has no files"),
        (tarred(special("a", tarfile.DIRTYPE)), "has no files"),
        (NEW[:40] + bytes(40) + NEW[80:], "cannot be unpacked"),
        (raw(header("a", -(2**40))), "cannot be unpacked"),
        # What a header says of the next one is read into memory, however much it claims to be.
        (raw(header("a", 2**40, tarfile.XHDTYPE)), "a header of more than"),
        (raw(header("a", 2**40, tarfile.GNUTYPE_LONGNAME)), "a header of more than"),
        (raw(*[header("a", 0, tarfile.XHDTYPE)] * 3000), "a header of more|cannot be unpacked"),
    ],
    ids=range(17),
)
def test_a_broken_archive_is_a_failure_that_is_not_tried_again(image, data, message):
    before = tree(image)
    with pytest.raises(CheckoutError, match=message):
        bootstrap.overlay(data, image)
    assert tree(image) == before
    assert not list(image.glob(".checkout-*"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_files": 7}, "has more than 7 files; the variable REFRAG_CHECKOUT_MAX_FILES sets"),
        ({"max_mb": 20e-6}, r"holds more than 2e-05 MB; the variable REFRAG_CHECKOUT_MAX_MB sets"),
        ({"max_file_mb": 2e-6}, r"a file of more than 2e-06 MB; .* REFRAG_CHECKOUT_MAX_FILE_MB"),
    ],
)
def test_a_checkout_above_the_limits_is_refused_before_anything_is_written(
    image, monkeypatch, limits, message
):
    monkeypatch.setattr(bootstrap.tempfile, "mkdtemp", None)
    with pytest.raises(CheckoutError, match=message):
        bootstrap.overlay(NEW, image, bootstrap.Limits(**limits))
    monkeypatch.undo()
    # NEW has 8 files and links, 21 bytes in all, 3 at most in one.
    assert bootstrap.overlay(NEW, image, bootstrap.Limits(21e-6, 3e-6, 8)) == 8


def test_a_bomb_costs_neither_time_nor_memory(image):
    # 10 GB of zeros, of which the first MB are there: the header alone is believed.
    bomb = raw(header("a", 10**10), bytes(10**6))
    with pytest.raises(CheckoutError, match="a file of more than 1000 MB"):
        bootstrap.overlay(bomb, image)
    many = gzip.compress(b"".join(header(str(number), 0) for number in range(3000)) + bytes(1024))
    with pytest.raises(CheckoutError, match="more than 2000 files"):
        bootstrap.overlay(many, image, bootstrap.Limits(max_files=2000))


def test_limits_are_set_by_variables():
    variables = {"REFRAG_CHECKOUT_MAX_MB": "10.5", "REFRAG_CHECKOUT_MAX_FILES": "7"}
    assert bootstrap.Limits.of(variables) == bootstrap.Limits(max_mb=10.5, max_files=7)
    assert bootstrap.Limits.of({}) == bootstrap.DEFAULT_LIMITS
    for text in ("", "0", "-1", "nan", "inf", "1e9", "much"):
        with pytest.raises(ValueError, match="REFRAG_CHECKOUT_MAX_FILE_MB has to be a positive"):
            bootstrap.Limits.of({"REFRAG_CHECKOUT_MAX_FILE_MB": text})


def test_a_working_checkout_is_not_overlaid(repository, monkeypatch):
    monkeypatch.setattr(bootstrap, "fetch", lambda address, limits: NEW)
    with pytest.raises(CheckoutError, match="is a git checkout"):
        bootstrap.prepare("s3://bucket/k", hashlib.sha256(NEW).hexdigest(), repository)


def test_other_requirements_than_the_image_s_are_told(image, monkeypatch, capsys):
    changed = tarred(("setup.cfg", b"[metadata]\nname = x\n"), ("a.py", b""))
    for data, told in ((NEW, False), (changed, True)):
        monkeypatch.setattr(bootstrap, "fetch", lambda address, limits, data=data: data)
        bootstrap.prepare("s3://bucket/k", hashlib.sha256(data).hexdigest(), image)
        assert ("setup.cfg differs from the image's" in capsys.readouterr().err) is told


class FakeS3:
    """An S3 whose first answers are errors."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.asked: list[dict[str, str]] = []

    def get_object(self, **which):
        self.asked.append(which)
        if self.errors:
            raise self.errors.pop(0)
        return {"Body": io.BytesIO(b"data")}


@pytest.fixture
def s3(monkeypatch):
    fake, pauses = FakeS3([]), []
    monkeypatch.setattr(bootstrap, "_client", lambda boto3: fake)
    monkeypatch.setattr(bootstrap.time, "sleep", pauses.append)
    fake.pauses = pauses
    return fake


def refusal(status: int, code: str) -> Exception:
    from botocore.exceptions import ClientError

    said = {"Error": {"Code": code, "Message": "no"}}
    return ClientError(said | {"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def test_fetching_is_tried_again_with_growing_pauses(s3, capsys):
    from botocore.exceptions import (
        EndpointConnectionError,
        IncompleteReadError,
        NoCredentialsError,
    )

    s3.errors = [
        EndpointConnectionError(endpoint_url="x"),
        refusal(503, "SlowDown"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        ConnectionResetError("reset"),
        # The role's credentials may come a moment after the container.
        NoCredentialsError(),
    ]
    assert bootstrap.fetch("s3://bucket/a/key.tar.gz") == b"data"
    assert s3.pauses == [1, 2, 4, 8, 16]
    assert s3.asked == [{"Bucket": "bucket", "Key": "a/key.tar.gz"}] * 6
    assert "SlowDown" in capsys.readouterr().err


def test_fetching_ends_at_some_time_and_at_once_where_waiting_cannot_help(s3):
    s3.errors = [refusal(500, "InternalError") for _ in range(bootstrap.ATTEMPTS)]
    with pytest.raises(OSError, match=r"fetched in 7 attempts: .*InternalError"):
        bootstrap.fetch("s3://bucket/key")
    assert s3.pauses == [1, 2, 4, 8, 16, 32]
    for status, code in ((404, "NoSuchKey"), (403, "AccessDenied")):
        s3.errors, s3.pauses[:] = [refusal(status, code)], []
        with pytest.raises(CheckoutError, match=f"s3://bucket/key: {code}: no"):
            bootstrap.fetch("s3://bucket/key")
        assert s3.pauses == []
    for address in ("https://bucket/key", "s3://bucket", "s3:///key", "key"):
        with pytest.raises(CheckoutError, match="has to be s3://bucket/key"):
            bootstrap.fetch(address)
    for address in ("s3://../key", "s3://-b/key", "s3://bucket/../key", "s3://bucket/a//b"):
        with pytest.raises(CheckoutError, match=r"REFRAG_CHECKOUT: .* is not"):
            bootstrap.fetch(address)


def test_an_object_above_the_limit_is_not_read(s3, monkeypatch):
    body = io.BytesIO(b"data")
    monkeypatch.setattr(s3, "get_object", lambda **_: {"Body": body, "ContentLength": 5 * 10**9})
    with pytest.raises(CheckoutError, match="holds more than 4000 MB"):
        bootstrap.fetch("s3://bucket/key")
    assert body.tell() == 0


class ReplacedError(Exception):
    """The process would have become another."""


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["fit", "--config", "a b"],
            [sys.executable, "-m", "refrag_lightning", "fit", "--config", "a b"],
        ),
        (["--", "--help"], [sys.executable, "-m", "refrag_lightning", "--help"]),
        (["--exec", "jupyter", "lab"], ["jupyter", "lab"]),
    ],
)
def test_without_a_checkout_it_only_becomes_the_command(monkeypatch, words, command):
    def replace(file, arguments):
        raise ReplacedError(file, arguments)

    monkeypatch.delenv(bootstrap.ADDRESS, raising=False)
    monkeypatch.setattr(bootstrap.os, "execvp", replace)
    with pytest.raises(ReplacedError) as caught:
        bootstrap.main(words)
    assert caught.value.args == (command[0], command)


def test_what_cannot_be_run_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv(bootstrap.ADDRESS, raising=False)
    for words, code, message in (
        (["--exec"], 2, "error: --exec needs a command\n"),
        (["--exec", "no-such-program"], 127, "error: no-such-program: No such file or directory\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            bootstrap.main(words)
        assert caught.value.code == code
        assert capsys.readouterr().err == message


def test_it_imports_nothing_heavy():
    code = (
        "import sys, refrag_lightning.launch.bootstrap; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    heavy = {"torch", "lightning", "transformers", "numpy", "boto3", "botocore", "jsonargparse"}
    assert not heavy & set(loaded.stdout.split())


def test_a_signal_reaches_the_command(tmp_path):
    code = (
        "import signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(43)); "
        "print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-m", "refrag_lightning.launch.bootstrap", "--exec"]
    environment = {k: v for k, v in os.environ.items() if k != bootstrap.ADDRESS}
    with subprocess.Popen(
        [*command, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 43


@pytest.fixture(scope="module")
def server():
    """moto's S3 behind an address, as a process of another kind sees it."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def stored(server, aws_environment, tmp_path):
    """This project's package in S3, with a mark in what `--help` prints."""
    import boto3

    source = tmp_path / "source"
    names = [name for name in checkout.list_files(ROOT) if name.startswith("refrag_lightning/")]
    for name in names:
        write(source, {name: (ROOT / name).read_text(encoding="utf-8")})
    cli = source / "refrag_lightning" / "cli.py"
    cli.write_text(cli.read_text().replace("usage: python", "THE SENT CHECKOUT: python"))
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    packed = checkout.pack(source)
    s3 = boto3.client("s3", region_name=REGION, endpoint_url=server)
    bucket = f"bucket-{token_hex(8)}"
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    checkout.upload(s3, packed, bucket=bucket, prefix="checkouts")
    return packed, f"s3://{bucket}/{packed.key('checkouts')}"


def start(server: str, folder: Path, address: str, sha256: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": server,
        "AWS_DEFAULT_REGION": REGION,
        "WANDB_API_KEY": "a-secret-of-the-job",
        # The image's package, installed in editable mode.
        "PYTHONPATH": str(ROOT),
        bootstrap.ADDRESS: address,
        bootstrap.SHA256: sha256,
    }
    folder.mkdir()
    command = [sys.executable, "-m", "refrag_lightning.launch.bootstrap", "--help"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "a-secret-of-the-job" not in done.stdout + done.stderr
    return done


def test_in_a_clean_folder_it_starts_the_sent_command_line(server, stored, tmp_path):
    packed, address = stored
    done = start(server, tmp_path / "clean", address, packed.sha256)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"bootstrap: {packed.num_files} files of {address} are in ")
    assert done.stdout.startswith("THE SENT CHECKOUT: python -m refrag_lightning SUBCOMMAND")
    found = {name: text for name, text in tree(tmp_path / "clean").items() if ".pyc" not in name}
    sent = tree(tmp_path / "source")
    assert found == {name: text for name, text in sent.items() if not name.startswith(".git/")}


def test_a_wrong_hash_is_refused(server, stored, tmp_path):
    packed, address = stored
    wrong = "0" * 64
    done = start(server, tmp_path / "clean", address, wrong)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"error: {address} has SHA-256 {packed.sha256}, not {wrong}: refused\n")
    assert list((tmp_path / "clean").iterdir()) == []
    done = start(server, tmp_path / "none", address.replace("checkouts", "x"), packed.sha256)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "NoSuchKey" in done.stderr
