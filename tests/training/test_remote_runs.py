"""Run folders at addresses, and runs with an id, which go on where they were broken off."""

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
import yaml

from refrag_lightning.cli import main
from refrag_lightning.training.metrics_csv import MetricsCSV, drop_rows, read_rows
from refrag_lightning.training.mirror import Mirror
from refrag_lightning.training.remote import (
    RemoteFolder,
    fetch_checkpoint,
    fetch_model,
    is_address,
)
from refrag_lightning.training.run_folder import RunSettings, batch_job_id, known_folder
from refrag_lightning.training.run_start import RunStart

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"class_path": "tests.training.toy.ToyModule", "init_args": {"lr": 0.01}},
    "data": {"class_path": "tests.training.toy.ToyDataModule", "init_args": {"batch_size": 4}},
    "trainer": {
        "max_steps": 14,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
    },
    "name": "toy",
    "save_every": 3,
    "validate_first": True,
}
# Of an id, so that the folder's name is known beforehand.
FIT = ["fit", "--config", "toy.yaml", "--run_id", "one"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder with a configuration, and a cache of its own."""
    import tests.training.toy  # noqa: F401  # so that short class names are known

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AWS_BATCH_JOB_ID", raising=False)
    fsspec.filesystem("memory").store.clear()
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture(params=["local", "memory://bucket/runs", "file"])
def runs_dir(request, work):
    """Where run folders go: a folder, an object store, and a file system that has to rename."""
    if request.param == "local":
        return str(work / "runs")
    return f"file://{work}/runs" if request.param == "file" else request.param


def content(place, part=""):
    """A file in a run folder, wherever that is."""
    with fsspec.open(f"{place}/{part}" if part else place, "rb") as file:
        return file.read()


def names(place):
    """The files of a run folder, wherever that is."""
    fs, path = fsspec.url_to_fs(place)
    return sorted(name.removeprefix(path).strip("/") for name in fs.find(path))


def metrics(place):
    """The rows of metrics.csv without what a clock says."""
    rows = csv.DictReader(io.StringIO(content(place, "metrics.csv").decode()))
    return [{k: v for k, v in row.items() if v and "tokens_per" not in k} for row in rows]


def weights(place):
    state = torch.load(io.BytesIO(content(place, "checkpoints/last.ckpt")), weights_only=True)
    return state["state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run folder of a run that nothing broke off."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("AWS_BATCH_JOB_ID", raising=False)
        main(FIT)
    return str(folder / "runs" / "toy" / "one")


def broken_off(args, capsys):
    """Runs what fails at the loss of some step; what it said."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 1
    return capsys.readouterr()


def test_a_run_is_whole_at_its_address(work, undisturbed, capsys):
    main(["fit", "--config", "toy.yaml", "--runs_dir", "memory://bucket/runs/"])
    out = capsys.readouterr().out
    (stamp,) = {name.split("/")[0] for name in names("memory://bucket/runs/toy")}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", stamp)
    place = f"memory://bucket/runs/toy/{stamp}"
    assert names(place) == [
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv",
        "model/toy.pt",
    ]  # fmt: skip
    assert metrics(place) == metrics(undisturbed)
    assert same(weights(place), weights(undisturbed))
    assert f"folder:    {place}\n" in out
    for line in (
        f"metrics      {place}/metrics.csv",
        f"checkpoint   {place}/checkpoints/last.ckpt  (best: {place}/checkpoints/best.ckpt)",
        f'folder = fetch_model("{place}")',
        "model = RefragModel.from_pretrained(folder)",
    ):
        assert line in out
    # Nothing of it stays behind on the machine.
    assert not list((work / "cache" / "runs").rglob("*.*"))
    # The command that is printed goes on, in a folder of its own.
    command = out.splitlines()[-1].split()[3:]
    assert command[-1] == f"{place}/checkpoints/last.ckpt"
    before = content(place, "metrics.csv")
    main([*command, "--trainer.max_steps", "16", "--runs_dir", "again"])
    assert content(place, "metrics.csv") == before
    (second,) = Path("again/toy").iterdir()
    steps = [row["step"] for row in metrics(second) if "train/loss" in row]
    assert steps == ["14", "15"]


def test_a_second_start_goes_on_from_the_last_checkpoint(runs_dir, undisturbed, capsys):
    args = [*FIT, "--runs_dir", runs_dir]
    # Checkpoints after steps 3, 6, 9 and 12, of which the one of 12 is the end of an epoch.
    said = broken_off([*args, "--model.nan_at", "11"], capsys)
    place = f"{runs_dir}/toy/one"
    assert f"--ckpt_path {place}/checkpoints/last.ckpt" in said.err
    assert "going on" not in said.out
    logged = metrics(place)
    assert logged[-1]["step"] == "10" and logged == metrics(undisturbed)[: len(logged)]
    # What is at an address is nowhere else.
    assert not is_address(runs_dir) or not list(Path("cache/runs").rglob("*.*"))
    main(args)
    out = capsys.readouterr().out
    assert f"going on from the run's own checkpoint, {place}/checkpoints/last.ckpt\n" in out
    assert "going on from step 9" in out
    assert metrics(place) == metrics(undisturbed)
    assert same(weights(place), weights(undisturbed))
    assert "checkpoints/best.ckpt" in names(place) and "finished.json" in names(place)
    assert not [name for name in names(place) if "partial" in name]


@pytest.mark.parametrize("runs_dir", ["local", "memory://bucket/runs"], indirect=True)
def test_a_finished_run_is_left_alone_until_its_limits_change(runs_dir, capsys):
    args = [*FIT, "--runs_dir", runs_dir]
    main(args)
    place = f"{runs_dir}/toy/one"
    before = {name: content(place, name) for name in names(place)}
    capsys.readouterr()
    main(args)
    out = capsys.readouterr().out
    assert out.startswith(f"the run is finished, at step 14: {place}\n")
    assert "steps:" not in out
    assert {name: content(place, name) for name in names(place)} == before
    main([*args, "--trainer.max_steps", "16"])
    assert "going on from step 14" in capsys.readouterr().out
    rows = metrics(place)
    assert [row["step"] for row in rows if "train/loss" in row] == [str(n) for n in range(16)]


def test_what_was_killed_after_the_last_step_is_brought_to_its_end(work, undisturbed, capsys):
    main([*FIT, "--test_after_fit", "true"])
    place = "runs/toy/one"
    after = metrics(place)
    assert "test/loss" in after[-1]
    # As if killed during the test: no row of it, no model, not finished.
    os.unlink(f"{place}/finished.json")
    os.unlink(f"{place}/model/toy.pt")
    main([*FIT, "--test_after_fit", "true"])
    again = metrics(place)
    # The epoch is counted on at the end of the training, of which nothing was left to do.
    assert again[-1].pop("epoch") == "1" and after[-1].pop("epoch") == "2"
    assert again == after
    assert "model/toy.pt" in names(place) and "finished.json" in names(place)
    assert f"checkpoint   {place}/checkpoints/last.ckpt" in capsys.readouterr().out


def test_the_runs_own_checkpoint_counts_more_than_the_one_it_began_with(work, capsys):
    main([*FIT, "--trainer.max_steps", "4", "--runs_dir", "memory://first"])
    first = "memory://first/toy/one/checkpoints/last.ckpt"
    args = [*FIT, "--ckpt_path", first]
    capsys.readouterr()
    broken_off([*args, "--model.nan_at", "11"], capsys)
    main(args)
    out = capsys.readouterr().out
    own = "runs/toy/one/checkpoints/last.ckpt"
    assert f"the run's own checkpoint, {own}, not from {first}, where it began" in out
    steps = [row["step"] for row in metrics("runs/toy/one") if "train/loss" in row]
    assert steps == [str(step) for step in range(4, 14)]


def test_without_a_checkpoint_a_second_start_begins_anew(work, undisturbed, capsys):
    broken_off([*FIT, "--model.nan_at", "2"], capsys)
    assert [row["step"] for row in metrics("runs/toy/one")] == ["0", "0", "1"]
    main(FIT)
    assert metrics("runs/toy/one") == metrics(undisturbed)


def test_a_test_run_with_an_id_is_written_again(work):
    args = [*FIT, "--runs_dir", "memory://bucket/runs"]
    main([*args, "--test_after_fit", "true"])
    place = "memory://bucket/runs/toy/one"
    for _ in range(2):
        main(["test", *args[1:], "--ckpt_path", f"{place}/checkpoints/last.ckpt"])
        (row,) = metrics(f"{place}_test")
        assert row["test/loss"] == metrics(place)[-1]["test/loss"]
    assert names(f"{place}_test") == ["config.yaml", "metrics.csv"]


def test_ids():
    one = "0a1b-2c"
    assert batch_job_id({"AWS_BATCH_JOB_ID": one}) == one
    assert {batch_job_id({"AWS_BATCH_JOB_ID": f"{one}#{n}"}) for n in range(3)} == {one}
    children = {batch_job_id({"AWS_BATCH_JOB_ID": f"{one}:{n}"}) for n in range(3)}
    assert children == {f"{one}-0", f"{one}-1", f"{one}-2"}
    assert batch_job_id({}) is None
    for bad in ("a/b", "..", ".hidden", ""):
        with pytest.raises(ValueError, match="run_id"):
            RunSettings(run_id=bad)


def test_all_nodes_and_attempts_of_a_job_have_one_folder(work, monkeypatch):
    settings = RunSettings(runs_dir="s3://bucket/runs", name="toy")
    folders = set()
    for node in range(2):
        monkeypatch.setenv("AWS_BATCH_JOB_ID", f"job-7#{node}")
        folders.add(known_folder(settings, "toy"))
    (folder,) = folders
    assert folder.address == "s3://bucket/runs/toy/job-7"
    assert folder.local.is_relative_to(work / "cache")
    other = known_folder(RunSettings(runs_dir="s3://other/runs"), "toy")
    assert other.local != folder.local
    named = known_folder(RunSettings(run_id="mine"), "toy", suffix="_test")
    assert str(named.local) == "runs/toy/mine_test"


def test_rows_from_a_step_on_are_dropped_and_rows_are_added(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,0,1,\n0,1,2,\n0,1,,7\n0,2,3,\n0,2")
    drop_rows(path, from_step=2)
    assert path.read_text().splitlines() == ["epoch,step,a,b", "0,0,1,", "0,1,2,", "0,1,,7"]
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"epoch": 0, "b": 8}, step=2)
    logger.log_metrics({"epoch": 0, "c": 9}, step=3)
    assert path.read_text().splitlines() == [
        "epoch,step,a,b,c", "0,0,1,,", "0,1,2,,", "0,1,,7,", "0,2,,8,", "0,3,,,9",
    ]  # fmt: skip
    drop_rows(tmp_path / "none.csv", from_step=2)
    assert not (tmp_path / "none.csv").exists()


