"""hello on one process: a run like any other, and what it says where processes do not meet."""

from pathlib import Path

import pytest
import torch
import yaml

from refrag_lightning.cli import main
from refrag_lightning.training.hello import Process, topology

ROOT = Path(__file__).parents[2]
HELLO = ["hello", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]


def printed(capsys, *args):
    with pytest.raises(SystemExit):
        main([*args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_the_command_is_its_configuration_file(capsys):
    file = printed(capsys, "fit", "--config", str(ROOT / "configs" / "hello.yaml"))
    command = printed(capsys, "hello")
    assert file.pop("name") == "hello" and command.pop("name") is None
    assert command == file


def test_it_is_a_run_like_any_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*HELLO, "--name", "first"])
    output = capsys.readouterr().out
    assert "hello from rank 0 (local rank 0, node 0) on " in output
    assert "topology: 1 node(s), 1 process(es)" in output
    (folder,) = Path("runs/first").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "model"} <= names
    line = torch.load(folder / "model" / "line.pt")
    # What it learns is y = 2 x + 1.
    assert line["weight"].item() == pytest.approx(2, abs=0.1)
    assert line["bias"].item() == pytest.approx(1, abs=0.1)
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    main([*HELLO, "--ckpt_path", checkpoint, "--trainer.max_steps", "62"])
    assert "going on from step 60" in capsys.readouterr().out


def test_a_wrong_sum_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lightning.pytorch.strategies.SingleDeviceStrategy.reduce",
        lambda self, tensor, *_, **__: tensor + 1,
    )
    with pytest.raises(SystemExit) as ended:
        main(HELLO)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "rank 0: the all-reduce of rank + 1 gave 2 on 1 process(es), not 1 on 1" in error


def test_the_topology_has_a_line_for_each_node():
    processes = [
        Process(rank, rank % 2, rank // 2, f"host-{rank // 2}", 100 + rank, f"cuda:{rank % 2}")
        for rank in range(4)
    ]
    assert topology(processes, "DDPStrategy").splitlines() == [
        "topology: 2 node(s), 4 process(es), DDPStrategy; the all-reduce of rank + 1 is 10, as it "
        "should be",
        "  node 0  host-0  ranks 0, 1  cuda:0, cuda:1",
        "  node 1  host-1  ranks 2, 3  cuda:0, cuda:1",
    ]
