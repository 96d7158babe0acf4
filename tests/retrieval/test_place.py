import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refrag_lightning.retrieval.info import index_info
from refrag_lightning.retrieval.keys import text_key
from refrag_lightning.retrieval.place import builder_lock, local_path
from refrag_lightning.retrieval.store import PassageStore
from tests.retrieval.stores import put

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/index", None),
        ("gs://bucket", None),
        ("here/index", Path("here/index")),
        ("/tmp/a b", Path("/tmp/a b")),
        ("file:///tmp/a%20b", Path("/tmp/a b")),
        ("~/index", Path("~/index").expanduser()),
        (Path("x"), Path("x")),
    ],
)
def test_folders_and_addresses(uri, expected):
    assert local_path(uri) == expected


def test_the_lock_of_a_killed_builder_is_free(tmp_path):
    """The system lets go of it; a file that stays there says nothing."""
    code = (
        "import sys, os, signal\n"
        "from refrag_lightning.retrieval.place import builder_lock\n"
        "with builder_lock(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OSError, match="another build"), builder_lock(tmp_path):
            pass
        process.kill()
        process.wait()
    with builder_lock(tmp_path):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """The address of an empty bucket of a server on this machine that speaks S3."""
    server_of = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
    yield "s3://bucket/index"
    server.stop()


def test_a_store_on_s3(bucket):
    assert not PassageStore.exists(bucket)
    with pytest.raises(FileNotFoundError, match="there is no index at 's3://bucket/index'"):
        PassageStore.open(bucket)
    store = PassageStore.create(bucket)
    assert store.local_path is None
    with store.lock():
        put(store, {"a": "one", "b": "two"})
        put(store, {"a": "other"}, replaced=["a"])
        store.add_vectors("e", [text_key("two")], np.eye(1, 2))
        store.compact()
    reader = PassageStore.open(bucket)
    assert {passage.id: passage.text for passage in reader.passages()} == {"a": "other", "b": "two"}
    assert reader.vectors("e")[0] == [text_key("two")]
    assert index_info(reader).bytes > 0
    assert not Path("s3:").exists()