# Addresses


@pytest.mark.parametrize("kind", ["memory://box", "file"])
def test_a_copy_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, kind):
    remote = RemoteFolder(f"file://{tmp_path}/box" if kind == "file" else kind)
    (tmp_path / "new").write_bytes(b"new")
    remote.write("deep/file", b"old")
    fs = remote.fs

    def break_off(source, target, **options):
        if kind == "file":
            # What a copy leaves behind that was cut off in the middle.
            Path(target).write_bytes(b"n")
        raise ConnectionError("line cut")

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "put_file", lambda self, *args, **kwargs: break_off(*args))
        with pytest.raises(OSError, match=r"box: ConnectionError: line cut"):
            remote.put(tmp_path / "new", "deep/file")
    assert remote.read("deep/file") == b"old"
    remote.put(tmp_path / "new", "deep/file")
    assert remote.read("deep/file") == b"new"
    assert [*remote.names()] == ["deep/file"]
    assert remote.read("other") is None and not remote.is_file("deep")


def test_a_folder_counts_when_all_of_it_is_there(work, monkeypatch):
    place = "memory://box/checkpoints"
    remote = RemoteFolder(place)
    shards = work / "shards"
    (shards / "deep").mkdir(parents=True)
    (shards / "meta.pt").write_bytes(b"one")
    (shards / "deep" / "0.distcp").write_bytes(b"1" * 100)
    remote.put_folder(shards, "last.ckpt", version="a")
    fetched = fetch_checkpoint(f"{place}/last.ckpt")
    assert (fetched / "meta.pt").read_bytes() == b"one"
    assert (fetched / "deep" / "0.distcp").read_bytes() == b"1" * 100
    # A copy that breaks off after its first file changes nothing.
    (shards / "meta.pt").write_bytes(b"two")
    copied = []

    def put(self, path, name):
        copied.append(name)
        if len(copied) == 2:
            raise OSError("line cut")
        original(self, path, name)

    original = RemoteFolder.put
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "put", put)
        with pytest.raises(OSError, match="line cut"):
            remote.put_folder(shards, "last.ckpt", version="b")
    assert len(copied) == 2 and "last.ckpt-b/deep/0.distcp" in remote.names()
    assert (fetch_checkpoint(f"{place}/last.ckpt") / "meta.pt").read_bytes() == b"one"
    remote.put_folder(shards, "last.ckpt", version="c")
    assert (fetch_checkpoint(f"{place}/last.ckpt") / "meta.pt").read_bytes() == b"two"
    assert sorted(remote.names()) == [
        "last.ckpt-c/deep/0.distcp", "last.ckpt-c/meta.pt", "last.ckpt.json",
    ]  # fmt: skip
    remote.remove("last.ckpt-c/meta.pt")
    with pytest.raises(OSError, match=r"last\.ckpt-c/meta\.pt is missing or incomplete"):
        fetch_checkpoint(f"{place}/last.ckpt")


