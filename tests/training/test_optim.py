import math

import pytest
import torch

from refrag_lightning.training.optim import (
    WarmupCosine,
    adamw,
    parameter_groups,
    warmup_cosine,
    warmup_steps,
)
from tests.training.toy import ToyModule


@pytest.fixture
def module():
    module = ToyModule()
    module.configure_model()
    return module


def test_groups_by_part_and_decay_worked_by_hand(module):
    groups = parameter_groups(
        module.named_parameters(), lr={"projector": 0.1, "decoder": 0.2}, weight_decay=0.3
    )
    found = {
        group["name"]: (group["lr"], group["weight_decay"], len(group["params"]))
        for group in groups
    }
    # The projector has a matrix, its bias, and a norm's weight and bias; the encoder is frozen.
    assert found == {
        "projector/decay": (0.1, 0.3, 1),
        "projector/no_decay": (0.1, 0.0, 3),
        "decoder/decay": (0.2, 0.3, 1),
        "decoder/no_decay": (0.2, 0.0, 1),
    }


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"projector": 0.1}, "lr has no rate for 'decoder', which trains"),
        ({"projector": 0.1, "decoder": 0.1, "heads": 0.1}, "lr names 'heads', the model's parts"),
    ],
)
def test_a_rate_too_few_or_too_many_is_an_error(module, lr, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(module.named_parameters(), lr=lr, weight_decay=0.0)


def test_nothing_to_train_is_an_error(module):
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing trains"):
        parameter_groups(module.named_parameters(), lr=0.1, weight_decay=0.0)


def test_warmup_and_cosine_worked_by_hand():
    factors = [warmup_cosine(step, warmup_steps=3, total_steps=11, floor=0.2) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert math.isclose(factors[7], 0.6)  # half way down: the mean of 1 and 0.2
    assert factors[11:] == [0.2, 0.2]
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_warmup_is_steps_or_a_share():
    assert warmup_steps(7, total_steps=1000) == 7
    assert warmup_steps(0.05, total_steps=1000) == 50
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=r"warmup \(" + str(wrong)):
            warmup_steps(wrong, total_steps=1000)


def test_scheduler_takes_new_base_rates_in_the_middle_of_a_run(module):
    def scheduler(lr):
        groups = parameter_groups(module.named_parameters(), lr=lr, weight_decay=0.0)
        return WarmupCosine(adamw(groups, betas=(0.9, 0.95)), warmup=2, total_steps=9, floor=0.1)

    fresh, changed = scheduler(0.5), scheduler(0.1)
    for _ in range(4):
        for one in (fresh, changed):
            one.optimizer.step()
            one.step()
    changed.apply([0.5] * len(changed.base_lrs))
    for _ in range(3):
        assert changed.get_last_lr() == fresh.get_last_lr()
        rates = [group["lr"] for group in changed.optimizer.param_groups]
        assert rates == fresh.get_last_lr()
        for one in (fresh, changed):
            one.optimizer.step()
            one.step()


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 5), torch.randn(5, 5)
    results = []
    for make in (
        adamw,
        lambda groups, betas: torch.optim.AdamW(groups, betas=betas, foreach=False),
    ):
        parameter = torch.nn.Parameter(start.clone())
        groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.1}]
        optimizer = make(groups, betas=(0.9, 0.95))
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1])
