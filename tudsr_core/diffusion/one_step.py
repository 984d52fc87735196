"""The one-step formulas of published restorers, as coefficients: one line of tensor arithmetic per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from .schedule import NoiseSchedule, scaled_linear

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OneStep:
    """Coefficients of a one-step restorer, for latents scaled as the UNet expects them.

        z_in = a z_L + b n        (n: noise or predicted noise, unused when b = 0)
        eps  = UNet(z_in, t)
        z_H  = p z_in + q eps

    Tuples of these cover TUDSR, OMGSR, OSEDiff (`from_noise_level`), PiSA-SR (`residual`) and InvSR
    (`euler`); `published.py` has the table.
    """

    t: int
    p: float
    q: float
    a: float = 1.0
    b: float = 0.0

    def start(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return z_in from the encoded latent z_L; `noise` is needed exactly when b is not 0."""
        if self.b == 0:
            return z if self.a == 1 else self.a * z
        if noise is None:
            raise ValueError("this one-step method mixes noise into the latent; pass noise")
        return self.a * z + self.b * noise

    def finish(self, z_in: Tensor, eps: Tensor) -> Tensor:
        """Return z_H = p z_in + q eps, in float32 whatever the dtype of the network."""
        return self.p * z_in.float() + self.q * eps.float()


def from_noise_level(t: int, *, schedule: NoiseSchedule | None = None) -> OneStep:
    """Treat z_L as if it were z_t and solve for z_0 (TUDSR sec. 3.2, OMGSR eq. 6, OSEDiff eq. 5).

    z_H = (z_in - sqrt(1 - abar_t) eps) / sqrt(abar_t), i.e. p = 1/sqrt(abar_t), q = -sigma_t.
    """
    schedule = schedule or scaled_linear()
    return OneStep(t=t, p=schedule.abar_at(t) ** -0.5, q=-schedule.sigma_at(t))


def euler(timesteps: Sequence[int], *, schedule: NoiseSchedule | None = None) -> tuple[OneStep, ...]:
    """Return Euler steps from a diffused latent through falling `timesteps` to zero (InvSR).

    The first step starts at z_in = sqrt(abar_t) z_L + sqrt(1 - abar_t) n. A step from sigma to
    sigma' is x' = x + (sigma' - sigma) eps for x = z sqrt(1 + sigma^2), which in z is p z + q eps
    with p = sqrt((1 + sigma^2) / (1 + sigma'^2)) and q = (sigma' - sigma) / sqrt(1 + sigma'^2).
    Raises ValueError unless the timesteps fall.
    """
    schedule = schedule or scaled_linear()
    if not timesteps or any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise ValueError(f"timesteps {list(timesteps)} must fall, for example 199, 99, 49")
    abar = schedule.abar_at(timesteps[0])
    sigmas = [schedule.sigma_at(t) for t in timesteps] + [0.0]
    steps = []
    for t, (sigma, after) in zip(timesteps, pairwise(sigmas), strict=True):
        norm = (1 + after**2) ** 0.5
        steps.append(OneStep(t, p=(1 + sigma**2) ** 0.5 / norm, q=(after - sigma) / norm))
    return (replace(steps[0], a=abar**0.5, b=(1 - abar) ** 0.5), *steps[1:])


def residual(t: int = 1) -> OneStep:
    """Predict the residual directly: z_H = z_L - eps (PiSA-SR eq. 4)."""
    return OneStep(t=t, p=1.0, q=-1.0)