def test_a_name_that_leads_out_of_the_folder_is_not_followed(work, monkeypatch):
    remote = RemoteFolder("memory://box/model")
    remote.write("config.json", b"{}")
    listed = RemoteFolder.names
    monkeypatch.setattr(RemoteFolder, "stamp", lambda self, name: name)
    for name in ("../../../stolen", "/stolen"):
        # Object stores take such names; what they are read from does not matter.
        monkeypatch.setattr(
            RemoteFolder, "names", lambda self, name=name: {**listed(self), name: {}}
        )
        monkeypatch.setattr(
            RemoteFolder, "get", lambda self, name, path: path.write_bytes(b"from elsewhere")
        )
        with pytest.raises(OSError, match=r"name leads out of the folder: '.*stol"):
            fetch_model("memory://box/model")
    assert not list(work.rglob("stolen"))


def test_a_sharded_checkpoint_takes_the_place_of_a_file_and_back(work):
    local = work / "run"
    last = local / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"file")
    mirror = Mirror(local, "memory://box/run")
    mirror.copy()
    assert names("memory://box/run") == ["checkpoints/last.ckpt"]
    last.unlink()
    last.mkdir()
    (last / "meta.pt").write_bytes(b"shards")
    (local / "checkpoints" / "best.ckpt.partial").mkdir()
    (local / "checkpoints" / "best.ckpt.partial" / "meta.pt").write_bytes(b"not complete")
    mirror.copy()
    pointer = json.loads(content("memory://box/run/checkpoints/last.ckpt.json"))
    assert names("memory://box/run") == [
        f"checkpoints/{pointer['folder']}/meta.pt", "checkpoints/last.ckpt.json",
    ]  # fmt: skip
    place = "memory://box/run/checkpoints/last.ckpt"
    assert (fetch_checkpoint(place) / "meta.pt").read_bytes() == b"shards"
    (last / "meta.pt").unlink()
    last.rmdir()
    last.write_bytes(b"file again")
    mirror.copy()
    assert fetch_checkpoint(place).read_bytes() == b"file again"


