"""Respaced multi-step chains (DDPM, DDIM) as coefficients; the loop over them is `methods.sampling`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .schedule import NoiseSchedule, scaled_linear

Respacing = Literal["leading", "whole"]


@dataclass(frozen=True)
class ChainStep:
    """One step t -> t' of a respaced chain: z' = from_z z + from_x0 x0 + std n, with x0 from eps."""

    t: int
    abar: float
    from_z: float
    from_x0: float
    std: float

    def x0(self, z: Tensor, eps: Tensor) -> Tensor:
        """Return the predicted clean latent (DDPM eq. 15)."""
        return (z - (1 - self.abar) ** 0.5 * eps) / self.abar**0.5


def respaced_timesteps(steps: int, total: int = 1000, respacing: Respacing = "leading") -> list[int]:
    """Return `steps` of `total` timesteps, largest first.

    "leading": evenly from 1, as SD 2.x: 981, 961, ... 21, 1 for 50; where `steps` divides `total` this is
    its spacing of that name with an offset of 1. "whole": evenly from the first to the last, rounded (half to
    even), as StableSR: 999, 666, 333, 0 for 4.
    """
    if respacing == "leading":
        return [index * total // steps + 1 for index in reversed(range(steps))]
    if respacing == "whole":
        stride = (total - 1) / max(1, steps - 1)
        return [total - 1, *(round(index * stride) for index in reversed(range(steps - 1)))]
    raise ValueError(f"respacing is {respacing!r}; use 'leading' or 'whole'")


def plan_steps(
    steps: int, eta: float = 1.0, schedule: NoiseSchedule | None = None, respacing: Respacing = "leading"
) -> list[ChainStep]:
    """Return the coefficients of a respaced DDPM (`eta` 1), DDIM (`eta` 0) or something between.

    DDIM eq. 12 with sigma from eq. 16, written in z and x0; at `eta` 1 this is exactly the DDPM
    posterior (eq. 7) of the respaced chain with its small variance. The last step returns x0.
    """
    schedule = schedule or scaled_linear()
    timesteps = respaced_timesteps(steps, schedule.steps, respacing)
    planned = []
    for t, later in zip(timesteps, [*timesteps[1:], None], strict=True):
        abar = schedule.abar_at(t)
        after = 1.0 if later is None else schedule.abar_at(later)
        std = eta * ((1 - after) / (1 - abar) * (1 - abar / after)) ** 0.5
        from_z = (max(0.0, 1 - after - std**2) / (1 - abar)) ** 0.5
        planned.append(ChainStep(t, abar, from_z, after**0.5 - from_z * abar**0.5, std))
    return planned
