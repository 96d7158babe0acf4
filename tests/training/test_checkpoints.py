import pytest
import torch
from lightning.pytorch import Trainer

from refrag_lightning.cache import put
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.metrics_csv import MetricsCSV
from tests.training.toy import ToyDataModule, ToyModule


def fit(tmp_path, callback, **options):
    Trainer(
        accelerator="cpu",
        logger=MetricsCSV(tmp_path),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    ).fit(ToyModule(lr=0.01), ToyDataModule(batch_size=4))
    return torch.load(callback.last_model_path, weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_has_what_trains_and_is_small_and_complete(tmp_path):
    saved = fit(tmp_path, Checkpoints(tmp_path / "checkpoints"), max_steps=15)
    assert {key.split(".")[1] for key in saved["state_dict"]} == {"projector", "decoder"}
    assert saved["global_step"] == 15
    assert saved["ToyDataModule"]["ranks"] == [{"epoch": 1, "batch": 3, "processed": 15}]
    # best.ckpt is from the one validation, at the end of the first epoch of 12 batches.
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 12
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_saved_while_a_gradient_accumulates(tmp_path):
    class Noting(Checkpoints):
        saved: list[tuple[int, int]]

        def _save(self, trainer, path):
            self.saved.append((trainer.global_step, trainer.fit_loop.batch_idx + 1))
            Checkpoints._save(trainer, path)

    callback = Noting(tmp_path / "checkpoints", every_n_steps=1, monitor=None)
    callback.saved = []
    fit(tmp_path, callback, max_steps=8, accumulate_grad_batches=5, val_check_interval=3)
    # Epochs of 12 batches: steps after batches 5, 10 and 12. The validations after batches 3, 6
    # and 9 fall into an accumulation.
    assert callback.saved[:4] == [(1, 5), (2, 10), (3, 12), (4, 5)]


def test_wrong_settings_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"save_every \(0\)"):
        Checkpoints(tmp_path, every_n_steps=0)
    with pytest.raises(ValueError, match=r"mode \('best'\)"):
        Checkpoints(tmp_path, mode="best")


def test_files_and_folders_take_each_others_place(tmp_path):
    path, new = tmp_path / "last.ckpt", tmp_path / "last.ckpt.partial"

    def written(kind):
        if kind == "folder":
            new.mkdir()
            (new / "shard").write_text("x")
        else:
            new.write_text("x")

    for kind in ("file", "folder", "folder", "file", "file"):
        written(kind)
        put(new, path)
        assert path.is_dir() == (kind == "folder")
        assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
