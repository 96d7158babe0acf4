import pytest
import torch
import torch.nn.functional as F

from refrag_lightning.model.losses import span_kld, target_losses

P, D, V = 23, 6, 40


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(V, D, generator=generator, requires_grad=True),
        "student": torch.randn(P, D, generator=generator, requires_grad=True),
        "targets": torch.randint(V, (P,), generator=generator),
        "teacher": torch.randn(P, D, generator=generator, requires_grad=True),
    }


def losses(case, **options):
    return target_losses(
        lambda x: x @ case["weight"].T, case["student"], case["targets"], **options
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 4096])
def test_losses_and_gradients_are_those_of_all_logits_at_once(case, chunk_size):
    logits = case["student"] @ case["weight"].T
    nll = -logits.log_softmax(-1)[torch.arange(P), case["targets"]]
    teacher = (case["teacher"] @ case["weight"].T).detach()
    kl = torch.stack(
        [span_kld(logits[i : i + 1], teacher[i : i + 1], temperature=2.0) for i in range(P)]
    )
    got = losses(case, teacher_PD=case["teacher"], temperature=2.0, chunk_size=chunk_size)
    assert torch.allclose(got.nll_P, nll, atol=1e-5)
    assert torch.allclose(got.kl_P, kl, atol=1e-5)
    assert got.hits_P.tolist() == (logits.argmax(-1) == case["targets"]).float().tolist()
    wanted = [case["student"], case["weight"]]
    expected = torch.autograd.grad((nll + 0.3 * kl).mean(), wanted)
    found = torch.autograd.grad((got.nll_P + 0.3 * got.kl_P).mean(), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_the_teacher_gets_no_gradient_and_may_have_a_head_of_its_own(case):
    other = torch.randn(V, 3, generator=torch.Generator().manual_seed(1))
    states = torch.randn(P, 3, requires_grad=True)
    got = losses(case, teacher_PD=states, teacher_head=lambda x: x @ other.T, chunk_size=4)
    logits = case["student"] @ case["weight"].T
    expected = span_kld(logits, states @ other.T)
    assert got.kl_P.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    got.kl_P.sum().backward()
    assert states.grad is None
    # A teacher that says the same teaches nothing.
    same = losses(case, teacher_PD=case["student"])
    assert same.kl_P.abs().max() < 1e-5
    assert torch.autograd.grad(same.kl_P.sum(), case["student"])[0].abs().max() < 1e-5


def test_no_more_than_a_slice_of_logits_is_there_at_any_time(case):
    kept, shapes = [], []

    def head(x):
        shapes.append(x.shape[0])
        return x @ case["weight"].T

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        got = target_losses(head, case["student"], case["targets"], chunk_size=5)
    # Kept for the backward pass: of all logits only the last slice's, which comes first there.
    # (The head keeps its weights.)
    assert {shape for shape in kept if shape[-1:] == (V,)} - {(D, V)} == {(3, V)}
    got.nll_P.sum().backward()
    assert shapes == [5, 5, 5, 5, 3, 5, 5, 5, 5]
    with torch.no_grad():
        target_losses(head, case["student"], case["targets"], chunk_size=12)
    assert shapes[9:] == [12, 11]


def test_without_targets_the_losses_are_empty_and_still_connected(case):
    got = target_losses(lambda x: x @ case["weight"].T, case["student"][:0], case["targets"][:0])
    assert got.nll_P.shape == got.hits_P.shape == (0,)
    got.nll_P.sum().backward()
    assert case["student"].grad.abs().sum() == 0


def test_half_precision_states_give_float32_losses(case):
    weight = case["weight"].detach().bfloat16()
    got = target_losses(lambda x: x @ weight.T, case["student"].bfloat16(), case["targets"])
    assert got.nll_P.dtype == got.hits_P.dtype == torch.float32
    expected = F.cross_entropy(
        (case["student"].bfloat16() @ weight.T).float(), case["targets"], reduction="none"
    )
    assert torch.allclose(got.nll_P, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\)"),
        ({"chunk_size": 0}, r"chunk_size \(0\)"),
        ({"teacher_PD": torch.zeros(3, D)}, "teacher_PD holds 3 states for 23 targets"),
    ],
)
def test_bad_values_are_quoted(case, options, message):
    with pytest.raises(ValueError, match=message):
        losses(case, **options)
