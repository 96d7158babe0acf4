import pytest
import torch

from refrag_lightning.model.projector import Projector


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_output_starts_at_the_scale_whatever_the_input_scale_is(kind, scale):
    torch.manual_seed(0)
    projector = Projector(input_size=96, output_size=160, kind=kind, scale=scale)
    for input_scale in (0.01, 1.0, 50.0):
        states = torch.randn(512, 96) * input_scale
        spread = projector(states).square().mean().sqrt().item()
        assert spread == pytest.approx(scale, rel=0.1)


def test_shapes_and_parameters_of_the_mlp():
    projector = Projector(input_size=6, output_size=10, kind="mlp", scale=1.0)
    assert projector(torch.zeros(3, 2, 6)).shape == (3, 2, 10)
    # 2 layers with hidden size D (the paper's) and the scale.
    assert sum(p.numel() for p in projector.parameters()) == 6 * 10 + 10 + 10 * 10 + 10 + 1


def test_half_precision_states_are_projected_in_float32():
    projector = Projector(input_size=6, output_size=10, kind="linear", scale=1.0)
    assert projector(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.float32
