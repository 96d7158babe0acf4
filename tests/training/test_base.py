import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from refrag_lightning.data.examples import Example, collate
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer
from refrag_lightning.training.base import check_precision
from refrag_lightning.training.callbacks import SpeedMonitor
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.finite import FiniteWatch, NonFiniteError
from refrag_lightning.training.metrics_csv import MetricsCSV
from refrag_lightning.training.optim import part_of, warmup_cosine
from refrag_lightning.training.run_folder import default_name
from refrag_lightning.training.sharded import ShardedStrategy
from refrag_lightning.training.trained_state import frozen_keys
from tests.training.toy import ToyDataModule, ToyModule


@pytest.fixture
def module():
    module = ToyModule(lr=0.01)
    module.configure_model()
    return module


def trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **{"max_steps": 3, "logger": False, **options},
    )


def test_state_dict_has_what_trains_and_nothing_else(module):
    assert {part_of(key) for key in module.state_dict()} == {"projector", "decoder"}
    assert list(module.state_dict(prefix="x.")) == ["x." + key for key in module.state_dict()]
    destination = {"other": 1}
    assert module.state_dict(destination=destination) is destination
    assert set(destination) == {"other", *module.state_dict()}


def test_loading_changes_what_trains_and_leaves_the_rest(module):
    other = ToyModule()
    other.configure_model()
    nn.init.ones_(other.model.decoder.weight)
    nn.init.ones_(other.model.encoder[0].weight)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.model.decoder.weight, module.model.decoder.weight)
    assert (other.model.encoder[0].weight == 1).all()


def test_loading_names_what_does_not_fit(module):
    state = module.state_dict()
    whole = dict(nn.Module.state_dict(module.model, prefix="model."))
    with pytest.raises(ValueError, match=r"it has model\.encoder\.0\.weight, model\.encoder\.0\.b"):
        module.load_state_dict({**whole, **state})
    with pytest.raises(ValueError, match=r"it lacks model\.decoder\.weight"):
        module.load_state_dict({k: v for k, v in state.items() if k != "model.decoder.weight"})
    with pytest.raises(ValueError, match=r"has the shape \(2, 8\), this run's model \(1, 8\)"):
        module.load_state_dict({**state, "model.decoder.weight": torch.zeros(2, 8)})


def test_frozen_keys_with_tied_weights_and_buffers():
    class Part(nn.Module):
        def __init__(self, trains):
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            self.head = nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(()))
            self.requires_grad_(trains)

    whole = nn.ModuleDict({"frozen": Part(False), "trained": Part(True)})
    assert set(frozen_keys(whole)) == {
        "frozen.embed.weight", "frozen.head.weight", "frozen.scale",
    }  # fmt: skip


def test_parts_that_train_are_in_train_mode_and_frozen_ones_in_eval_mode(tmp_path):
    module = ToyModule(lr=0.01)
    trainer(tmp_path).fit(module, ToyDataModule())
    assert not any(part.training for part in module.model.encoder.modules())
    assert all(part.training for part in module.model.projector.modules())
    assert module.num_tokens == 3 * 8 * 4