def test_a_checkpoint_is_fetched_once_and_the_older_version_goes(work, monkeypatch):
    remote = RemoteFolder("memory://box/checkpoints")
    remote.write("last.ckpt", b"one")
    place = "memory://box/checkpoints/last.ckpt"
    first = fetch_checkpoint(place)
    got = []
    monkeypatch.setattr(RemoteFolder, "get", lambda self, *args: got.append(args))
    assert fetch_checkpoint(place) == first and not got
    monkeypatch.undo()
    monkeypatch.setenv("REFRAG_CACHE", str(work / "cache"))
    remote.write("last.ckpt", b"two")
    second = fetch_checkpoint(place)
    assert second.read_bytes() == b"two" and not first.exists()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint memory://box/checkpoints/"):
        fetch_checkpoint("memory://box/checkpoints/best.ckpt")


def test_a_model_is_fetched_from_its_folder_or_its_run(work):
    remote = RemoteFolder("memory://box/run")
    for name in ("config.json", "deep/weights"):
        remote.write(f"model/{name}", name.encode())
    remote.write("checkpoints/last.ckpt", b"large")
    for address in ("memory://box/run", "memory://box/run/model"):
        folder = Path(fetch_model(address))
        assert names(str(folder)) == ["config.json", "deep/weights"]
    with pytest.raises(FileNotFoundError, match="there is no model at memory://box/other"):
        fetch_model("memory://box/other")


