"""Runs on two processes, against one process with the same global batch, killed, and in shards."""

import csv
import re
import signal
from pathlib import Path

import pytest
import torch

from refrag_lightning.cli import main
from refrag_lightning.model import RefragModel
from refrag_lightning.training.sharded import _read
from tests.training.ranks import ROOT, BreakingSFT, rivers, run

FILE = {"trainer.strategy.class_path": "refrag_lightning.training.ShardedStrategy"}
SHARDS = FILE | {"trainer.strategy.init_args.save_distributed_checkpoint": "true"}
LORA = {"steps": 20, "model.lora": "{r: 2}", "model.teacher": "self"}
BREAK = {"model.break_at": 9}
# Three batches a step, the epoch's last step one.
ACCUMULATED = {"trainer.accumulate_grad_batches": 3, "trainer.gradient_clip_val": 0.5}


def align(name, *, batch_size, devices):
    """Twenty steps of the tiny alignment, its nine validation pieces in uneven batches."""
    options = {
        "name": name,
        "validate_first": "true",
        "model.init_args.kld_texts": 4 if devices == 2 else 8,
        "data.init_args.batch_size": batch_size,
        "data.init_args.eval_batch_size": 4,
        "data.init_args.eval_pieces": 9,
        "trainer.devices": devices,
        "trainer.max_steps": 20,
        "trainer.log_every_n_steps": 1,
    }
    config = ROOT / "configs" / "tiny" / "align.yaml"
    return ["fit", "--config", str(config), *(f"--{k}={v}" for k, v in options.items())]


TOY = [
    "fit",
    "--model=tests.training.toy.ToyModule",
    "--model.lr=0.01",
    "--data=tests.training.toy.ToyDataModule",
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.max_steps=30",
    "--trainer.log_every_n_steps=1",
    "--save_every=4",
    "--export=false",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with all runs of this file: two starts of two processes, and single ones."""
    folder = tmp_path_factory.mktemp("ranks")
    hello = ["hello", "--name=hello", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    code, output = run(
        hello,
        align("align-2", batch_size=8, devices=2),
        rivers("ddp", batch_size=1, **LORA),
        rivers("sharded-lora", batch_size=1, **FILE, **LORA),
        rivers("sharded", batch_size=1, **SHARDS),
        rivers("accumulated", batch_size=1, steps=16, **ACCUMULATED),
        rivers("sharded-accumulated", batch_size=1, steps=16, **FILE, **ACCUMULATED),
        rivers("broken", batch_size=1, **SHARDS, **BREAK),
        rivers("broken-file", batch_size=1, **FILE, **BREAK),
        [*TOY, "--name=toy"],
        [*TOY, "--name=toy-killed", "--model.kill_at=22"],
        cwd=folder,
    )
    assert code == -signal.SIGKILL, output
    (folder / "output.txt").write_text(output)
    broken, broken_file = (last(folder, name) for name in ("broken", "broken-file"))
    code, output = run(
        rivers("resumed", batch_size=1, **FILE, ckpt_path=broken),
        rivers("resumed-file", batch_size=1, **FILE, ckpt_path=broken_file),
        [*TOY, "--name=toy-resumed", f"--ckpt_path={last(folder, 'toy-killed')}"],
        [*TOY, "--name=toy-stopped", "--model.term_at=6"],
        cwd=folder,
    )
    assert code == 128 + signal.SIGTERM, output
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(align("align-1", batch_size=16, devices=1))
        main(rivers("ddp-1", batch_size=2, **LORA))
        main(rivers("sharded-1", batch_size=2))
        clip = {"trainer.gradient_clip_val": 0.5, "trainer.val_check_interval": 14}
        main(rivers("large", batch_size=6, steps=16, **clip))
    return folder


def run_folder(runs, name):
    (folder,) = (runs / "runs" / name).iterdir()
    return folder


def last(runs, name):
    return run_folder(runs, name) / "checkpoints" / "last.ckpt"


def rows(runs, name):
    """The rows of a run's metrics.csv without times."""
    with (run_folder(runs, name) / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if v and "per_second" not in k}
            for row in csv.DictReader(file)
        ]


def curve(runs, name, metric="train/loss"):
    return [float(row[metric]) for row in rows(runs, name) if metric in row]


