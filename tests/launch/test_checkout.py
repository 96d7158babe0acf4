"""Packing a checkout: what is in it, the same bytes every time, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from refrag_lightning.launch.batch_secrets import file_secrets
from refrag_lightning.launch.checkout import commit, find_root, list_files, pack, upload
from tests.launch.conftest import REGION, git, write

ROOT = Path(__file__).parents[2]


def unpack(data: bytes, to: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(to, filter="fully_trusted")
    return to


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by path."""
    found: dict[str, bytes | str] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.readlink(path)
            elif path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_everything_that_git_would_track_is_in_it_and_nothing_else(repository, tmp_path):
    write(repository, {"gone.py": "1", "moved/a.py": "2", "changed.py": "old", "scripts/go": "3"})
    (repository / "scripts" / "go").chmod(0o755)
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    (repository / "gone.py").unlink()
    # A folder that became a link: git no longer has what was below it.
    shutil.move(repository / "moved", repository / "pläce")
    (repository / "moved").symlink_to("pläce")
    write(repository, {"changed.py": "new", "new/file.txt": "4", "x.log": "5", "runs/m.bin": "6"})
    other = tmp_path / "other"
    write(other, {"inner.py": "7", "deep/inner.py": "8", ".gitignore": "no.txt\n"})
    git(other.parent, "init", "-q", str(other))
    git(other, "add", "-A")
    git(other, "commit", "-qm", "other")
    git(repository, "submodule", "--quiet", "add", str(other), "sub")
    write(repository, {"sub/untracked.py": "9", "sub/no.txt": "10"})
    # A repository that nobody added: git would not look into it, but knows that it is there.
    shutil.copytree(other, repository / "nested")

    packed = pack(repository)
    found = tree(unpack(packed.data, tmp_path / "unpacked"))
    submodule = {
        f"{top}/{name}": text
        for top in ("sub", "nested")
        for name, text in (
            ("inner.py", b"7"),
            ("deep/inner.py", b"8"),
            (".gitignore", b"no.txt\n"),
        )
    }
    expected = {
        ".gitignore": b"*.log\nruns/\n",
        ".gitmodules": (repository / ".gitmodules").read_bytes(),
        "setup.cfg": b"[metadata]\n",
        "refrag_lightning/__init__.py": b"",
        "refrag_lightning/launch/bootstrap.py": b"print('boot')\n",
        "configs/align.yaml": b"seed: 1\n",
        "moved": "pläce",
        "pläce/a.py": b"2",
        "changed.py": b"new",
        "scripts/go": b"3",
        "new/file.txt": b"4",
        "sub/untracked.py": b"9",
        **submodule,
    }
    assert found == expected
    assert packed.num_files == len(expected)
    assert (tmp_path / "unpacked" / "scripts" / "go").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "unpacked" / "setup.cfg").stat().st_mode & 0o777 == 0o644


def test_this_project_is_packed_file_by_file(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    found = tree(unpack(pack(ROOT).data, tmp_path / "unpacked"))
    # git's own archive of the index is another implementation of most of it.
    index = tmp_path / "index"
    git(ROOT, "checkout-index", "--all", f"--prefix={index}/")
    unchanged = set(tree(index)) - set(git(ROOT, "diff", "--name-only").split("\n"))
    assert len(unchanged) > 300
    assert {name: found[name] for name in unchanged} == {
        name: text for name, text in tree(index).items() if name in unchanged
    }
    assert found == {name: tree_of(ROOT / name) for name in found}
    names = "\n".join(found)
    ignored = subprocess.run(
        ["git", "-C", ROOT, "check-ignore", "--stdin"], input=names, text=True, capture_output=True
    )
    assert ignored.stdout == ""


def tree_of(path: Path) -> bytes | str:
    return os.readlink(path) if path.is_symlink() else path.read_bytes()


def test_the_same_files_are_the_same_bytes_wherever_and_whenever(repository, tmp_path):
    first = pack(repository)
    copy = tmp_path / "elsewhere"
    git(tmp_path, "clone", "-q", str(repository), str(copy))
    for path in copy.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    # As if the disk listed and the index kept them in another order.
    assert pack(copy).data == first.data
    assert first.sha256 == hashlib.sha256(first.data).hexdigest()
    assert first.key("a/b/") == f"a/b/{first.sha256}.tar.gz"
    assert first.key("") == f"{first.sha256}.tar.gz"
    assert first.data[4:8] == bytes(4), "gzip keeps its time there (RFC 1952)"
    with tarfile.open(fileobj=io.BytesIO(first.data)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}

    write(copy, {"configs/align.yaml": "seed: 2\n"})
    assert pack(copy).sha256 != first.sha256


def test_names_may_be_any_bytes(repository, tmp_path):
    name = os.fsdecode(b"caf\xe9 \n.txt")
    (repository / name).write_text("x")
    assert name in list_files(repository)
    assert tree(unpack(pack(repository).data, tmp_path / "unpacked"))[name] == b"x"


def test_commit_says_whether_files_differ(repository):
    head = git(repository, "rev-parse", "HEAD").strip()
    assert pack(repository).commit == commit(repository) == head
    write(repository, {"new.txt": "1"})
    assert commit(repository) == f"{head}-dirty"


def test_large_files_are_refused_by_name(repository):
    (repository / "weights.bin").write_bytes(bytes(3_200_000))
    (repository / "fits.bin").write_bytes(bytes(3_000_000))
    with pytest.raises(ValueError, match=r"larger than 3 MB: weights.bin \(3\.2 MB\); .*--max-fi"):
        pack(repository, max_file_mb=3)
    assert "weights.bin" in list_files(repository)
    pack(repository, max_file_mb=3.2)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "configs/../../outside"])