def test_metrics_are_copied_before_the_checkpoint_that_they_led_to(work, monkeypatch):
    copies = []
    original = RemoteFolder.put

    def put(self, path, name):
        copies.append((name, path.read_bytes()))
        original(self, path, name)

    monkeypatch.setattr(RemoteFolder, "put", put)
    main([*FIT, "--runs_dir", "memory://bucket/runs"])
    assert copies[0][0] == "config.yaml"
    steps = []
    for number, (name, data) in enumerate(copies):
        if name == "checkpoints/last.ckpt":
            step = torch.load(io.BytesIO(data), weights_only=True)["global_step"]
            csvs = [data for name, data in copies[:number] if name == "metrics.csv"]
            logged = list(csv.DictReader(io.StringIO(csvs[-1].decode())))
            assert {row["step"] for row in logged if row["train/loss"]} >= {
                str(n) for n in range(step)
            }
            steps.append(step)
    assert steps == [3, 6, 9, 12, 14]


def test_a_copy_that_fails_is_made_up_for(work, capsys):
    local = work / "run"
    local.mkdir()
    (local / "metrics.csv").write_text("step\n")
    mirror = Mirror(local, "memory://box/run")
    trainer = SimpleNamespace(is_global_zero=True)
    put, failures = mirror.remote.put, [OSError("memory://box/run: busy")]

    def failing(path, name):
        if failures:
            raise failures.pop()
        put(path, name)

    mirror.remote.put = failing
    mirror.try_to_copy(trainer)
    assert capsys.readouterr().err == (
        "note: not copied, to be tried again: memory://box/run: busy\n"
    )
    assert names("memory://box/run") == []
    failures.append(OSError("memory://box/run: gone"))
    with pytest.raises(OSError, match=f"gone; the run's files are in {local}"):
        mirror.close()
    assert local.is_dir()
    failures.append(OSError("memory://box/run: still gone"))
    mirror.leave(trainer)
    assert "note: not copied: memory://box/run: still gone; the run" in capsys.readouterr().err
    mirror.leave(trainer)
    assert names("memory://box/run") == ["metrics.csv"] and not local.exists()


