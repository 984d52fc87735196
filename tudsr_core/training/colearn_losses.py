"""What student, downsampler and critics are judged by in co-learning; a reconstruction (see `colearn_config.py`).

Pictures are in 0..1 unless it is said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pictures import gaussian_blur, jpeg_with_gradient
from .colearn_config import SafeguardsConfig

LOW_SIGMA = 2.0  # pixels of the poor picture: what is left knows content and colour, and no noise
LEAST_DISTANCE = 1e-3


def hinge_of_maker(logits: Sequence[Tensor]) -> Tensor:
    """Return -D(fake), the mean of each head, summed over heads."""
    return -sum(x.float().mean() for x in logits)


def hinge_of_critic(fake: Sequence[Tensor], real: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return max(0, 1 + D(fake)) and max(0, 1 - D(real)), the mean of each head, summed over heads."""
    return {
        "fake": sum(F.relu(1 + x.float()).mean() for x in fake),
        "real": sum(F.relu(1 - x.float()).mean() for x in real),
    }


def gradient_penalty(critic: nn.Module, real: Tensor) -> Tensor:
    """Return R1 (Mescheder et al. 2018): the squared gradient of D at real pictures, summed per picture, averaged."""
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(sum(x.float().sum() for x in critic(real)), real, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def low_frequency(made: Tensor, base: Tensor, sigma: float = LOW_SIGMA) -> Tensor:
    """Return the mean of |difference| of both pictures after a blur of `sigma` pixels; at 0 there is none."""
    return F.l1_loss(gaussian_blur(made, sigma), gaussian_blur(base, sigma))


def diversity(first: Tensor, second: Tensor, noises: tuple[Tensor, Tensor]) -> Tensor:
    """Return minus the distance of two results in that of their noise (mode seeking: Mao et al. 2019, negated)."""
    return -F.l1_loss(first, second) / F.l1_loss(*noises).clamp_min(LEAST_DISTANCE)


def jitter(pictures: Tensor, config: SafeguardsConfig, draws: Sequence[torch.Generator]) -> Tensor:
    """Return `B 3 H W` with noise, a shift of a part of a pixel, and light JPEG, each drawn for its picture.

    So nothing small can be hidden in a picture (CycleGAN's steganography: Chu et al. 2017). JPEG's rounding has a
    gradient of 1.
    """
    return torch.cat([_jitter_one(one, config, rng) for one, rng in zip(pictures.split(1), draws, strict=True)])


def _jitter_one(one: Tensor, config: SafeguardsConfig, rng: torch.Generator) -> Tensor:
    down, right, loss = torch.rand(3, generator=rng).tolist()
    x = _shift(_shift(one, (2 * down - 1) * config.shift, -2), (2 * right - 1) * config.shift, -1)
    noise = torch.rand(one.shape, generator=rng).to(one) - 0.5
    x = (x + noise * (2 * config.noise / 255)).clamp(0, 1)
    return x if config.quality == 100 else jpeg_with_gradient(x, config.quality + loss * (100 - config.quality))


def _shift(x: Tensor, by: float, axis: int) -> Tensor:
    """Return `x` moved by -1..1 pixels along `axis`, linearly; the border is repeated."""
    side = x.shape[axis]
    before = x.narrow(axis, 0, 1), x.narrow(axis, 0, side - 1)
    after = x.narrow(axis, 1, side - 1), x.narrow(axis, side - 1, 1)
    return x + abs(by) * (torch.cat(before if by > 0 else after, axis) - x)


def scale_gradient(x: Tensor, by: float) -> Tensor:
    """Return `x` itself, through which only `by` of a gradient passes."""
    return x.detach() + by * (x - x.detach())
