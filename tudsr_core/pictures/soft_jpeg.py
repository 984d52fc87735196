"""JPEG without its files: blocks, DCT and quantisation in float, at any fractional quality (DiffJPEG, Lomnitz 2018).

Training data needs thousands of compressions a minute, on any device; Pillow's codec is in `degradations.py`.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# The tables of the JPEG standard (ITU T.81, annex K), rows are vertical frequencies.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF: luma, blue and red difference of RGB, all 0..255, the differences before 128 is added.
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
FINEST = 1e-4  # of the factor: at quality 100 it would be 0, and the tables with it


def soft_jpeg(image: Tensor, quality: float) -> Tensor:
    """Compress `B 3 H W` in 0..1 at a `quality` of 1..100 with 4:2:0 chroma, and return it, 0..1.

    Sides are filled up with black to multiples of 16. Tables are scaled as libjpeg does, by 50 / q
    below 50 and 2 - q / 50 above, but not rounded. (DiffJPEG has the luma table transposed.)
    """
    height, width = image.shape[-2:]
    scale = max(FINEST, 50 / quality if quality < 50 else 2 - quality / 50)
    padded = F.pad(image.float() * 255, (0, -width % 16, 0, -height % 16))
    ycc = torch.einsum("kc,bchw->bkhw", padded.new_tensor(TO_YCC), padded)
    luma = _quantised(ycc[:, :1] - 128, LUMA_TABLE, scale) + 128
    chroma = _quantised(F.avg_pool2d(ycc[:, 1:], 2), CHROMA_TABLE, scale)
    chroma = chroma.repeat_interleave(2, -1).repeat_interleave(2, -2)
    rgb = torch.einsum("ck,bkhw->bchw", padded.new_tensor(TO_RGB), torch.cat([luma, chroma], 1))
    return (rgb.clamp(0, 255) / 255)[..., :height, :width].to(image.dtype)


def jpeg_with_gradient(image: Tensor, quality: float) -> Tensor:
    """Return `soft_jpeg` of `image`, whose rounding, here alone, has a gradient of 1."""
    with torch.no_grad():
        change = soft_jpeg(image, quality) - image
    return image + change


def _quantised(planes: Tensor, table: tuple[tuple[int, ...], ...], scale: float) -> Tensor:
    dct = _dct().to(planes)
    steps = planes.new_tensor(table) * scale
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)  # ... rows columns 8 8
    coefficients = (dct @ blocks @ dct.T / steps).round() * steps
    return (dct.T @ coefficients @ dct).transpose(-2, -3).flatten(-4, -3).flatten(-2)


@cache
def _dct() -> Tensor:
    """The orthonormal DCT-II of 8 values, `frequency place`."""
    place = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * place[None] + 1) * place[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