def test_shards_on_several_machines_are_refused(work):
    strategy = SimpleNamespace(_save_distributed_checkpoint=True)
    trainer = SimpleNamespace(strategy=strategy, num_nodes=2, is_global_zero=False)
    mirror = Mirror(work, "memory://box/run")
    with pytest.raises(ValueError, match=r"runs_dir \(memory://box/run\) cannot take .* 2 nodes"):
        mirror.on_fit_start(trainer, None)
    trainer.num_nodes = 1
    mirror.on_fit_start(trainer, None)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://b/x needs another package: pip install 'refrag"):
        RemoteFolder("s3://b/x")


def test_the_commands_of_the_page_are_understood(work, capsys):
    (work / "configs").symlink_to(ROOT / "configs")
    text = (ROOT / "docs" / "runs.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("python -m refrag")]
    # Those that read something at an address need the address.
    local = [line.split()[3:] for line in commands if "BUCKET/runs/align" not in line]
    assert len(local) >= 3
    for command in local:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--print_config"])
        assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs_dir", "nope://x"], "nope://x/toy/one: Protocol not known: nope"),
        (["--ckpt_path", "memory://no.ckpt"], "there is no checkpoint memory://no.ckpt"),
        (["--model", "memory://none"], "there is no model at memory://none"),
        (["--run_id", "a/b"], "run_id ('a/b') may have letters"),
        (["--name", "../x"], "name ('../x') may have letters"),
        (["--name", "a/../../x"], "name ('a/../../x') may have letters"),
        (["--name=-x"], "name ('-x') may have letters"),
    ],
)
def test_wrong_addresses_are_told_in_one_line(work, capsys, options, message):
    with pytest.raises(SystemExit):
        main([*FIT, *options])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_place_that_does_not_answer_is_not_an_empty_one(work, monkeypatch, capsys):
    args = [*FIT, "--runs_dir", "memory://bucket/runs"]
    broken_off([*args, "--model.nan_at", "5"], capsys)
    place = "memory://bucket/runs/toy/one"
    before = content(place, "checkpoints/last.ckpt")
    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "info", lambda self, path, **options: 1 / 0)
        assert "ZeroDivisionError" in broken_off(args, capsys).err
    assert content(place, "checkpoints/last.ckpt") == before


def test_is_address():
    assert is_address("s3://bucket/x") and is_address("file:///tmp/x")
    assert not is_address("runs/x") and not is_address(Path("/tmp/x"))


# A retried job


@contextmanager
def s3():
    """Moto's S3 on loopback, with a bucket; the variables that lead to it.

    Its buckets are those of the whole process, of other tests too.
    """
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_module.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="jobs")
        yield variables, client
    finally:
        server.stop()


