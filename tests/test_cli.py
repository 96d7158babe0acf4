"""The command line, in-process on toy modules; two subprocesses for start-up and Ctrl-C."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from refrag_lightning.cli import COMMANDS, main, one_line

pytest.importorskip("lightning")

CONFIG = {
    "model": {"class_path": "tests.training.toy.ToyModule", "init_args": {"lr": 0.01}},
    "data": {"class_path": "tests.training.toy.ToyDataModule", "init_args": {"batch_size": 4}},
    "trainer": {"max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 1},
    "name": "toy",
}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The path of a complete configuration; runs go into the test's folder."""
    import tests.training.toy  # noqa: F401  # so that short class names are known

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def edited(tmp_path, **changes):
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return str(path)


def failure(capsys, args, *, code):
    """The one line that a failing command leaves on standard error."""
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line or line.startswith("usage") for line in lines)
    return lines[-1].removeprefix("error: ")


def the_folder(tmp_path, which="*[0-9]"):
    (folder,) = (tmp_path / "runs" / "toy").glob(which)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_lists_every_subcommand(capsys, args):
    main(args)
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert any(line.split()[:1] == [command.name] and command.summary in line for line in lines)


def test_help_imports_nothing_heavy_and_takes_less_than_a_second():
    code = (
        "import sys; from refrag_lightning.cli import main; main(['--help']);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    # The quickest of three: other processes may be busy.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_a_run_writes_its_folder_and_says_how_to_go_on(config, tmp_path, capsys):
    main(["fit", "--config", config, "--validate_first", "true", "--test_after_fit", "true"])
    out = capsys.readouterr().out
    folder = the_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.csv", "model",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "toy.yaml"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.01
    table = rows(folder)
    assert table[0]["step"] == "0" and float(table[0]["val/loss"]) > 0
    assert [row["step"] for row in table if row["train/loss"]] == ["0", "1", "2", "3"]
    assert float(table[-1]["test/loss"]) > 0
    for text in ("ToyModule", "projector 88 (lr 0.01)", "steps:     4", "32-true", "1 x cpu"):
        assert text in out
    assert f'from_pretrained("{folder.relative_to(tmp_path)}/model")' in out
    command = out.splitlines()[-1].split()
    assert command[:4] == ["python", "-m", "refrag_lightning", "fit"]
    # The printed command works, trains on, and leaves the first folder alone.
    before = (folder / "metrics.csv").read_bytes()
    main([*command[3:], "--trainer.max_steps", "6"])
    assert "going on from step 4" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_bytes() == before
    (second,) = set((tmp_path / "runs" / "toy").iterdir()) - {folder}
    assert [row["step"] for row in rows(second) if row["train/loss"]] == ["4", "5"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["test", "--model", "@", "-c", "x"], ["test", "-c", "x", "--model.init_args.init_from=@"]),
        (["test", "--model=@", "-c", "x"], ["test", "-c", "x", "--model.init_args.init_from=@"]),
        (["fit", "--model", "ToyModule", "-c", "x"], ["fit", "--model", "ToyModule", "-c", "x"]),
        (["fit", "--model=ToyModule"], ["fit", "--model=ToyModule"]),
        (["test", "--model", "owner/name"], ["test", "--model.init_args.init_from=owner/name"]),
        (["fit", "--model"], ["fit", "--model"]),
        (["fit", "--model.lr", "@"], ["fit", "--model.lr", "@"]),
    ],
)
def test_model_takes_a_folder(tmp_path, args, expected):
    from refrag_lightning.cli_lightning import from_folder

    def put(words):
        return [word.replace("@", str(tmp_path)) for word in words]

    assert from_folder(put(args)) == put(expected)


def test_two_runs_in_the_same_second_get_two_folders(tmp_path):
    from refrag_lightning.training.run_folder import make_run_folder

    folders = {make_run_folder(tmp_path, "toy") for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)


def test_test_subcommand_loads_a_checkpoint_and_has_a_folder_of_its_own(config, tmp_path):
    main(["fit", "--config", config, "--test_after_fit", "true", "--export", "false"])
    folder = the_folder(tmp_path)
    assert not (folder / "model").exists()
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    main(["test", "--config", config, "--ckpt_path", checkpoint])
    tested = rows(the_folder(tmp_path, "*_test"))
    assert tested[-1]["test/loss"] == rows(folder)[-1]["test/loss"]


