import math

import pytest
import torch

from refrag_lightning.model.losses import (
    argmax_cross_entropy,
    explained_variance,
    nearest_embedding,
    next_token_loss,
    segment_mean,
    span_kld,
)


def test_segment_mean_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0], [5.0, 5.0]])
    means = segment_mean(x, torch.tensor([1, 1, -1, 0]), 3)
    assert means.tolist() == [[5.0, 5.0], [2.0, 4.0], [0.0, 0.0]]


def test_segment_mean_sums_bfloat16_in_float32():
    x = torch.ones(4096, 1, dtype=torch.bfloat16) * 1.0078125
    mean = segment_mean(x, torch.zeros(4096, dtype=torch.long), 1)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.0078125, abs=1e-6)


def test_segment_mean_gives_each_vector_its_share_of_the_gradient():
    x = torch.zeros(3, 1, requires_grad=True)
    segment_mean(x, torch.tensor([0, 0, -1]), 1).sum().backward()
    assert x.grad.flatten().tolist() == [0.5, 0.5, 0.0]


def test_span_kld_by_hand():
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    forward = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    reverse = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert span_kld(student, teacher).item() == pytest.approx(forward)
    assert span_kld(student, teacher, direction="reverse").item() == pytest.approx(reverse)


def test_span_kld_temperature_divides_logits_and_multiplies_by_its_square():
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    at_two = span_kld(student, teacher, temperature=2.0)
    assert at_two.item() == pytest.approx(4 * span_kld(student / 2, teacher / 2).item())


def test_span_kld_is_zero_for_equal_logits_and_never_negative():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    assert span_kld(logits, logits).abs().item() < 1e-7
    assert span_kld(logits, logits.flip(0)).item() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, r"temperature \(0.0\)"), ({"direction": "both"}, "'both'")],
)
def test_span_kld_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        span_kld(torch.zeros(1, 2), torch.zeros(1, 2), **options)


def test_losses_without_pairs_are_zero_with_zero_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    none = torch.zeros(0, 3)
    loss = span_kld(logits[:0], none) + argmax_cross_entropy(logits[:0], none)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_argmax_cross_entropy_by_hand():
    student = torch.tensor([[0.7, 0.3], [0.2, 0.8]]).log()
    teacher = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    expected = -(math.log(0.3) + math.log(0.8)) / 2
    assert argmax_cross_entropy(student, teacher).item() == pytest.approx(expected)


def test_next_token_loss_by_hand():
    logits = torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]]).log()
    assert next_token_loss(logits, torch.tensor([[-100, 1, 0]])).item() == pytest.approx(
        -(math.log(0.1) + math.log(0.4)) / 2
    )
    assert next_token_loss(logits, torch.tensor([[1, -100, -100]])).item() == 0


def test_explained_variance_by_hand():
    assert explained_variance(torch.tensor(0.25), torch.tensor(1.0)).item() == 0.75


def test_nearest_embedding_equals_cdist_in_any_slices():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(101, 8, generator=generator)
    vectors = torch.randn(37, 8, generator=generator)
    expected = torch.cdist(vectors, table).argmin(-1)
    for slice_size in (1, 10, 101, 1000):
        assert torch.equal(nearest_embedding(vectors, table, slice_size=slice_size), expected)


def test_nearest_embedding_is_euclidean_and_takes_the_first_of_equals():
    # By dot product the long vector would win.
    table = torch.tensor([[10.0, 10.0], [1.0, 0.9], [1.0, 0.9]])
    assert nearest_embedding(torch.tensor([[1.0, 1.0]]), table, slice_size=2).tolist() == [1]


def test_nearest_embedding_is_exact_under_autocast():
    table = torch.tensor([[1.0, 0.0], [1.001, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_embedding(torch.tensor([[1.002, 0.0]]), table).tolist() == [1]
