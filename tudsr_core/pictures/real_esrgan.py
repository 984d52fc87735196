"""The two-order degradation of Real-ESRGAN (Wang et al. 2021, fig. 2) with its two published sets of parameters.

Numbers are drawn by `sample_degradation`, pixels changed by `degrade`: what was done to a picture can be kept,
shown and repeated. "real-esrgan" is the original's set, also OSEDiff's and InvSR's; "omgsr" is the milder one that
PiSA-SR, OMGSR and TUDSR's code base use. As in those, nothing is sharpened before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .blur_kernels import Kernel, KernelKind
from .soft_jpeg import soft_jpeg

Range = tuple[float, float]
MODES = ("area", "bilinear", "bicubic")
GREY = (0.2989, 0.587, 0.114)
KINDS: dict[KernelKind, float] = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
GENERALIZED_BETA, PLATEAU_BETA = (0.5, 4.0), (1.0, 2.0)
SINC_SHARE, LAST_SINC_SHARE = 0.1, 0.8


class KernelSizes(NamedTuple):
    """Odd sizes from `least` to `most`; smaller sinc kernels than `split` are cut off at pi / 3 or more."""

    least: int
    most: int
    split: int


# Up to x4 the sizes of Real-ESRGAN; OMGSR takes the larger ones at x8.
SIZES, LARGE_SIZES = KernelSizes(7, 21, 13), KernelSizes(11, 41, 25)


@dataclass(frozen=True)
class Order:
    """One of the two orders: blur, resize, noise, JPEG. `up_down_keep` are the shares of the three resizes."""

    blur_share: float
    sigma: Range
    up_down_keep: tuple[float, float, float]
    scale: Range
    gaussian: Range
    poisson: Range
    quality: Range
    gaussian_share: float = 0.5
    grey_share: float = 0.4


@dataclass(frozen=True)
class Recipe:
    """The parameters of both orders."""

    first: Order
    second: Order


_FIRST = Order(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95))
_SECOND = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95))
RECIPES = {
    "real-esrgan": Recipe(_FIRST, _SECOND),
    "omgsr": Recipe(
        replace(_FIRST, scale=(0.3, 1.5), gaussian=(1, 15), poisson=(0.05, 2.0), quality=(60, 95)),
        replace(_SECOND, blur_share=0.5, scale=(0.6, 1.2), gaussian=(1, 12), poisson=(0.05, 1.0), quality=(60, 100)),
    ),
}


@dataclass(frozen=True)
class Noise:
    """Noise of one picture: Gaussian of sigma `strength` / 255, or Poisson's deviation times `strength`."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    grey: bool
    seed: int


@dataclass(frozen=True)
class Pass:
    """What one order does: `blur`, resize by `scale` with `mode`, `noise`, JPEG of `quality`."""

    blur: Kernel
    scale: float
    mode: str
    noise: Noise
    quality: float


@dataclass(frozen=True)
class Degradation:
    """Everything that is done to one picture on its way to 1 / `factor` of its size.

    `last` is the final sinc filter, after the resize with `last_mode`; with `jpeg_last` both come
    before the second JPEG, else after it. `enlarge_mode` is how OMGSR's training makes the result as
    large as the picture again.
    """

    factor: float
    first: Pass
    second: Pass
    last: Kernel
    last_mode: str
    jpeg_last: bool
    enlarge_mode: str

    def describe(self) -> str:
        """Return what is done, in one line."""
        steps = []
        for one in (self.first, self.second):
            blur = "no blur" if one.blur.kind == "none" else f"{one.blur.kind} blur {one.blur.size} px"
            grey = "grey " if one.noise.grey else ""
            noise = f"{grey}{one.noise.kind} noise {one.noise.strength:.3g}"
            steps.append(f"{blur}, x{one.scale:.2f} {one.mode}, {noise}, JPEG {one.quality:.0f}")
        sinc = "" if self.last.kind == "none" else f", sinc {self.last.size} px"
        return f"{'; '.join(steps)}; 1/{self.factor:g} {self.last_mode}{sinc}"


def sample_degradation(rng: np.random.Generator, recipe: Recipe, factor: float) -> Degradation:
    """Draw all numbers for one picture that shall come out `factor` times smaller (1 or more)."""
    if not factor >= 1:
        raise ValueError(f"factor {factor:g} would enlarge; give 1 or more")
    sizes = SIZES if factor <= 4 else LARGE_SIZES
    first, second = (_sample_pass(rng, order, sizes) for order in (recipe.first, recipe.second))
    last = Kernel("none")
    if rng.random() < LAST_SINC_SHARE:
        last = Kernel("sinc", _sample_size(rng, sizes), cutoff=rng.uniform(math.pi / 3, math.pi))
    jpeg_last = bool(rng.random() < 0.5)
    return Degradation(factor, first, second, last, _sample_mode(rng), jpeg_last, _sample_mode(rng))


