"""A resumed run goes on bit for bit as the run that was never stopped."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything

from refrag_lightning.cli import main
from refrag_lightning.training.callbacks import SpeedMonitor, ValidateFirst
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.metrics_csv import MetricsCSV
from tests.training.toy import ToyDataModule, ToyModule, ToyStreamDataModule

# 46 samples in batches of 4: an epoch is 12 batches, the last one short. They have 136 tokens: in
# batches of 12 an epoch is 12 batches of a varying number of samples. The stream yields 72 samples
# a reading, in blocks that end within batches.
DATA = {
    "dataset": (ToyDataModule, {}),
    "dataset, 2 workers": (ToyDataModule, {"num_workers": 2}),
    "dataset, by tokens": (ToyDataModule, {"tokens_per_batch": 12}),
    "dataset, by tokens, 2 workers": (ToyDataModule, {"tokens_per_batch": 12, "num_workers": 2}),
    "stream": (ToyStreamDataModule, {}),
    "stream, 2 workers": (ToyStreamDataModule, {"num_workers": 2}),
    "stream, 2 workers, epochs of 7": (
        ToyStreamDataModule,
        {"num_workers": 2, "batches_per_epoch": 7},
    ),
}
TRAINER = {
    "steps": {"max_steps": 26},
    "epochs": {"max_epochs": 2},
    "accumulated": {"max_steps": 13, "accumulate_grad_batches": 2},
    "validated every 4": {"max_steps": 26, "val_check_interval": 4},
    "validated every 5 over epochs": {
        "max_steps": 26,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
    },
    "not validated": {"max_steps": 26, "limit_val_batches": 0},
    "short epochs": {"max_epochs": 4, "limit_train_batches": 6},
}
CASES = [("dataset", name) for name in TRAINER] + [
    ("dataset, 2 workers", "steps"),
    ("dataset, by tokens", "epochs"),
    ("dataset, by tokens, 2 workers", "steps"),
    ("stream", "steps"),
    ("stream", "validated every 5 over epochs"),
    ("stream, 2 workers", "steps"),
    ("stream, 2 workers, epochs of 7", "epochs"),
    ("stream, 2 workers, epochs of 7", "accumulated"),
]


class KeepAll(Checkpoints):
    """Keeps every last.ckpt that was written."""

    def _save(self, trainer, path):
        Checkpoints._save(trainer, path)
        if path.endswith("last.ckpt"):
            shutil.copy(path, self.folder / f"{trainer.global_step}.ckpt")


class History(Callback):
    """Notes the ends of epochs and validations among the module's steps."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.history.append(("epoch", trainer.current_epoch))

    def on_validation_end(self, trainer, pl_module):
        loss = trainer.callback_metrics["val/loss"]
        pl_module.history.append(("val", trainer.global_step, loss.item()))


def train(folder, data, trainer, *, ckpt_path=None):
    """Trains; returns what happened, in order, and the rows of metrics.csv."""
    seed_everything(1, verbose=False)
    module = ToyModule(lr=0.01)
    datamodule_class, options = DATA[data]
    Trainer(
        accelerator="cpu",
        logger=MetricsCSV(folder),
        callbacks=[ValidateFirst(), SpeedMonitor(), History(), KeepAll(folder, every_n_steps=1)],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **TRAINER[trainer],
    ).fit(module, datamodule_class(batch_size=4, **options), ckpt_path=ckpt_path)
    return module.history, metrics(folder)


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and "tokens_per" not in k} for row in rows]