def test_the_stop_comes_before_the_optimiser_steps(tmp_path):
    module = ToyModule(lr=0.01, nan_at=2)
    with pytest.raises(NonFiniteError, match="the loss of batch 2 of epoch 0 is nan"):
        trainer(tmp_path).fit(module, ToyDataModule())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_metric_is_logged_only_for_batches_that_have_it(tmp_path):
    class Sometimes(ToyModule):
        def training_step(self, batch, batch_idx):
            loss = self._loss(batch)
            extra = {"even": float(batch_idx)} if batch_idx % 2 == 0 else {}
            self.log_train({"loss": loss, **extra})
            return loss

    logger = MetricsCSV(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "max_steps": 5}
    trainer(tmp_path, **options).fit(Sometimes(lr=0.01), ToyDataModule())
    rows = list(csv.DictReader(logger.path.open()))
    rows = [row for row in rows if row["train/loss"]]
    assert [row["train/even"] for row in rows] == ["0.0", "", "2.0", "", "4.0"]


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    module = ToyModule(lr=0.01)
    module.configure_model()
    module.model.decoder.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="the gradient norm of batch 0 of epoch 0 is"):
        trainer(tmp_path).fit(module, ToyDataModule())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_the_message_names_the_texts():
    watch = FiniteWatch()
    watch.begin(epoch=1, batch_idx=3, ids=["a", "b"])
    watch.check("loss", torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match=r"batch 3 of epoch 1 \(texts a, b\) is inf"):
        watch.check("loss", torch.tensor(float("inf")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_stop_comes_at_the_latest_before_a_checkpoint():
    watch = FiniteWatch()
    watch.begin(epoch=0, batch_idx=5)
    with pytest.raises(NonFiniteError, match="batch 5"):
        watch.check("loss", torch.tensor(float("nan"), device="cuda"))
        watch.begin(epoch=0, batch_idx=6)
        watch.settle()


def test_an_unknown_number_of_steps_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(ToyModule(), ToyDataModule())


def test_half_precision_that_loses_values_is_refused():
    for precision in ("16-mixed", "16-true", 16, "16", "bf16-true"):
        with pytest.raises(ValueError, match="use bf16-mixed"):
            check_precision(precision)
    for precision in ("bf16-mixed", "32-true", 32, None):
        check_precision(precision)


def test_a_strategy_that_leaves_gradients_apart_is_refused(module):
    trainer = SimpleNamespace(precision="32-true", strategy=ModelParallelStrategy())
    module.trainer = trainer
    with pytest.raises(ValueError, match=r"\(ModelParallelStrategy\) does not know what"):
        module.setup("fit")
    trainer.strategy = ShardedStrategy()
    module.setup("fit")


def test_default_names():
    assert default_name("AlignmentModule") == "align"
    assert default_name("SFTModule") == "sft"
    assert default_name("PretrainModule") == "pretrain"
    assert default_name("MyToy") == "my-toy"


def test_the_rates_of_a_run_are_the_peak_times_warmup_and_cosine(tmp_path):
    module = ToyModule(lr={"projector": 0.02, "decoder": 0.001}, warmup=3, lr_floor=0.1)
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            groups = trainer.optimizers[0].param_groups
            seen.append({group["name"].split("/")[0]: group["lr"] for group in groups})

    trainer(tmp_path, max_steps=8, callbacks=[Rates()]).fit(module, ToyDataModule(batch_size=4))
    for step, rates in enumerate(seen):
        factor = warmup_cosine(step, warmup_steps=3, total_steps=8, floor=0.1)
        assert rates == pytest.approx({"projector": 0.02 * factor, "decoder": 0.001 * factor})
    assert seen[3]["projector"] == pytest.approx(0.02)
    assert len(seen) == 8


def tokens_logged(folder, *, max_steps, devices=1, ckpt_path=None):
    module = ToyModule(lr=0.01)
    # What two processes learnt is put into the module of this one.
    module.configure_model()
    Trainer(
        accelerator="cpu",
        strategy="auto" if devices == 1 else "ddp_fork",
        devices=devices,
        logger=MetricsCSV(folder),
        callbacks=[SpeedMonitor(), Checkpoints(folder, every_n_steps=1, monitor=None)],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        max_steps=max_steps,
    ).fit(module, ToyDataModule(size=48, batch_size=4), ckpt_path=ckpt_path)
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/tokens"]) for row in csv.DictReader(file) if row["train/tokens"]]


def check_tokens_logged(folder, devices):
    # A sample counts as 4 tokens, so a step takes 4 * 4 on each rank.
    step = 16 * devices
    assert tokens_logged(folder / "a", max_steps=3, devices=devices) == [2 * step]
    last = folder / "a" / "last.ckpt"
    assert torch.load(last, weights_only=False)["num_tokens"] == 3 * step
    resumed = tokens_logged(folder / "b", max_steps=6, devices=devices, ckpt_path=last)
    assert resumed == [4 * step, 6 * step]


def test_tokens_are_counted_on_after_a_resume(tmp_path):
    check_tokens_logged(tmp_path, devices=1)


def test_tokens_of_all_ranks_are_counted(tmp_path):
    # In a process of its own: ranks forked from one that has used threads would wait forever.
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.training.test_base import check_tokens_logged\n"
        "check_tokens_logged(Path(sys.argv[1]), devices=2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_batches_go_to_a_gpu_without_waiting(monkeypatch):
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    batch = collate([Example((Segment("a", "text"), Segment("b", "text", train=True)))], tokenizer)
    calls = []
    monkeypatch.setattr(type(batch), "to", lambda *given, **options: calls.append((given, options)))
    ToyDataModule().transfer_batch_to_device(batch, torch.device("cuda:0"), 0)
    assert calls == [((batch, torch.device("cuda:0")), {"non_blocking": True})]
