"""How a sharp picture becomes a small poor one: the clean, the mild and the random recipe.

All take and return `B C H W`, float, 0..1. Evaluation uses `clean` and `mild`, which are fixed;
training draws `random_mild` anew for each picture.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .tensors import resize


def clean(image: Tensor, scale: float) -> Tensor:
    """Shrink by `scale` with antialiased bicubic and round to 8 bit."""
    return _to_8bit(_shrink(image, scale))


def mild(image: Tensor, scale: float, seed: int = 0) -> Tensor:
    """Blur (sigma 0.25 scale), shrink, noise of sigma 3/255, JPEG quality 80: a decent phone picture."""
    generator = torch.Generator().manual_seed(seed)
    small = _shrink(gaussian_blur(image, 0.25 * scale), scale)
    noise = torch.randn(small.shape, generator=generator) * (3 / 255)
    return jpeg(_to_8bit(small + noise.to(small)), 80)


def random_mild(image: Tensor, scale: float, rng: np.random.Generator, clean_share: float = 0.5) -> Tensor:
    """Degrade each picture of `B C H W` on its own: `clean_share` of them `clean`, the rest drawn.

    `scale` may be any factor above 1; the result has sides `round(side / scale)`.
    Drawn: blur sigma 0..0.35 scale, one of three shrinking filters, noise 0..6/255 (grey or
    colour), JPEG quality 60..96 for seven in ten.
    """
    return torch.cat([_random_one(one[None], scale, rng, clean_share) for one in image])


def _random_one(image: Tensor, scale: float, rng: np.random.Generator, clean_share: float) -> Tensor:
    if rng.random() < clean_share:
        return clean(image, scale)
    if rng.random() < 0.7:
        image = gaussian_blur(image, float(rng.uniform(0, 0.35)) * scale)
    kind = rng.random()
    if kind < 0.6:
        small = _shrink(image, scale)
    elif kind < 0.8:
        small = F.interpolate(image, size=_small_size(image, scale), mode="area")
    else:
        small = F.interpolate(image, size=_small_size(image, scale), mode="bilinear", antialias=True)
    channels = 1 if rng.random() < 0.4 else 3
    noise = rng.standard_normal((1, channels, *small.shape[-2:])).astype(np.float32)
    small = _to_8bit(small + torch.from_numpy(noise) * float(rng.uniform(0, 6)) / 255)
    return jpeg(small, int(rng.integers(60, 97))) if rng.random() < 0.7 else small


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur `B C H W` with a Gaussian of `sigma` pixels, cut at 4 sigma, edges replicated."""
    radius = int(4 * sigma + 0.5)
    if radius < 1:
        return image
    x = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(image.device)
    channels = image.shape[1]
    padded = F.pad(image, (radius, radius, radius, radius), mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Send `B 3 H W` through Pillow's JPEG codec (4:2:0) and back."""
    out = []
    for one in (image.clamp(0, 1) * 255).round().byte():
        buffer = io.BytesIO()
        Image.fromarray(one.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        decoded = np.array(Image.open(buffer).convert("RGB"))
        out.append(torch.from_numpy(decoded).permute(2, 0, 1).float().div(255))
    return torch.stack(out).to(image)


def _small_size(image: Tensor, scale: float) -> tuple[int, int]:
    return tuple(max(1, round(side / scale)) for side in image.shape[-2:])


def _shrink(image: Tensor, scale: float) -> Tensor:
    return resize(image, _small_size(image, scale))


def _to_8bit(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255
