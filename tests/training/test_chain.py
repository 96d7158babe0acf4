"""Recipes chained by folders through the command line, and runs on TextBatch that were resumed."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from refrag_lightning import RefragModel
from refrag_lightning.cli import main
from refrag_lightning.training.language import LanguageModule

ROOT = Path(__file__).parents[2]
FEW = ["--trainer.val_check_interval", "8", "--validate_first", "true", "--test_after_fit", "false"]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, name, *options):
    """Runs a subcommand on a tiny configuration; returns its run folder."""
    before = set(Path("runs").glob("*/*"))
    main([command, "--config", f"configs/tiny/{name}.yaml", *options])
    (folder,) = set(Path("runs").glob("*/*")) - before
    return folder


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def losses(folder):
    """The validation losses of a run, the first of them at step 0 of a fit."""
    return [float(row["val/loss"]) for row in rows(folder) if "val/loss" in row]


def decoder_of(folder):
    return RefragModel.from_pretrained(folder / "model").decoder.state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.mark.slow
def test_plain_sft_then_alignment_then_pretraining_then_sft_with_documents(in_tmp):
    sft = run("fit", "sft", *FEW, "--trainer.max_steps", "16")
    assert losses(sft)[-1] < losses(sft)[0] - 1
    written = AutoModelForCausalLM.from_pretrained(sft / "model").state_dict()
    # The folder scores as the run did at its end.
    assert losses(run("validate", "sft", "--model", str(sft))) == pytest.approx(losses(sft)[-1:])

    align = run(
        "fit", "align", "--model.init_args.decoder", str(sft / "model"),
        "--trainer.max_steps", "8", *FEW,
    )  # fmt: skip
    assert same(decoder_of(align), written)

    common = [*FEW, "--trainer.max_epochs", "-1", "--trainer.max_steps", "8"]
    pretrain = run("fit", "reconstruct", "--model", str(align), *common)
    assert same(decoder_of(pretrain), written)
    # It begins with what alignment has learnt, at rates that alignment did not have.
    before = run("validate", "reconstruct", "--model", str(align))
    assert losses(before) == pytest.approx(losses(pretrain)[:1])
    assert losses(pretrain)[-1] != pytest.approx(losses(pretrain)[0], abs=1e-4)

    documents = run("fit", "sft_documents", f"--model={pretrain / 'model'}", *common)
    before = run("validate", "sft_documents", "--model", str(pretrain))
    after = run("validate", "sft_documents", "--model", str(documents))
    # With the adapter off the teacher is still the decoder that plain training gave.
    assert losses(before) == pytest.approx(losses(documents)[:1])
    assert losses(after) == pytest.approx(losses(documents)[-1:])
    assert losses(after)[0] < losses(before)[0]
    model = RefragModel.from_pretrained(documents / "model")
    assert model.config.decoder_name == str(sft / "model")
    assert model.config.rates == [4, 8]
    bare = {k.replace(".base_layer.", "."): v for k, v in model.decoder.state_dict().items()}
    assert same({k: v for k, v in bare.items() if ".lora_" not in k}, written)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", []),
        ("sft_documents", ["--data.init_args.num_workers=2"]),
        ("sft_documents", ["--data.init_args.tokens_per_batch=600"]),
        ("continue", ["--trainer.max_epochs=-1"]),
    ],
    ids=["plain", "workers", "tokens_per_batch", "continue"],
)
def test_a_run_broken_off_in_mid_epoch_goes_on_bit_for_bit(in_tmp, monkeypatch, name, options):
    options = [*options, "--trainer.log_every_n_steps=1", "--save_every=4", "--export=false"]
    options += ["--trainer.val_check_interval=6", "--trainer.max_steps=10"]
    options += ["--test_after_fit=false"]
    whole = run("fit", name, *options)

    step = LanguageModule.training_step

    def breaks_at_5(self, batch, batch_idx):
        if self.global_step == 5:
            raise ValueError("broken off")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModule, "training_step", breaks_at_5)
    before = set(Path("runs").glob("*/*"))
    with pytest.raises(SystemExit):
        run("fit", name, *options)
    (broken,) = set(Path("runs").glob("*/*")) - before
    monkeypatch.setattr(LanguageModule, "training_step", step)
    checkpoint = str(broken / "checkpoints" / "last.ckpt")
    resumed = run("fit", name, *options, "--ckpt_path", checkpoint)

    def later(folder):
        timeless = ({k: v for k, v in row.items() if "tokens_per" not in k} for row in rows(folder))
        return [row for row in timeless if int(row["step"]) >= 4]

    assert later(resumed) == later(whole)
    assert [int(row["step"]) for row in later(resumed) if "train/loss" in row] == [*range(4, 10)]
