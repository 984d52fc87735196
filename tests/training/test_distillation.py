"""The teacher's chain and the student's three losses against sums written out."""

import pytest
import torch
from torch import nn

from tudsr_core.diffusion.residual_shift import shift_schedule
from tudsr_core.training.distillation import chain_loss, distillation_terms, run_chain

SHIFT = shift_schedule(4, 0.2)


class Small(nn.Module):
    """A network of a single convolution that hears its index."""

    def __init__(self, seed):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1).double()
        with torch.no_grad():
            for number, one in enumerate(self.parameters()):
                one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(seed + number)) * 0.3)

    def forward(self, x, index):
        return self.conv(x) * (1 + 0.1 * index)


def slow_square(a, b):
    total = sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return total / a.numel()


def test_the_chain_is_the_steps_one_after_the_other(noise):
    network, y, eps = Small(0), noise(2, 2, 4, 4).double(), noise(2, 2, 4, 4, seed=1).double()
    x = y + SHIFT.kappa * SHIFT.eta[3] ** 0.5 * eps
    with torch.no_grad():
        for i in (3, 2, 1):
            x0 = network(x / (SHIFT.kappa**2 * SHIFT.eta[i] + 1) ** 0.5, i)
            eta, before = SHIFT.eta[i], SHIFT.eta[i - 1]
            x = (1 - before) * x0 + before * y + (before / eta) ** 0.5 * (x - (1 - eta) * x0 - eta * y)
        wanted = network(x / (SHIFT.kappa**2 * SHIFT.eta[0] + 1) ** 0.5, 0)
    made = run_chain(network, y, eps, SHIFT)
    assert torch.allclose(made, wanted, atol=1e-12) and not made.requires_grad


def test_a_teacher_that_knows_the_truth_makes_it(noise):
    x0, y, eps = (noise(1, 2, 4, 4, seed=seed).double() for seed in range(3))
    assert torch.equal(run_chain(lambda x, index: x0, y, eps, SHIFT), x0)
    assert chain_loss(lambda x, index: x0, x0, y, eps, 2, SHIFT) == 0
    seen = []
    chain_loss(lambda x, index: seen.append(x) or x, x0, y, eps, 2, SHIFT)
    assert torch.allclose(seen[0], SHIFT.diffuse(x0, y, eps, 2) / (4 * SHIFT.eta[2] + 1) ** 0.5)


def test_the_three_losses_are_sinsrs(noise):
    student, taught, x0, start = Small(5), *(noise(2, 2, 4, 4, seed=seed).double() for seed in range(3))
    scale = SHIFT.input_scale(3)
    terms = distillation_terms(student, taught, x0, start, scale, 3)
    with torch.no_grad():
        back = student(x0 / 2.2181975, 0)
        wanted = {
            "distill": slow_square(student(start / 2.2181975, 3), taught),
            "inverse": slow_square(student(taught / 2.2181975, 0), start),
            "consistency": slow_square(student(back / 2.2181975, 3), x0),
        }
    assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(wanted, abs=1e-6)


def test_consistency_has_no_gradient_through_the_inverse(noise):
    x0, start = noise(1, 2, 4, 4).double(), noise(1, 2, 4, 4, seed=1).double()
    student = Small(5)
    distillation_terms(student, start, x0, start, 1.0, 3)["consistency"].backward()
    ours = [one.grad.clone() for one in student.parameters()]
    with torch.no_grad():
        back = student(x0, 0)
    student.zero_grad()
    (student(back, 3) - x0).square().mean().backward()
    assert all(torch.allclose(a, b.grad, atol=1e-12) for a, b in zip(ours, student.parameters(), strict=True))
