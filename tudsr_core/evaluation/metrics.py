"""Numbers that say how close two pictures are. Pictures are `B 3 H W`, float, 0..1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pictures import luma

SSIM_WINDOW = 11


def psnr_y(picture: Tensor, truth: Tensor) -> float:
    """Return the PSNR in dB of the BT.601 luma (peak 1.0), as super-resolution papers report it."""
    error = (luma(picture.double().clamp(0, 1)) - luma(truth.double())).square().mean()
    return float(-10 * torch.log10(error.clamp_min(1e-12)))


def ssim_y(picture: Tensor, truth: Tensor) -> float:
    """Return SSIM (Wang et al. 2004: Gaussian 11 x 11, sigma 1.5, population covariance) of the luma, 0..1 wide.

    The mean over all places where the window lies inside. Raises ValueError for pictures smaller than it.
    """
    if min(truth.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} px on both sides")
    x, y = luma(picture.double().clamp(0, 1)), luma(truth.double())
    distance = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-(distance**2) / (2 * 1.5**2))
    weights = weights / weights.sum()

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((brightness * (2 * covariance + c2) / (var_x + var_y + c2)).mean())


def seam_score(picture: Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Return how much stronger edges are on tile borders than elsewhere: about 1 without seams.

    Mean squared difference between the pixels on both sides of the borders before `rows` and
    `columns`, over that between all other neighbours, of the luma. A picture without any other edge
    gives infinity if its borders show and 1 if they do not. Raises ValueError for borders outside.
    """
    y = luma(picture.double())
    on, off = [], []
    for axis, borders in ((-2, rows), (-1, columns)):
        steps = y.diff(dim=axis).square().movedim(axis, 0)
        inside = torch.zeros(len(steps), dtype=torch.bool)
        for border in borders:
            if not 0 < border <= len(steps):
                raise ValueError(f"border {border} is not inside a picture of {len(steps) + 1} pixels")
            inside[border - 1] = True
        on.append(steps[inside].flatten())
        off.append(steps[~inside].flatten())
    here, elsewhere = torch.cat(on).mean(), torch.cat(off).mean()
    if elsewhere == 0:
        return 1.0 if here == 0 else float("inf")
    return float(here / elsewhere)