def test_hello_says_where_each_rank_is_and_that_they_meet(runs):
    output = (runs / "output.txt").read_text()
    for rank in range(2):
        (line,) = re.findall(rf"^hello from rank {rank} .*$", output, re.M)
        assert f"(local rank {rank}, node 0)" in line and line.endswith("cpu")
    assert output.count("topology: 1 node(s), 2 process(es), DDPStrategy") == 1
    assert "the all-reduce of rank + 1 is 3," in output
    (slope,) = re.findall(r"learnt on every process: y = (\S+) x", output)
    assert float(slope) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("two", "one", "steps"),
    [
        ("align-2", "align-1", 20),
        ("ddp", "ddp-1", 20),
        ("sharded-lora", "ddp-1", 20),
        ("sharded", "sharded-1", 12),
    ],
)
def test_two_ranks_learn_as_one_with_the_same_global_batch(runs, two, one, steps):
    """But for `align-2`, one rank has documents and more targets, the other has neither."""
    expected = curve(runs, one)
    assert len(expected) == steps and expected[-1] < 0.98 * expected[0]
    assert curve(runs, two) == pytest.approx(expected, rel=1e-3)
    # A rank has more validation batches than the other; each sample counts once.
    assert curve(runs, two, "val/loss") == pytest.approx(curve(runs, one, "val/loss"), rel=1e-3)
    for metric in ("train/mse", "train/kld", "train/top1", "train/explained_variance", "train/nll"):
        assert curve(runs, two, metric) == pytest.approx(curve(runs, one, metric), rel=1e-3)
    for metric in ("val/coverage", "val/mse", "val/r2", "train/coverage", "train/tokens"):
        assert curve(runs, two, metric) == pytest.approx(curve(runs, one, metric), rel=1e-3)


@pytest.mark.parametrize("name", ["accumulated", "sharded-accumulated"])
def test_accumulated_batches_of_two_ranks_are_one_large_batch(runs, name):
    for metric in ("train/loss", "train/nll", "train/grad_norm", "train/top1"):
        expected = curve(runs, "large", metric)
        assert len(expected) == 16
        assert curve(runs, name, metric) == pytest.approx(expected, rel=2e-3), metric


def test_all_parts_train_though_one_rank_never_has_documents(runs):
    first, model = (
        RefragModel.from_pretrained(run_folder(runs, name) / "model").state_dict()
        for name in ("ddp-1", "ddp")
    )
    base = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
    for name, tensor in base.state_dict().items():
        if name.startswith("encoder.encoder."):
            assert not torch.equal(model[name], tensor), name
    for name, tensor in first.items():
        torch.testing.assert_close(model[name], tensor, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize(
    ("resumed", "whole", "step"),
    [("toy-resumed", "toy", 20), ("resumed", "sharded", 6), ("resumed-file", "sharded", 6)],
)
def test_what_was_broken_off_goes_on_exactly(runs, resumed, whole, step):
    expected, got = rows(runs, whole), rows(runs, resumed)
    assert got == expected[len(expected) - len(got) :]
    assert int(got[0]["step"]) == step
    assert len(curve(runs, resumed)) == len(curve(runs, whole)) - step


def test_all_ranks_stop_after_the_same_batch_where_one_is_told_to(runs):
    saved = torch.load(last(runs, "toy-stopped"), weights_only=True)
    # The step of number 6 is the seventh. Every rank says where it is in the data.
    assert saved["global_step"] == 7
    assert [rank["batch"] for rank in saved["ToyDataModule"]["ranks"]] == [1, 1]


def test_a_checkpoint_in_shards_holds_what_trains_and_nothing_else(runs):
    folder, single = last(runs, "sharded"), torch.load(last(runs, "sharded-1"), weights_only=True)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {path.name for path in folder.iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt",
    }  # fmt: skip
    state = _read(folder, "state_dict/")
    assert state.keys() == single["state_dict"].keys()
    trained = sum(tensor.numel() for tensor in state.values())
    moments = _read(folder, "optimizer_0/")
    # Two moments for each number that trains, and a count of steps for each parameter.
    assert sum(tensor.numel() for tensor in moments.values()) == 2 * trained + len(moments) / 3
    for name, tensor in torch.load(last(runs, "resumed"), weights_only=True)["state_dict"].items():
        assert torch.equal(tensor, state[name]), name


def test_an_export_from_shards_is_that_of_one_process_byte_by_byte(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = BreakingSFT(encoder="tiny/encoder", decoder="tiny/decoder", compression=4)
    module.configure_model()
    module.load_state_dict(_read(last(runs, "sharded"), "state_dict/"))
    module.export(tmp_path / "model")
    expected = files(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= expected.keys()
    for name in ("sharded", "resumed", "resumed-file"):
        assert files(run_folder(runs, name) / "model") == expected


def files(folder: Path):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