def test_links_that_lead_out_are_refused(repository, target):
    (repository / "link").symlink_to(target)
    with pytest.raises(ValueError, match=f"link link leads out of the checkout, to {target}"):
        pack(repository)


def test_a_link_through_another_link_is_followed_before_it_is_believed(repository):
    (repository / "configs" / "up").symlink_to("..")
    # By its text alone it would be configs/outside.
    (repository / "configs" / "link").symlink_to("up/../outside")
    with pytest.raises(ValueError, match="configs/link leads out"):
        pack(repository)


def test_a_file_with_a_secret_is_refused_and_the_secret_not_told(repository):
    write(repository, {"note.txt": "key: 0123456789abcdef"})
    with pytest.raises(ValueError, match=r"'note.txt:1' \(the value of WANDB_API_KEY\)") as caught:
        pack(repository, secrets={"WANDB_API_KEY": "0123456789abcdef"})
    assert "0123456789" not in str(caught.value)
    pack(repository, secrets={"WANDB_API_KEY": "another-secret"})


def test_secrets_are_refused_by_file_and_line_tracked_or_not_unless_named(repository):
    token = "hf_" + "AbCdEfGhIj" * 3
    write(repository, {"tracked/id_rsa": "x\n", "tracked/a.py": f"1\nT = '{token}'\n"})
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    write(repository, {".env": "A=1\n", "x.log": token, "fine.env.txt": "A=1\n"})
    with pytest.raises(ValueError, match="secrets would be uploaded") as caught:
        pack(repository)
    message = str(caught.value)
    assert token not in message and "\n" not in message
    assert (
        "'.env' (an environment file), 'tracked/a.py:2' (a Hugging Face token), "
        "'tracked/id_rsa' (an SSH key); "
    ) in message
    # The one that is named passes, and no other.
    with pytest.raises(ValueError, match=r"'.env' \(an environment file\), 'tracked/id_rsa'"):
        pack(repository, allowed=["tracked/a.py"])
    packed = pack(repository, allowed=["tracked/a.py", "tracked/id_rsa", ".env"])
    assert packed.num_files == len(list_files(repository))
    with pytest.raises(ValueError, match=r"--send-anyway none\.txt: no such file is sent"):
        pack(repository, allowed=["none.txt"])


def test_a_link_by_the_name_of_a_secret_file_is_judged_by_what_it_leads_to(repository):
    write(repository, {"settings.txt": "DB_PASS=hunter2\n", "x.log": "A=1\n"})
    (repository / "ignored").symlink_to("x.log")
    (repository / "gone").symlink_to("nowhere")
    pack(repository)
    (repository / ".env").symlink_to("settings.txt")
    with pytest.raises(ValueError, match=r"uploaded: '.env' \(an environment file\);"):
        pack(repository)
    (repository / ".env").unlink()
    # What git ignores is not sent, whatever leads to it.
    (repository / ".env").symlink_to("x.log")
    pack(repository)


def test_thousands_of_files_are_looked_at_in_seconds():
    texts = [path.read_bytes() for path in sorted((ROOT / "refrag_lightning").rglob("*.py"))]
    begin = time.process_time()
    for number in range(1000):
        assert file_secrets(f"a/{number}.py", texts[number % len(texts)]) == []
    # So 10,000 take less than 20 s of a slow machine.
    assert time.process_time() - begin < 2


def test_what_is_no_checkout_is_refused(repository, tmp_path):
    assert find_root(repository / "configs") == repository.resolve()
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(ValueError, match=r"outside cannot be read as a git checkout: .*not a git"):
        find_root(outside)
    git(outside, "init", "-q")
    with pytest.raises(ValueError, match="is no checkout of refrag_lightning"):
        find_root(outside)
    with pytest.raises(ValueError, match="git knows no files"):
        pack(outside)


def test_git_looks_at_the_folder_and_not_at_its_variables(repository, tmp_path, monkeypatch):
    """As in a hook, where git sets them for the repository that it runs in."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert "configs/align.yaml" in list_files(repository)


def test_upload_is_skipped_where_the_object_is(aws, repository):
    import boto3

    s3 = boto3.client("s3", region_name=REGION)
    s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
    packed = pack(repository)
    assert upload(s3, packed, bucket="bucket", prefix="checkouts") is True
    stored = s3.get_object(Bucket="bucket", Key=f"checkouts/{packed.sha256}.tar.gz")
    assert stored["Body"].read() == packed.data
    assert gzip.decompress(packed.data)[257:262] == b"ustar"
    assert upload(s3, packed, bucket="bucket", prefix="checkouts") is False
    with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucket"):
        upload(s3, packed, bucket="none", prefix="checkouts")


@pytest.mark.parametrize("case", ["old", "hidden"])
def test_an_old_object_and_one_that_may_not_be_seen_are_put_again(
    aws_environment, repository, case
):
    import boto3
    from botocore.stub import ANY, Stubber

    packed = pack(repository)
    key = f"p/{packed.sha256}.tar.gz"
    s3 = boto3.client("s3", region_name=REGION)
    with Stubber(s3) as stubber:
        if case == "old":
            then = datetime.now(timezone.utc) - timedelta(days=8)
            stubber.add_response(
                "head_object", {"LastModified": then}, {"Bucket": "bucket", "Key": key}
            )
        else:
            stubber.add_client_error("head_object", "403", http_status_code=403)
        stubber.add_response(
            "put_object",
            {},
            {
                "Bucket": "bucket",
                "Key": key,
                "Body": packed.data,
                "ContentType": "application/gzip",
                "ChecksumSHA256": ANY,
            },
        )
        assert upload(s3, packed, bucket="bucket", prefix="p") is True
        stubber.assert_no_pending_responses()