def _sample_pass(rng: np.random.Generator, order: Order, sizes: KernelSizes) -> Pass:
    blur = _sample_kernel(rng, order.sigma, sizes) if rng.random() < order.blur_share else Kernel("none")
    kind = _pick(rng, order.up_down_keep)
    scale = (rng.uniform(1, order.scale[1]), rng.uniform(order.scale[0], 1), 1.0)[kind]
    gaussian = rng.random() < order.gaussian_share
    strength = rng.uniform(*(order.gaussian if gaussian else order.poisson))
    grey, seed = bool(rng.random() < order.grey_share), int(rng.integers(2**31))
    noise = Noise("gaussian" if gaussian else "poisson", strength, grey, seed)
    return Pass(blur, scale, _sample_mode(rng), noise, rng.uniform(*order.quality))


def _sample_kernel(rng: np.random.Generator, sigma: Range, sizes: KernelSizes) -> Kernel:
    size = _sample_size(rng, sizes)
    if rng.random() < SINC_SHARE:
        return Kernel("sinc", size, cutoff=rng.uniform(math.pi / (3 if size < sizes.split else 5), math.pi))
    kind = tuple(KINDS)[_pick(rng, KINDS.values())]
    along, across, angle = rng.uniform(*sigma), rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)
    if kind.endswith("_iso") or kind == "iso":
        across, angle = along, 0.0
    beta = 1.0
    if kind not in ("iso", "aniso"):
        least, most = PLATEAU_BETA if kind.startswith("plateau") else GENERALIZED_BETA
        beta = rng.uniform(least, 1) if rng.random() < 0.5 else rng.uniform(1, most)
    return Kernel(kind, size, (along, across), angle, beta)


def _pick(rng: np.random.Generator, shares: Iterable[float]) -> int:
    """Return a place among `shares`, which add up to 1 (as `rng.choice`, at a tenth of its time)."""
    places = list(accumulate(shares))
    return min(bisect_right(places, rng.random()), len(places) - 1)


def _sample_size(rng: np.random.Generator, sizes: KernelSizes) -> int:
    return int(rng.integers(sizes.least // 2, sizes.most // 2 + 1)) * 2 + 1


def _sample_mode(rng: np.random.Generator) -> str:
    return MODES[rng.integers(len(MODES))]


def degrade(image: Tensor, drawn: Degradation) -> Tensor:
    """Return `B 3 h w` with sides `H // factor`, in steps of 1 / 255, of `B 3 H W` in 0..1.

    The same numbers and the same picture give the same bytes on one kind of device.
    """
    first, second, sides = drawn.first, drawn.second, tuple(image.shape[-2:])
    x = interpolate(blur(image, first.blur), _scaled(sides, first.scale), first.mode, first.scale)
    x = soft_jpeg(add_noise(x, first.noise), first.quality)
    x = interpolate(blur(x, second.blur), _scaled(sides, second.scale / drawn.factor), second.mode)
    x = add_noise(x, second.noise)
    if not drawn.jpeg_last:
        x = soft_jpeg(x, second.quality)
    x = blur(interpolate(x, _scaled(sides, 1 / drawn.factor), drawn.last_mode), drawn.last)
    if drawn.jpeg_last:
        x = soft_jpeg(x.clamp(0, 1), second.quality)
    return (x.clamp(0, 1) * 255).round() / 255


def _scaled(sides: tuple[int, int], scale: float) -> tuple[int, int]:
    return tuple(max(1, math.floor(side * scale + 1e-9)) for side in sides)


def interpolate(image: Tensor, size: tuple[int, int], mode: str, scale: float | None = None) -> Tensor:
    """Resize `B C H W` as Real-ESRGAN does: without antialiasing, so that shrinking aliases.

    With `scale` the places of pixels follow the factor itself instead of the rounded `size`; a side of
    one pixel has no such place.
    """
    how = {"size": size} if scale is None or 1 in size else {"scale_factor": scale}
    return F.interpolate(image, **how, mode=mode, **({} if mode == "area" else {"align_corners": False}))


def blur(image: Tensor, kernel: Kernel) -> Tensor:
    """Filter every channel of `B C H W`, its borders mirrored (repeated where it is smaller than the kernel)."""
    if kernel.kind == "none":
        return image
    weights = kernel.weights().to(image)
    half, channels = kernel.size // 2, image.shape[1]
    mode = "reflect" if half < min(image.shape[-2:]) else "replicate"
    padded = F.pad(image, (half,) * 4, mode=mode)
    return F.conv2d(padded, weights.expand(channels, 1, -1, -1), groups=channels)


def add_noise(image: Tensor, noise: Noise) -> Tensor:
    """Return `B 3 H W` in 0..1 with noise of its seed, drawn on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(noise.seed)
    add = _gaussian if noise.kind == "gaussian" else _poisson
    return (image + add(image, noise, generator).to(image)).clamp(0, 1)


def _gaussian(image: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    shape = (len(image), 1 if noise.grey else image.shape[1], *image.shape[-2:])
    return torch.randn(shape, generator=generator) * (noise.strength / 255)


def _poisson(image: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    """Poisson(x v) / v - x, v the power of two from the number of values that the 8-bit picture has."""
    counted = image.float().cpu()
    if noise.grey:
        counted = (counted * torch.tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    counted = (counted * 255).round().clamp(0, 255) / 255
    levels = torch.tensor([2.0 ** math.ceil(math.log2(len(one.unique()))) for one in counted]).view(-1, 1, 1, 1)
    return (torch.poisson(counted * levels, generator=generator) / levels - counted) * noise.strength