def test_a_killed_job_goes_on_from_s3_on_another_machine(work, undisturbed):
    config = CONFIG | {"runs_dir": "s3://jobs/runs"}
    (work / "toy.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "refrag_lightning", "fit", "--config", "toy.yaml"]

    def attempt(number, *options):
        machine = work / f"machine{number}"
        machine.mkdir()
        (machine / "toy.yaml").write_text((work / "toy.yaml").read_text())
        job = {"AWS_BATCH_JOB_ID": "0a1b-2c", "AWS_BATCH_JOB_ATTEMPT": str(number)}
        environment = os.environ | variables | job | {"PYTHONPATH": str(ROOT)}
        environment["REFRAG_CACHE"] = str(machine / "cache")
        return subprocess.run(
            [*command, *options],
            env=environment,
            cwd=machine,
            timeout=100,
            capture_output=True,
            text=True,
            check=False,
        )

    def fetched(name):
        return client.get_object(Bucket="jobs", Key=f"runs/toy/0a1b-2c/{name}")["Body"].read()

    with s3() as (variables, client):
        killed = attempt(1, "--model.kill_at", "11")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        first = torch.load(io.BytesIO(fetched("checkpoints/last.ckpt")), weights_only=True)
        assert first["global_step"] == 9
        again = attempt(2)
        assert again.returncode == 0, again.stderr
        place = "s3://jobs/runs/toy/0a1b-2c"
        assert f"own checkpoint, {place}/checkpoints/last.ckpt" in again.stdout
        assert "going on from step 9" in again.stdout
        (work / "fetched" / "checkpoints").mkdir(parents=True)
        for name in ("metrics.csv", "checkpoints/last.ckpt"):
            (work / "fetched" / name).write_bytes(fetched(name))
        assert metrics(work / "fetched") == metrics(undisturbed)
        assert same(weights(work / "fetched"), weights(undisturbed))
        listed = client.list_objects_v2(Bucket="jobs")["Contents"]
        assert sorted(entry["Key"].removeprefix("runs/toy/0a1b-2c/") for entry in listed) == [
            "checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "finished.json",
            "metrics.csv", "model/toy.pt",
        ]  # fmt: skip


# Two runs with one id

HOLD = """
import sys
from pathlib import Path
from refrag_lightning.cache import sole_writer
with sole_writer(Path(sys.argv[1]), advice=""):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_run_with_the_id_is_refused_until_the_first_is_gone(work, runs_dir, capsys):
    """The first is another process on this machine; it works in the same local folder."""
    fit = [*FIT, "--runs_dir", runs_dir, "--trainer.max_steps", "3", "--export", "false"]
    folder = known_folder(RunSettings(run_id="one", runs_dir=runs_dir), "toy")
    folder.local.mkdir(parents=True)
    (folder.local / "metrics.csv").write_text("of the first run")
    command = [sys.executable, "-c", HOLD, str(folder.local)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as ended:
            main(fit)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1
        assert f"{folder.local} is being written by process {first.pid} on " in line
        assert line.endswith("; wait for its end, or give this run another --run_id")
        assert os.listdir(folder.local) == ["metrics.csv"]
        assert (folder.local / "metrics.csv").read_text() == "of the first run"
        # Another id, and another subcommand, have other folders. Further ranks write nothing.
        start = RunStart(
            RunSettings(run_id="one", runs_dir=runs_dir),
            name="toy", subcommand="fit", trainer={}, checkpoint=None,
        )  # fmt: skip
        with ExitStack() as held:
            assert start.open_folder(first_rank=False, held=held) == folder
        first.kill()
    main(fit)
    assert "metrics.csv" in names(folder.shown())
    assert [path.name for path in folder.local.parent.iterdir() if "lock" in path.name] == []


def test_a_run_that_failed_holds_its_folder_no_longer(work, capsys):
    with pytest.raises(SystemExit):
        main([*FIT, "--model.nan_at", "2"])
    assert not list((work / "runs" / "toy").glob(".*"))


def test_a_config_that_is_cut_short_by_a_kill_leaves_the_old_one(work):
    """Lightning writes it in place."""
    main([*FIT, "--trainer.max_steps", "1", "--export", "false"])
    config = work / "runs" / "toy" / "one" / "config.yaml"
    before = config.read_text()
    assert yaml.safe_load(before)["run_id"] == "one"
    code = (
        "import os, signal, sys\n"
        "from refrag_lightning import cache\n"
        "cache._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from refrag_lightning.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    fit = [*FIT, "--trainer.max_steps", "2", "--export", "false"]
    command = [sys.executable, "-c", code, *fit]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert config.read_text() == before
    assert list(config.parent.parent.glob("**/.*"))
    main(fit)
    assert yaml.safe_load(config.read_text())["trainer"]["max_steps"] == 2
    assert not list(config.parent.parent.glob("**/.*"))


def test_a_row_that_a_kill_cut_short_is_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"epoch,step,loss\r\n0,1,0.5\r\n0,1")  # of step 12
    assert [row["loss"] for row in read_rows(path)] == ["0.5"]
    drop_rows(path, from_step=100)
    assert path.read_bytes() == b"epoch,step,loss\r\n0,1,0.5\r\n"
