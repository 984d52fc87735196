"""Colour correction: give the restored picture the colours of the picture it came from.

All functions take `B 3 H W`, float, 0..1 and work in float; nothing is rounded to 8 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .srgb import from_lab, to_lab

ColorFix = Literal["wavelet", "adain", "lab", "none"]
COLOR_FIXES: tuple[ColorFix, ...] = ("wavelet", "adain", "lab", "none")
WHOLE_PICTURE: tuple[ColorFix, ...] = ("adain", "lab")
"""Those that look at the whole picture: parts of one cannot be fixed alone."""

WAVELET_LEVELS = 5
TILE_PX = 512
STRIP_ROWS = 64


def match_color(image: Tensor, source: Tensor, method: ColorFix, device: torch.device | None = None) -> Tensor:
    """Return `image` with the colours of `source` (same shape), clamped to 0..1, where `image` lies.

    `device`: if it is CUDA's, "wavelet" computes there, tile by tile, as long as there is memory.
    Raises ValueError for a method that does not exist or for sizes that differ.
    """
    if image.shape != source.shape:
        raise ValueError(f"colour fix needs equal sizes; got {tuple(image.shape)} and {tuple(source.shape)}")
    if method == "none":
        return image.clamp(0, 1)
    if method == "adain":
        return adain(image, source).clamp(0, 1)
    if method == "lab":
        return lab(image, source)
    if method == "wavelet":
        if device is not None and device.type == "cuda":
            with suppress(torch.OutOfMemoryError):
                return wavelet(image, source, device=device).clamp_(0, 1)
        return wavelet(image, source).clamp_(0, 1)
    raise ValueError(f"colour fix is {method!r}; use one of {', '.join(COLOR_FIXES)}")


def adain(image: Tensor, source: Tensor) -> Tensor:
    """Give every channel of `image` the mean and standard deviation of `source`.

    AdaIN (Huang and Belongie 2017, eq. 8) over the whole picture, std = sqrt(var + 1e-5) with
    the unbiased variance, as StableSR applies it.
    """
    mean, std = _moments(image)
    wanted_mean, wanted_std = _moments(source)
    return (image - mean) / std * wanted_std + wanted_mean


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    pixels = image.shape[-1] * image.shape[-2]
    variance = image.var(dim=(-2, -1), keepdim=True, unbiased=pixels > 1)
    return image.mean(dim=(-2, -1), keepdim=True), (variance + 1e-5).sqrt()


def lab(image: Tensor, source: Tensor) -> Tensor:
    """Give L*, a* and b* of `image` the mean and standard deviation of `source`, within sRGB's gamut.

    Reinhard et al. 2001 (eq. 10 and 11) in CIELAB: lightness and colour are matched apart, so a contrast that is
    set right moves no hue. Standard deviations as in `adain`, on L*'s scale of 100. In strips, in double precision.
    """
    result = torch.empty_like(image)
    for one, own, wanted in zip(result, image, source, strict=True):
        mean, std = _lab_moments(own)
        wanted_mean, wanted_std = _lab_moments(wanted)
        for rows in _strips(own):
            one[rows] = from_lab((to_lab(_exact(own[rows])) - mean) / std * wanted_std + wanted_mean).to(one)
    return result


def _lab_moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation `3 1 1` of L*, a*, b* of `3 H W`."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for rows in _strips(image):
        strip = to_lab(_exact(image[rows]))
        sums += torch.stack([strip.sum((1, 2)), strip.square().sum((1, 2))]).cpu()
    pixels = image.shape[-1] * image.shape[-2]
    mean = sums[0] / pixels
    variance = (sums[1] - pixels * mean**2).clamp_min(0) / max(1, pixels - 1)
    mean, std = (values.view(3, 1, 1).to(_exact(image[:, :1, :1]).device) for values in (mean, (variance + 0.1).sqrt()))
    return mean, std


def _strips(image: Tensor) -> Iterator[tuple[slice, slice]]:
    return ((slice(None), slice(top, top + STRIP_ROWS)) for top in range(0, image.shape[-2], STRIP_ROWS))


def _exact(pixels: Tensor) -> Tensor:
    # MPS has no double precision.
    return pixels.double() if pixels.device.type in ("cpu", "cuda") else pixels.cpu().double()


def wavelet(image: Tensor, source: Tensor, levels: int = WAVELET_LEVELS, device: torch.device | None = None) -> Tensor:
    """Keep the detail of `image` and take the low frequencies of `source` (StableSR, a trous wavelet).

    The high bands telescope, so the result is image - low(image) + low(source). In tiles, because this
    is where memory peaks for large pictures; each sees as far as the blur reaches, so that they change
    nothing. On `device`, if given; the result lies where `image` does.
    """
    result, reach = torch.empty_like(image), 2**levels - 1
    for number in range(len(image)):
        for top, left in product(*(range(0, side, TILE_PX) for side in image.shape[-2:])):
            y, x = max(0, top - reach), max(0, left - reach)
            seen = number, ..., slice(y, top + TILE_PX + reach), slice(x, left + TILE_PX + reach)
            tile = number, ..., slice(top, top + TILE_PX), slice(left, left + TILE_PX)
            core = ..., slice(top - y, top - y + TILE_PX), slice(left - x, left - x + TILE_PX)
            part, wanted = (whole[seen].to(device or whole.device) for whole in (image, source))
            result[tile] = part[core] + low_frequencies((wanted - part)[None], levels)[0][core]
    return result


def low_frequencies(image: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """Blur `B C H W` with [1 2 1] x [1 2 1] / 16 at dilations 1, 2, 4, ... 2^(levels-1), edges repeated."""
    for level in range(levels):
        reach = 2**level
        for axis, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
            padded, length = F.pad(image, pad, mode="replicate"), image.shape[axis]
            image = image * 0.5
            image.add_(padded.narrow(axis, 0, length), alpha=0.25)
            image.add_(padded.narrow(axis, 2 * reach, length), alpha=0.25)
    return image
