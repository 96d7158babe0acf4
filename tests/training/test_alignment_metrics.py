import pytest
import torch

from refrag_lightning.training.alignment_metrics import (
    STUDENTS,
    AlignmentMetrics,
    replaced,
    report,
)


def _update(metric, student, teacher, mean, *, hits=0, one_token=0, kld=0.0, top1=0, pairs=0):
    metric.update(
        student,
        teacher,
        mean,
        nearest_hits=torch.tensor(hits),
        num_one_token=torch.tensor(one_token),
        kld=torch.tensor(kld),
        ce=torch.tensor(2 * kld),
        top1_hits=torch.tensor(top1),
        num_pairs=pairs,
        coverage=0.5 if pairs > 5 else 1.0,
        granularity=0.25,
        num_tokens=2 * pairs,
    )


def test_hand_worked_figures():
    metric = AlignmentMetrics()
    teacher = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    student = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    _update(metric, student, teacher, torch.zeros(2), hits=1, one_token=2, kld=2.0, top1=1, pairs=2)
    figures = {name: value.item() for name, value in metric.compute().items()}
    # Squared errors 1 and 4 over 4 numbers; against zero 1 + 9 + 4; the own mean is (2, 1).
    assert figures["mse"] == pytest.approx(5 / 4)
    assert figures["explained_variance"] == pytest.approx(1 - 5 / 14)
    assert figures["r2"] == pytest.approx(1 - 5 / 4)
    assert figures["nearest"] == 0.5
    assert figures["kld"] == 2.0
    assert figures["ce"] == 4.0
    assert figures["coverage"] == 1.0
    assert figures["granularity"] == 0.25
    assert figures["top1"] == 0.5


def test_batches_of_any_size_count_by_their_spans():
    torch.manual_seed(0)
    student, teacher, mean = torch.randn(10, 3), torch.randn(10, 3), torch.randn(3)
    whole, parts = AlignmentMetrics(), AlignmentMetrics()
    _update(whole, student, teacher, mean, hits=3, one_token=6, kld=1.3, top1=2, pairs=10)
    _update(parts, student[:7], teacher[:7], mean, hits=1, one_token=4, kld=1.0, top1=0, pairs=7)
    _update(parts, student[7:], teacher[7:], mean, hits=2, one_token=2, kld=2.0, top1=2, pairs=3)
    got, expected = parts.compute(), whole.compute()
    assert got.pop("coverage").item() == pytest.approx((0.5 * 14 + 1.0 * 6) / 20)
    assert expected.pop("coverage").item() == 0.5
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_the_mean_embedding_explains_nothing():
    metric = AlignmentMetrics()
    mean = torch.tensor([1.0, 2.0])
    _update(metric, mean.expand(4, 2), torch.randn(4, 2), mean)
    assert metric.compute()["explained_variance"].item() == pytest.approx(0, abs=1e-6)
    assert "nearest" not in metric.compute()
    assert "kld" not in metric.compute()


def test_replaced_changes_slots_alone():
    student = torch.arange(12.0).view(1, 6, 2)
    slots = torch.tensor([[-1, 0, 1, 2, 3, -1]])
    mean = torch.tensor([0.5, 0.25])
    assert replaced(student, slots, by="student", mean_D=mean) is student
    for name in STUDENTS:
        changed = replaced(student, slots, by=name, mean_D=mean)
        assert torch.equal(changed[:, [0, 5]], student[:, [0, 5]])
    assert not replaced(student, slots, by="zero", mean_D=mean)[:, 1:5].any()
    assert (replaced(student, slots, by="mean", mean_D=mean)[0, 1:5] == mean).all()
    shuffled = replaced(student, slots, by="shuffled", mean_D=mean)[0, 1:5]
    assert torch.equal(shuffled, student[0, [3, 4, 1, 2]])


def test_report_has_a_line_for_each_student():
    figures = {"explained_variance": torch.tensor(0.5), "kld": torch.tensor(1.25)}
    lines = report(dict.fromkeys(STUDENTS, figures), first=figures).splitlines()
    assert len(lines) == 1 + len(STUDENTS) + 1
    assert lines[1].split()[-5:] == ["0.500", "-", "-", "1.250", "-"]
