"""TargetSums against sums by hand, in one process and put together from two."""

import pytest
import torch
from torchmetrics.utilities.data import dim_zero_cat

from refrag_lightning.training.language_metrics import Figures, TargetSums


def _update(metric, nll, hits, *, tasks, task_ids, rate, weights=None):
    nll = torch.tensor(nll)
    weights = torch.ones_like(nll) if weights is None else torch.tensor(weights)
    metric.update(
        nll,
        torch.tensor(hits, dtype=torch.bool),
        2 * nll,
        weights,
        task_ids=torch.tensor(task_ids),
        tasks=tasks,
        rate=rate,
    )


def _fill(metric, part):
    if part in (0, None):
        _update(
            metric,
            [1.0, 2.0, 6.0],
            [1, 0, 1],
            tasks=("answer", "reconstruct"),
            task_ids=[1, 0, 1],
            rate=4,
            weights=[1.0, 0.0, 0.5],
        )
    if part in (1, None):
        _update(metric, [4.0], [0], tasks=("réponse",), task_ids=[0], rate=16)
        _update(metric, [3.0, 5.0], [1, 1], tasks=("answer",), task_ids=[0, 0], rate=4)


EXPECTED = {
    ("answer", 4): Figures(10 / 3, 2 / 3, 3),
    ("reconstruct", 4): Figures(3.5, 1.0, 2),
    ("réponse", 16): Figures(4.0, 0.0, 1),
}
# Losses 2, 4, 12, 8, 6, 10 with weights 1, 0, 0.5, 1, 1, 1.
LOSS = (2 + 6 + 8 + 6 + 10) / 4.5


def test_means_by_task_and_rate():
    metric = TargetSums()
    _fill(metric, None)
    loss, figures = metric.compute()
    assert loss.item() == pytest.approx(LOSS)
    assert figures.keys() == EXPECTED.keys()
    for key, row in EXPECTED.items():
        assert figures[key] == pytest.approx(row)
    metric.reset()
    _update(metric, [1.0], [1], tasks=("answer",), task_ids=[0], rate=4)
    assert metric.compute()[1] == {("answer", 4): Figures(1.0, 1.0, 1)}


@pytest.mark.parametrize("parts", [(0, 1), (1, 0), (None, "nothing")])
def test_ranks_put_their_records_together(parts):
    """torchmetrics gathers each rank's records, cut to one tensor, and joins them."""
    ranks = []
    for part in parts:
        metric = TargetSums()
        _fill(metric, part)
        ranks.append(dim_zero_cat(metric.records) if metric.records else torch.tensor([]))
    here = TargetSums(
        distributed_available_fn=lambda: True, dist_sync_fn=lambda records, group=None: ranks
    )
    _fill(here, parts[0])
    loss, figures = here.compute()
    assert loss.item() == pytest.approx(LOSS)
    for key, row in EXPECTED.items():
        assert figures[key] == pytest.approx(row)


def test_a_long_name_is_refused():
    with pytest.raises(ValueError, match=r"'aaaa.*more than 32 bytes"):
        _update(TargetSums(), [1.0], [1], tasks=("a" * 33,), task_ids=[0], rate=4)
