"""Losses of co-learning against slow forms, and what the safeguards let through."""

import numpy as np
import pytest
import torch
from torch import nn

from tudsr_core.training.colearn_config import SafeguardsConfig
from tudsr_core.training.colearn_losses import (
    diversity,
    gradient_penalty,
    hinge_of_critic,
    hinge_of_maker,
    jitter,
    low_frequency,
    scale_gradient,
)


def streams(count, seed=0):
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def test_hinges_are_the_means_of_every_head():
    fake, real = (
        [torch.tensor([[-2.0, 0.5]]), torch.tensor([[1.0]])],
        [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0]])],
    )
    assert float(hinge_of_maker(fake)) == pytest.approx(-(-0.75 + 1.0))
    terms = hinge_of_critic(fake, real)
    assert float(terms["fake"]) == pytest.approx((0 + 1.5) / 2 + 2) and float(terms["real"]) == pytest.approx(0.25 + 2)


def test_the_gradient_penalty_is_that_of_the_analytic_gradient(noise):
    """D(x) = sum of a x^2 has the gradient 2 a x."""

    class Square(nn.Module):
        a = nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return [self.a * x**2]

    x, critic = noise(2, 3, 4, 4), Square()
    penalty = gradient_penalty(critic, x)
    wanted = ((2 * 0.7 * x) ** 2).sum((1, 2, 3)).mean()
    assert float(penalty.detach()) == pytest.approx(float(wanted), rel=1e-6)
    penalty.backward()
    assert float(critic.a.grad) == pytest.approx(float(2 * wanted / 0.7), rel=1e-5)


def test_low_frequencies_see_colour_and_no_noise(noise):
    grey = torch.full((1, 3, 32, 32), 0.5)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16) * 0.2
    assert low_frequency(grey + checks, grey) < 1e-3
    assert float(low_frequency(grey + checks, grey, 0)) == pytest.approx(0.2)
    assert float(low_frequency(grey + 0.1, grey)) == pytest.approx(0.1, abs=1e-6)


def test_diversity_falls_as_results_differ_more_than_their_noise(noise):
    a, b = noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    value = float(diversity(a, b, (2 * a, 2 * b)))
    assert value == pytest.approx(-0.5, abs=1e-6)
    assert diversity(a, a, (a, b)) == 0 and float(diversity(a, b, (a, a))) > -1e4


def test_jitter_hides_what_is_small_and_keeps_the_picture(noise):
    y, x = np.mgrid[0:32, 0:32]
    smooth = torch.from_numpy((np.sin(x / 9) * np.cos(y / 7) * 0.3 + 0.5).astype(np.float32)).expand(2, 3, 32, 32)
    config = SafeguardsConfig()
    made = jitter(smooth, config, streams(2))
    assert 0 < (made - smooth).abs().mean() < 0.03 and (made[0] - made[1]).abs().max() > 1e-3
    assert torch.equal(made, jitter(smooth, config, streams(2)))
    off = SafeguardsConfig(noise=0, shift=0, quality=100)
    assert torch.equal(jitter(smooth, off, streams(2)), smooth)
    moved = jitter(smooth, SafeguardsConfig(noise=0, shift=1, quality=100), streams(2))[0, 0]
    down, right, _ = torch.rand(3, generator=streams(1)[0]).tolist()
    wanted = np.sin((x - (2 * right - 1)) / 9) * np.cos((y - (2 * down - 1)) / 7) * 0.3 + 0.5
    assert (moved[2:-2, 2:-2] - torch.from_numpy(wanted)[2:-2, 2:-2]).abs().max() < 2e-3
    # Of a message of half a step of 8 bit nothing can be told from the noise.
    leaf = smooth.clone().requires_grad_()
    jitter(leaf, config, streams(2)).sum().backward()
    assert leaf.grad.isfinite().all() and float(leaf.grad.mean()) == pytest.approx(1, abs=0.05)


def test_a_scaled_gradient_leaves_the_value():
    x = torch.tensor([3.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    (y * 2).backward()
    assert y == x and float(x.grad) == 0.5


@pytest.mark.parametrize(
    "wrong", [{"noise": -1}, {"shift": 2}, {"quality": 0}, {"snapshots": 0}, {"every": 0}, {"blur": -1}]
)
def test_safeguards_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be from"):
        SafeguardsConfig(**wrong)