def test_yaml_and_command_line_win_over_the_checkpoint(config, tmp_path, capsys):
    main(["fit", "--config", config, "--model.lr", "0.5", "--export", "false"])
    checkpoint = str(the_folder(tmp_path) / "checkpoints" / "last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.5
    common = ["fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_steps", "5"]
    for number, (options, expected) in enumerate([([], 0.01), (["--model.lr", "0.123"], 0.123)]):
        capsys.readouterr()
        main([*common, "--name", f"resumed{number}", *options])
        assert f"lr is {expected} here, 0.5 in the checkpoint" in capsys.readouterr().err
        (resumed,) = (tmp_path / "runs" / f"resumed{number}").iterdir()
        after = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
        groups = after["optimizer_states"][0]["param_groups"]
        # The optimiser's own state would bring 0.5 back, too.
        assert {group["initial_lr"] for group in groups} == {expected}
        assert after["hyper_parameters"]["lr"] == expected


def test_short_class_names_and_options_before_the_subcommand(config, tmp_path):
    path = edited(tmp_path, model={"class_path": "ToyModule"})
    main(["--config", path, "fit", "--trainer.max_steps", "1", "--export=false"])
    assert len(rows(the_folder(tmp_path))) == 1


def test_environment_sets_options(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_FIT__NAME", "toy")
    monkeypatch.setenv("PL_FIT__EXPORT", "false")
    main(["fit", "--config", config])
    assert not (the_folder(tmp_path) / "model").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fti"], "there is no subcommand 'fti', did you mean 'fit'?; --help lists them"),
        (["--model.lr", "1"], "expected a subcommand before '--model.lr': one of fit, validate"),
        (["fit"], "--data, --model must be given; a configuration file usually does"),
        (["fit", "--config", "toi.yaml"], "there is no file toi.yaml, did you mean 'toy.yaml'?"),
        (["fit", "-c", "@", "--trainer.max_step", "1"],
         "there is no option '--trainer.max_step', did you mean '--trainer.max_steps'?"),
        (["fit", "-c", "@", "--nam", "x"], "there is no option '--nam', did you mean '--name'?"),
        (["fit", "-c", "@", "--model.lrr", "1"],
         "model: ToyModule has no option 'lrr', did you mean 'lr'?"),
        (["fit", "-c", "@", "--data.bath_size", "1"],
         "data: ToyDataModule has no option 'bath_size', did you mean 'batch_size'?"),
        (["fit", "-c", "@", "--model.lr", "fast"],
         "model.lr: expected float or dict[str, float], got 'fast'"),
        (["fit", "-c", "@", "--trainer.max_steps", "ten"],
         "trainer.max_steps: expected int, got 'ten'"),
        (["fit", "-c", "@", "--wandb", "maybe"],
         "wandb: expected one of ['auto', 'off', 'offline', 'online'], got 'maybe'"),
        (["fit", "-c", "@", "--model", "ToiModule"],
         "model: there is no class 'ToiModule', did you mean 'ToyModule'?"),
        (["fit", "-c", "@", "--model", "."], "model: ToyModule has no option 'init_from'"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_told_in_one_line(config, capsys, args, message):
    args = [config if arg == "@" else arg for arg in args]
    assert failure(capsys, args, code=2).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {"class_path": "ToyModule"}},
         "there is no option 'modle', did you mean 'model'?"),
        ({"trainer": {"max_step": 4}},
         "there is no option 'trainer.max_step', did you mean 'trainer.max_steps'?"),
        ({"model": {"class_path": "ToyModule", "init_args": {"warm_up": 4}}},
         "model: ToyModule has no option 'warm_up', did you mean 'warmup'?"),
        ({"data": {"class_path": "ToyDataModule", "init_args": {"size": "big"}}},
         "data.size: expected int, got 'big'"),
    ],
)  # fmt: skip
def test_a_wrong_yaml_is_told_in_one_line(config, tmp_path, capsys, changes, message):
    path = edited(tmp_path, **changes)
    assert failure(capsys, ["fit", "--config", path], code=2).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.nan_at", "2"], "the loss of batch 2 of epoch 0 is nan"),
        (["--ckpt_path", "nope.ckpt"], "there is no checkpoint nope.ckpt"),
        (["--trainer.precision", "16-mixed"], "trainer.precision (16-mixed) is not supported"),
        (["--model.lr", "{projector: 1.0}"], "lr has no rate for 'decoder', which trains"),
        (["--model.lr", "{projectr: 1.0}"], "lr names 'projectr', the model's parts are"),
        (["--save_every", "0"], "save_every (0) must be at least 1"),
        (["--name", "a b"], "name ('a b') may have"),
    ],
)
def test_a_failing_run_is_told_in_one_line(config, capsys, options, message):
    assert failure(capsys, ["fit", "--config", config, *options], code=1).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.kld_texts", "0"], "kld_texts (0) must be at least 1"),
        (["--data.init_args.max_tokens", "0"], "max_tokens (0) must be at least 1"),
        (["--model", "runs/nope"], "model 'runs/nope' not found: no folder"),
    ],
)
def test_what_a_class_refuses_is_told_in_its_own_words(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", f"{ROOT}/configs/tiny/align.yaml", *options]
    assert failure(capsys, args, code=1).startswith(message)


def test_a_nan_leaves_the_last_checkpoint_good(config, tmp_path, capsys):
    failure(capsys, ["fit", "-c", config, "--model.nan_at", "3", "--save_every", "1"], code=1)
    saved = torch.load(the_folder(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_debug_shows_the_traceback(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--debug", "--config", config, "--model.nan_at", "2"])
    said = capsys.readouterr().err
    assert "Traceback" in said and "Error: the loss of batch 2" in said


def test_a_bug_is_told_with_its_type():
    assert one_line(KeyError("x")) == "KeyError: 'x' (run again with --debug for the traceback)"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(FileNotFoundError(2, "No such file", "a.txt")) == "No such file: a.txt"


def test_bf16_trains_on_the_cpu(config, tmp_path):
    main(["fit", "--config", config, "--trainer.precision", "bf16-mixed", "--export", "false"])
    assert [row["step"] for row in rows(the_folder(tmp_path))] == ["0", "1", "2", "3"]


def test_ctrl_c_exits_with_130_and_names_the_checkpoint(config, tmp_path):
    args = ["fit", "-c", config, "--trainer.max_steps", "1000000", "--save_every", "20"]
    command = [sys.executable, "-m", "refrag_lightning", *args]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": ROOT}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/toy/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130, lines
    assert "--ckpt_path runs/toy/" in lines[-2] and lines[-1] == "error: interrupted"
