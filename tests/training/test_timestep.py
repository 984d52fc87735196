"""The closed form of the mid-timestep against a scan of all thousand."""

import pytest
import torch

from tudsr_core.diffusion.schedule import scaled_linear
from tudsr_core.training.timestep import match_timestep


def scanned(pairs):
    """argmin over t of the sum of |SNR of z_t - SNR of z_L|."""
    abar, best = scaled_linear().abar, None
    for t in range(1000):
        total = 0.0
        for low, high in pairs:
            power = float(high.double().square().mean())
            total += abs(float(abar[t] / (1 - abar[t])) * power - power / float((low - high).double().square().mean()))
        best = min(best or (total, t), (total, t))
    return best[1]


@pytest.mark.parametrize("spread", [0.01, 0.2, 0.6, 1.0, 5.0])
def test_the_weighted_median_is_the_best_of_all_timesteps(spread):
    generator = torch.Generator().manual_seed(round(spread * 100))
    for count in (1, 2, 7):
        pairs = []
        for _ in range(count):
            high = torch.randn(1, 4, 6, 6, generator=generator) * (0.5 + torch.rand(1, generator=generator))
            gap = spread * torch.rand(1, generator=generator)
            pairs.append((high + gap * torch.randn(high.shape, generator=generator), high))
        found = match_timestep(iter(pairs))
        assert found.timestep == scanned(pairs) and found.pairs == count


def test_the_timestep_of_noise_itself_is_found():
    """z_t of the forward process, brought back to the scale of z_0: sigma_t^2 is the distance."""
    generator, abar = torch.Generator().manual_seed(0), scaled_linear().abar
    for t in (50, 200, 273):
        high = torch.randn(1, 4, 128, 128, generator=generator)
        sigma = float(((1 - abar[t]) / abar[t]) ** 0.5)
        found = match_timestep([(high + sigma * torch.randn(high.shape, generator=generator), high)])
        assert abs(found.timestep - t) <= 3 and found.distance == pytest.approx(sigma**2, rel=0.03)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        match_timestep([])
