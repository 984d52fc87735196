"""Residual shifting as numbers: a chain from a good picture to a poor one, and one-step formulas on it.

Yue et al. 2023 (ResShift, sec. 3) and Wang et al. 2024 (SinSR, sec. 3), written from the mathematics alone.
x0 is the good picture or its latent, y the poor one on the same grid; index i runs from 0 to T - 1, so that index i
of the code is t = i + 1 of the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ResidualShift:
    """The shares `eta` of the residual y - x0 that have come in, rising; `kappa` times their root is the noise."""

    eta: tuple[float, ...]
    kappa: float

    @property
    def last(self) -> int:
        """Index of the end of the chain, where y and noise are nearly all there is."""
        return len(self.eta) - 1

    def noise_at(self, index: int) -> float:
        """Return kappa sqrt(eta), the standard deviation of the noise."""
        return self.kappa * self.eta[index] ** 0.5

    def input_scale(self, index: int) -> float:
        """Return what a network's input is multiplied by: 1 / sqrt(kappa^2 eta + 1)."""
        return (self.noise_at(index) ** 2 + 1) ** -0.5

    def diffuse(self, x0: Tensor, y: Tensor, noise: Tensor, index: int) -> Tensor:
        """Return a draw of the marginal q(x_i | x0, y) = N(x0 + eta (y - x0), kappa^2 eta)."""
        return x0 + self.eta[index] * (y - x0) + self.noise_at(index) * noise

    def start(self, y: Tensor, noise: Tensor) -> Tensor:
        """Return where sampling begins: y and the noise of the last index."""
        return y + self.noise_at(self.last) * noise

    def posterior(self, x: Tensor, x0: Tensor, index: int) -> tuple[Tensor, float]:
        """Return mean and standard deviation of q(x_{i-1} | x_i, x0); at index 0 it is x0 itself."""
        eta, before = self.eta[index], self._before(index)
        return before / eta * x + (eta - before) / eta * x0, self.kappa * (before / eta * (eta - before)) ** 0.5

    def step_back(self, x: Tensor, x0: Tensor, y: Tensor, index: int) -> Tensor:
        """Return x_{i-1} = k x0 + m x_i + j y without noise (SinSR); at index 0 x0 itself."""
        eta, before = self.eta[index], self._before(index)
        m = (before / eta) ** 0.5
        j = before - (before * eta) ** 0.5
        return (1 - m - j) * x0 + m * x + j * y

    def _before(self, index: int) -> float:
        return self.eta[index - 1] if index else 0.0


@lru_cache(maxsize=8)
def shift_schedule(
    steps: int = 15, least: float = 0.04, kappa: float = 2.0, power: float = 0.3, end: float = 0.99
) -> ResidualShift:
    """Return ResShift's schedule: sqrt(eta) grows geometrically on a warped axis up to `end`.

    The defaults are the published 15 steps; the journal's 4 steps have `least` 0.2. Raises ValueError for less
    than two steps or numbers that give no rising schedule.
    """
    first = min(least / kappa, least, 0.001**0.5) if kappa > 0 else 0.0
    if steps < 2 or power <= 0 or not 0 < first < end <= 1:
        raise ValueError(
            f"no schedule of {steps} steps from {least:g} to {end:g} with kappa {kappa:g} and power {power:g}; "
            "the published one is 15 steps from 0.04 to 0.99 with kappa 2 and power 0.3"
        )
    growth = math.log(end / first)
    roots = [first * math.exp(growth * (i / (steps - 1)) ** power) for i in range(steps)]
    return ResidualShift(tuple(root**2 for root in roots), kappa)
