"""Which timestep a low-quality latent resembles: the one with its ratio of signal to noise (OMGSR, "mid-timestep").

A latent z_L is taken for a noised z_H. With P = mean z_H^2 and d = mean (z_L - z_H)^2 of a pair, the
ratio of z_L is P / d and that of z_t is P abar_t / (1 - abar_t). The t that brings both together, in the
mean of absolute differences over all pairs, makes abar_t / (1 - abar_t) the P-weighted median of 1 / d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..diffusion import from_noise_level, scaled_linear
from .config import TrainingConfig
from .networks import Restorer, build_stage_one, load_base
from .samples import Pictures, batches
from .stages import chunks_of, looped, whole


@dataclass(frozen=True)
class Estimate:
    """The timestep, the weighted median distance d, and how many pairs it comes from."""

    timestep: int
    distance: float
    pairs: int


def match_timestep(pairs: Iterable[tuple[Tensor, Tensor]]) -> Estimate:
    """Return the timestep for pairs `(z_L, z_H)` of scaled latents, each one picture; raises ValueError without any."""
    powers, distances = [], []
    for low, high in pairs:
        powers.append(float(high.double().square().mean()))
        distances.append(float((low.double() - high.double()).square().mean()))
    if not powers:
        raise ValueError("there are no pairs to estimate a timestep from")
    power = torch.tensor(powers, dtype=torch.float64)
    ratio = 1 / torch.tensor(distances, dtype=torch.float64).clamp_min(1e-12)
    order = ratio.argsort()
    middle = int((power[order].cumsum(0) >= power.sum() / 2).nonzero()[0])
    median = float(ratio[order][middle])
    abar = scaled_linear().abar
    levels = abar / (1 - abar)  # falls with t
    after = int((levels > median).sum())
    near = range(max(0, after - 1), min(len(levels), after + 1))
    # The sum is convex in the level, so the best timestep is one of the two around the median.
    best = min(near, key=lambda t: float((power * (levels[t] - ratio).abs()).sum()))
    return Estimate(best, 1 / median, len(powers))


@torch.no_grad()
def estimate_timestep(config: TrainingConfig, stage: int, count: int, device: torch.device) -> Estimate:
    """Encode `count` training pictures, sharp and as the stage's network gets them, and match a timestep.

    Stage two's are stage one's results, enlarged and cut into chunks. Raises ConfigError, CheckpointError
    and PictureError as a training does.
    """
    pictures = Pictures(config.data, config.seed)
    vae, unet, text = load_base(config.model, config.run.base_precision)
    network = Restorer(vae, unet, text, from_noise_level(config.model.timestep))
    cut = whole
    if stage == 2:
        first = build_stage_one(config, network).to(device).eval()
        cut = looped(first, config.data.chunks)
    network = network.to(device).eval()
    wanted = math.ceil(count / config.data.batch)
    chunks = chunks_of(islice(batches(pictures, 0), wanted), cut, device)
    return match_timestep(
        pair for chunk in chunks for pair in zip(network.encode(chunk.low), network.encode(chunk.sharp), strict=True)
    )
