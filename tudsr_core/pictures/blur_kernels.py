"""Blur kernels of Real-ESRGAN (Wang et al. 2021, sec. 3.2 and 3.4), from drawn numbers to weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KernelKind = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc", "none"
]


@dataclass(frozen=True)
class Kernel:
    """One blur kernel by its numbers.

    `size` is odd, in pixels. `sigmas` lie along the two axes turned by `angle` radians; `beta` shapes
    the generalised and the plateau kinds; `cutoff` in radians per pixel is sinc's alone. The kind
    "none" changes nothing.
    """

    kind: KernelKind
    size: int = 1
    sigmas: tuple[float, float] = (1.0, 1.0)
    angle: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi

    def weights(self) -> Tensor:
        """Return `size size`, float32, that add up to 1."""
        if self.kind == "none":
            return torch.ones(1, 1)
        middle = torch.arange(self.size, dtype=torch.float64) - (self.size - 1) / 2
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        kernel = self._sinc(torch.hypot(x, y)) if self.kind == "sinc" else self._bell(x, y)
        return (kernel / kernel.sum()).float()

    def _bell(self, x: Tensor, y: Tensor) -> Tensor:
        """q = v' Sigma^-1 v with Sigma = R diag(sigmas^2) R'; exp(-q^beta / 2), or 1 / (1 + q^beta)."""
        along = x * math.cos(self.angle) + y * math.sin(self.angle)
        across = y * math.cos(self.angle) - x * math.sin(self.angle)
        q = (along / self.sigmas[0]) ** 2 + (across / self.sigmas[1]) ** 2
        if self.kind.startswith("plateau"):
            return 1 / (1 + q**self.beta)
        return torch.exp(-(q**self.beta) / 2)

    def _sinc(self, radius: Tensor) -> Tensor:
        """The circular low-pass w J1(w r) / (2 pi r), whose limit at r = 0 is w^2 / (4 pi)."""
        far = radius.clamp_min(1e-9)
        kernel = self.cutoff * torch.special.bessel_j1(self.cutoff * far) / (2 * math.pi * far)
        return torch.where(radius == 0, self.cutoff**2 / (4 * math.pi), kernel)
