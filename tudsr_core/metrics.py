"""Numbers that say how close two pictures are. Pictures are `B 3 H W`, float, 0..1."""

from __future__ import annotations

import torch
from torch import Tensor

from .image import luma


def psnr_y(picture: Tensor, truth: Tensor) -> float:
    """Return the PSNR in dB of the BT.601 luma (peak 1.0), as super-resolution papers report it."""
    error = (luma(picture.double().clamp(0, 1)) - luma(truth.double())).square().mean()
    return float(-10 * torch.log10(error.clamp_min(1e-12)))


def ssim_y(picture: Tensor, truth: Tensor) -> float:
    """Return SSIM (Wang et al. 2004: Gaussian 11 x 11, sigma 1.5) of the luma of one picture.

    Needs scikit-image (the `metrics` extra).
    """
    from skimage.metrics import structural_similarity

    a, b = (luma(x.double().clamp(0, 1))[0, 0].numpy() for x in (picture, truth))
    return float(
        structural_similarity(a, b, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    )
