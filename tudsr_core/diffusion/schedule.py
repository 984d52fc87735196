"""The noise schedule of Stable Diffusion and the one-step formulas built on it.

Pure numbers: the tables are float64, the step is one line of tensor arithmetic. Multi-step
sampling is not here. The names of methods are read from here before torch is needed, so it is
imported where a table is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: `abar[t]` for integer timesteps t, float64."""

    abar: Tensor

    @property
    def steps(self) -> int:
        """Number of training timesteps (1000 for Stable Diffusion)."""
        return self.abar.numel()

    def abar_at(self, t: int) -> float:
        """Return abar_t for an integer timestep in 0..steps-1."""
        if not 0 <= t < self.steps:
            raise ValueError(f"timestep {t} is outside 0..{self.steps - 1}")
        return float(self.abar[int(t)])

    def sigma_at(self, t: int) -> float:
        """Return sigma_t = sqrt((1 - abar_t) / abar_t), the noise level k-diffusion samplers use."""
        abar = self.abar_at(t)
        return ((1 - abar) / abar) ** 0.5


@lru_cache(maxsize=4)
def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> NoiseSchedule:
    """Return the schedule of SD 1.x / 2.x: betas linear in their square root ("scaled_linear")."""
    import torch

    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return NoiseSchedule(torch.cumprod(1 - betas, 0))


def comfy_start_scale(t: int, schedule: NoiseSchedule | None = None) -> float:
    """Return sqrt(1 + sigma_t^2) = 1/sqrt(abar_t), the factor for a latent given to ComfyUI.

    ComfyUI's EPS model called at sigma_t on X = z sqrt(1 + sigma_t^2) divides by that factor
    again and returns "denoised" = X - sigma_t eps, which is exactly
    (z - sqrt(1 - abar_t) eps) / sqrt(abar_t): a one-step stage is one Euler step sigma_t -> 0.
    """
    return (schedule or scaled_linear()).abar_at(t) ** -0.5
