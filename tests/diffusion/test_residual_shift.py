"""Residual shifting against sums written out in float64, and against numbers known from elsewhere."""

import math

import pytest
import torch

from tudsr_core.diffusion.residual_shift import shift_schedule

# sqrt(eta) of the two published schedules, five digits, from the mathematics of the paper and its settings.
FIFTEEN = (0.02, 0.11717, 0.1763, 0.23363, 0.29157, 0.35101, 0.41236, 0.47586, 0.54167, 0.60991, 0.68066)
FIFTEEN += (0.75399, 0.82995, 0.90861, 0.99)
FOUR = (0.03162, 0.37644, 0.66732, 0.99)


def slow_roots(steps, least, kappa, power, end):
    """The powers as the paper has them: a b^beta, beta = (T - 1) (i / (T - 1))^p."""
    a = min(least / kappa, least, math.sqrt(0.001))
    b = math.exp(math.log(end / a) / (steps - 1))
    return [a * b ** ((steps - 1) * (i / (steps - 1)) ** power) for i in range(steps)]


@pytest.mark.parametrize(("steps", "least", "known"), [(15, 0.04, FIFTEEN), (4, 0.2, FOUR)])
def test_the_schedules_are_the_published_ones(steps, least, known):
    shift = shift_schedule(steps, least)
    roots = [eta**0.5 for eta in shift.eta]
    assert roots == pytest.approx(known, abs=6e-6)
    assert roots == pytest.approx(slow_roots(steps, least, 2.0, 0.3, 0.99), abs=1e-12)
    assert list(shift.eta) == sorted(set(shift.eta)) and shift.last == steps - 1
    assert shift.noise_at(shift.last) == pytest.approx(1.98) and 1 / shift.input_scale(shift.last) == pytest.approx(
        2.2181975, abs=1e-6
    )


def test_the_first_step_has_sinsrs_coefficients():
    """k .15617, m .91778, j -.07395 for the step from the last index; together 1."""
    shift, one, nil = shift_schedule(), torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    k, m, j = (float(shift.step_back(*values, 14)) for values in ((nil, one, nil), (one, nil, nil), (nil, nil, one)))
    assert (k, m, j) == pytest.approx((0.15617, 0.91778, -0.07395), abs=6e-6)
    assert k + m + j == pytest.approx(1, abs=1e-12)


def test_steps_equal_the_papers_form(noise):
    """(1 - eta') x0 + eta' y + sqrt(eta' / eta) (x - (1 - eta) x0 - eta y)."""
    shift = shift_schedule()
    x, x0, y = (noise(2, 3, 5, 4, seed=seed).double() for seed in range(3))
    for index in range(1, 15):
        eta, before = shift.eta[index], shift.eta[index - 1]
        wanted = (1 - before) * x0 + before * y + math.sqrt(before / eta) * (x - (1 - eta) * x0 - eta * y)
        assert torch.allclose(shift.step_back(x, x0, y, index), wanted, atol=1e-12)
    assert torch.equal(shift.step_back(x, x0, y, 0), x0)


def test_steps_from_the_truth_stay_on_the_marginal(noise):
    shift = shift_schedule()
    x0, y, eps = (noise(1, 3, 8, 8, seed=seed).double() for seed in range(3))
    assert torch.allclose(shift.start(y, eps) - shift.diffuse(x0, y, eps, 14), (1 - shift.eta[14]) * (y - x0))
    x = shift.diffuse(x0, y, eps, 14)
    for index in range(14, 0, -1):
        x = shift.step_back(x, x0, y, index)
        assert torch.allclose(x, shift.diffuse(x0, y, eps, index - 1), atol=1e-12)


def test_the_posterior_is_that_of_bayes(noise):
    """The product of q(x_i | x_{i-1}) and q(x_{i-1} | x0), both Gaussian, with y cancelled out."""
    shift = shift_schedule()
    x, x0, y = (noise(1, 1, 4, 4, seed=seed).double() for seed in range(3))
    for index in range(1, 15):
        alpha = shift.eta[index] - shift.eta[index - 1]
        var_step, var_before = shift.kappa**2 * alpha, shift.kappa**2 * shift.eta[index - 1]
        from_step, from_start = x - alpha * (y - x0), x0 + shift.eta[index - 1] * (y - x0)
        mean = (from_step / var_step + from_start / var_before) / (1 / var_step + 1 / var_before)
        ours, std = shift.posterior(x, x0, index)
        assert torch.allclose(ours, mean, atol=1e-11)
        assert std**2 == pytest.approx(1 / (1 / var_step + 1 / var_before), rel=1e-9)
    mean, std = shift.posterior(x, x0, 0)
    assert torch.allclose(mean, x0, atol=1e-12) and std == 0


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"kappa": 0.0}, {"end": 0.01}, {"end": 1.2}, {"power": 0.0}])
def test_numbers_without_a_schedule_are_refused(wrong):
    with pytest.raises(ValueError, match="the published one is 15 steps"):
        shift_schedule(**wrong)
