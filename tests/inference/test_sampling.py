"""Sampling: the right distribution, and nobody else's random numbers."""

import pytest
import torch

from refrag_lightning.inference.request import Sampling
from refrag_lightning.inference.sampling import BatchSampler, Sampler

SCORES = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
NONE = torch.zeros((1, 0), dtype=torch.long)


def draws(sampling, number, scores=SCORES):
    sampler = Sampler(sampling)
    return [int(sampler(NONE, scores.clone()).argmax()) for _ in range(number)]


def shares(tokens, size=6):
    return torch.bincount(torch.tensor(tokens), minlength=size) / len(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature):
    number = 4000
    found = shares(draws(Sampling(temperature=temperature, seed=1), number))
    expected = (SCORES[0] / temperature).softmax(-1)
    # Four standard errors of a share.
    error = 4 * (expected * (1 - expected) / number).sqrt()
    assert (found - expected).abs().le(error + 1e-3).all(), (found, expected)


def test_top_k_and_top_p_draw_among_the_likely():
    assert set(draws(Sampling(temperature=1.0, top_k=2, seed=0), 300)) == {0, 1}
    # Softmax of the scores: .54 .20 .12 .07 .03 .00, so 0.7 takes the first two.
    assert set(draws(Sampling(temperature=1.0, top_p=0.7, seed=0), 300)) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, seed=0), 300)) == {0}


def test_greedy_takes_the_largest_and_draws_nothing():
    sampler = Sampler(Sampling())
    assert sampler.is_idle and sampler.seed is None
    assert torch.equal(sampler(NONE, SCORES.clone()), SCORES)


def test_the_repetition_penalty_looks_at_the_answer():
    sampler = Sampler(Sampling(repetition_penalty=3.0))
    scores = sampler(torch.tensor([[0, 4]]), SCORES.clone())
    # Positive scores are divided, negative ones multiplied (Keskar et al. 2019).
    assert scores[0].tolist() == pytest.approx([2 / 3, 1.0, 0.5, 0.0, -3.0, -3.0])


def test_a_seed_gives_the_same_tokens_and_no_seed_tells_one():
    one, two = (draws(Sampling(temperature=1.0, seed=s), 50) for s in (3, 4))
    assert one == draws(Sampling(temperature=1.0, seed=3), 50) != two
    sampler = Sampler(Sampling(temperature=1.0))
    assert sampler.seed is not None
    tokens = [int(sampler(NONE, SCORES.clone()).argmax()) for _ in range(50)]
    assert tokens == draws(Sampling(temperature=1.0, seed=sampler.seed), 50)
    assert Sampler(Sampling(temperature=1.0)).seed != sampler.seed


def test_the_global_random_state_stays_as_it_is():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(Sampling(temperature=1.0), 3)
    assert torch.equal(torch.rand(3), expected)


def test_lines_of_a_batch_are_drawn_apart():
    settings = [
        Sampling(temperature=1.0, seed=1),
        Sampling(),
        Sampling(temperature=0.7, top_k=3, seed=2),
    ]
    batch = BatchSampler([Sampler(s) for s in settings], lambda line: False)
    tokens = [batch(NONE.expand(3, 0), SCORES.repeat(3, 1)).argmax(-1).tolist() for _ in range(30)]
    for line, sampling in enumerate(settings):
        assert [step[line] for step in tokens] == draws(sampling, 30)


def test_a_line_that_is_over_draws_nothing():
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    batch = BatchSampler([sampler], lambda line: True)
    assert torch.equal(batch(NONE, SCORES.clone()), SCORES)
    first = int(sampler(NONE, SCORES.clone()).argmax())
    assert first == draws(Sampling(temperature=1.0, seed=1), 1)[0]