@pytest.mark.parametrize(("data", "trainer"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_resume_from_anywhere_goes_on_bit_for_bit(tmp_path, data, trainer):
    history, rows = train(tmp_path / "whole", data, trainer)
    steps = sorted(int(path.stem) for path in (tmp_path / "whole").glob("[0-9]*.ckpt"))
    assert len(steps) > 10
    # In mid-epoch, at the end of an epoch (of 12, 7 or 6 batches, some accumulated in twos), and
    # near the run's end.
    places = (5, 6) if "workers" in data else (2, 5, 6, 11, -2)
    for step in sorted({steps[place] for place in places}):
        again, again_rows = train(
            tmp_path / f"from_{step}",
            data,
            trainer,
            ckpt_path=tmp_path / "whole" / f"{step}.ckpt",
        )
        done = [entry for entry in again if len(entry) == 4]
        assert done[0][0] == step and done[-1] == [e for e in history if len(e) == 4][-1]
        assert again == history[len(history) - len(again) :], f"resumed from step {step}"
        assert again_rows == rows[len(rows) - len(again_rows) :], f"resumed from step {step}"


def died_of(args):
    """Runs the command line in a process of its own; the signal it died of."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "refrag_lightning", *args]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return -subprocess.run(command, env=environment, timeout=100, check=False).returncode


@pytest.mark.parametrize("class_name", ["ToyDataModule", "ToyStreamDataModule"])
def test_a_run_killed_in_mid_epoch_goes_on_from_the_command_line(
    tmp_path, monkeypatch, capsys, class_name
):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"class_path": "tests.training.toy.ToyModule", "init_args": {"lr": 0.01}},
        "data": {
            "class_path": f"tests.training.toy.{class_name}",
            "init_args": {"batch_size": 4, "num_workers": 2},
        },
        "trainer": {"max_steps": 30, "accelerator": "cpu", "log_every_n_steps": 1},
        "save_every": 4,
        "export": False,
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", "toy.yaml"]
    main([*fit, "--name", "whole"])
    assert died_of([*fit, "--name", "killed", "--model.kill_at", "22"]) == signal.SIGKILL
    (killed,) = (tmp_path / "runs" / "killed").iterdir()
    checkpoint = str(killed / "checkpoints" / "last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 20
    main([*fit, "--name", "resumed", "--ckpt_path", checkpoint])
    (whole,) = (tmp_path / "runs" / "whole").iterdir()
    (resumed,) = (tmp_path / "runs" / "resumed").iterdir()
    expected, got = metrics(whole), metrics(resumed)
    assert got == expected[len(expected) - len(got) :]
    assert got[0]["step"] == "20" and got[-1]["step"] == "29"
    # Nothing that was logged before the kill is lost.
    assert metrics(killed) == expected[: len(metrics(killed))]
    assert metrics(killed)[-1]["step"] == "21"
    capsys.readouterr()
    main([*fit, "--ckpt_path", str(whole / "checkpoints" / "last.ckpt")])
    assert "nothing was trained: the checkpoint is at step 30" in capsys.readouterr().out
    changed = [*fit, "--ckpt_path", checkpoint, "--data.init_args.batch_size", "5"]
    with pytest.raises(SystemExit):
        main(changed)
    assert "batch_size 4 -> 5" in capsys.readouterr().err
    main([*changed, "--restart_epoch", "true"])
    assert "nothing was trained" not in capsys.readouterr().out


def test_batches_by_tokens_need_data_with_lengths():
    data = ToyDataModule(tokens_per_batch=12)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    data.training_data = lambda: [1.0, 2.0]
    with pytest.raises(ValueError, match=r"tokens_per_batch \(12\) needs data that says how long"):
        data.train_dataloader()


def test_every_rank_needs_a_sample_to_validate_with():
    data = ToyDataModule()
    data.trainer = SimpleNamespace(global_rank=1, world_size=9)
    assert len(data.val_dataloader().dataset) == 1
    data.trainer = SimpleNamespace(global_rank=1, world_size=10)
    with pytest.raises(ValueError, match="9 samples to validate or test with are too few for 10"):
        data.val_dataloader()


def test_a_stream_refuses_another_number_of_workers(tmp_path):
    train(tmp_path / "whole", "stream, 2 workers", "steps")
    with pytest.raises(ValueError, match="with num_workers=2, this run has num_workers=0"):
        train(tmp_path / "again", "stream", "steps", ckpt_path=tmp_path / "whole" / "7.ckpt")


class Stopped(ToyModule):
    """Gets SIGTERM in the second of the batches that step 6 accumulates."""

    stops = True

    def training_step(self, batch, batch_idx):
        if self.global_step == 6 and batch_idx % 4 == 1 and self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
def test_a_run_told_to_stop_in_mid_accumulation_ends_its_step_and_saves(tmp_path):
    def fit(name, *, stops=False, ckpt_path=None):
        seed_everything(1, verbose=False)
        module = Stopped(lr=0.01)
        module.stops = stops
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[Checkpoints(tmp_path / name, every_n_steps=100)],
            max_steps=12,
            accumulate_grad_batches=4,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        stopped = False
        try:
            trainer.fit(module, ToyDataModule(batch_size=4), ckpt_path=ckpt_path)
        except SystemExit:
            stopped = True
        return module, stopped

    whole, stopped = fit("whole")
    assert not stopped
    _, stopped = fit("stopped", stops=True)
    assert stopped
    checkpoint = tmp_path / "stopped" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 7
    again, _ = fit("again", ckpt_path=checkpoint)
    assert again.history == whole.history[len(whole.history) - len(again.history) :]
    assert again.history[0][0] == 7


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"batch_size": 16}, "batch_size 4 -> 16"),
        ({"size": 20}, "samples 46 -> 20"),
        ({"seed": 5}, "seed 0 -> 5"),
        ({"tokens_per_batch": 12}, "tokens_per_batch None -> 12"),
    ],
)
@pytest.mark.parametrize("limit", [{"max_steps": 26}, {"max_epochs": 3}])
@pytest.mark.filterwarnings("ignore")
def test_a_place_in_other_data_is_refused_or_its_epoch_begun_anew(tmp_path, changed, what, limit):
    def fit(name, data, ckpt_path=None, *, until=limit):
        seed_everything(1, verbose=False)
        module = ToyModule(lr=0.01)
        Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[KeepAll(tmp_path / name, every_n_steps=1), History()],
            num_sanity_val_steps=0,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **until,
        ).fit(module, data, ckpt_path=ckpt_path)
        return module.history

    fit("first", ToyDataModule(batch_size=4), until={"max_steps": 20})
    place = tmp_path / "first" / "20.ckpt"  # batch 8 of the second epoch
    with pytest.raises(ValueError, match=f"after batch 8 of an epoch.*{what}.*--restart_epoch"):
        fit("refused", ToyDataModule(**{"batch_size": 4, **changed}), place)
    data = ToyDataModule(**{"batch_size": 4, **changed})
    data.restart_epoch = True
    history = fit("anew", data, place)
    steps = [entry for entry in history if len(entry) == 4]
    assert steps[0][:2] == (20, 0)
    epochs = [entry[1] for entry in history if entry[0] == "epoch"]
    assert epochs[:1] == [1]
    if "max_epochs" in limit:
        # The rest of the second epoch anew, and the third.
        assert epochs == [1, 2] and len(steps) == 2 * len(data._loader)
    else:
        assert steps[-1][0] == 25
    # Between two epochs any data will do.
    fit("between", ToyDataModule(**{"batch_size": 4, **changed}), tmp_path / "first" / "12.ckpt")
