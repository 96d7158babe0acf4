"""PerplexityEvaluation: its grid against plain forward passes, a window at a time."""

import json

import lightning
import pytest
import torch
import torch.nn.functional as F

from refrag_lightning import RefragModel
from refrag_lightning.data import PerplexityDataModule, PydocSource
from refrag_lightning.training.evaluate_perplexity import PerplexityEvaluation


def _data(**options):
    given = {"contexts": [16, 32], "continuations": [4, 8], "num_windows": 4, "batch_size": 3}
    return PerplexityDataModule(PydocSource(limit=40), **(given | options))


def _test(tmp_path, module, data):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.test(module, data, verbose=False)
    return json.loads((tmp_path / "report.json").read_text())["tables"]["Log-perplexity"]


def test_the_grid_is_that_of_plain_forward_passes(folder, tmp_path):
    data = _data()
    table = _test(tmp_path, PerplexityEvaluation(str(folder), num_draws=50), data)
    found = {
        (row[0], name): cell["value"]
        for row in table["rows"]
        for name, cell in zip(table["columns"][1:], row[1:], strict=True)
    }
    model = RefragModel.from_pretrained(folder)
    expected: dict[tuple[str, str], list] = {}
    names = {"compressed": "rows"}
    for loader in data.test_dataloader():
        for window in loader.dataset.dataset.windows:
            batch = data.collate([window])
            with torch.no_grad():
                logits = model(
                    **{k: v for k, v in batch.student.items() if k != "labels"}
                ).logits.flatten(0, 1)
            nats = F.cross_entropy(logits[batch.predicting], batch.targets, reduction="none")
            kind = names.get(window.cell.reading, window.cell.reading)
            name = kind if kind in ("full", "none") else f"{kind}@{window.rate}"
            for length in (4, 8):
                for context in [window.cell.context] if window.cell.context else (16, 32):
                    expected.setdefault((f"{context}+{length}", name), []).append(nats[:length])
    assert {*expected} == {*found} and len(found) == 4 * 6
    for key, pieces in expected.items():
        assert len(pieces) == 4
        assert found[key] == pytest.approx(torch.cat(pieces).mean().item(), rel=1e-4), key


def test_rows_of_a_plain_model_are_refused_and_the_rest_is_measured(tmp_path):
    module = PerplexityEvaluation("tiny/decoder", num_draws=50)
    with pytest.raises(ValueError, match="has no rows: leave compressed out of the data's"):
        _test(tmp_path, module, _data())
    module = PerplexityEvaluation("tiny/decoder", num_draws=50)
    table = _test(tmp_path, module, _data(readings=["full", "none"]))
    assert table["columns"][1:] == ["none", "full"]


def test_a_window_that_the_decoder_has_no_room_for_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("refrag_lightning.model.refrag.num_positions", lambda model: 30)
    with pytest.raises(ValueError, match=r"window-\d \(full-32\) takes .* the decoder has 30: ask"):
        _test(tmp_path, PerplexityEvaluation(str(folder), num_draws=50), _data())
