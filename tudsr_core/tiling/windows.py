"""Weight masks of tiles along one axis, and their normalisation to a sum of 1.

Separable: a tile's mask is the product of a window along its rows and one along its columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Window = Literal["gaussian", "uniform", "published", "centred"]


PUBLISHED_STD = 0.1  # of the tile's side: variance 0.01 in OMGSR, OSEDiff, PiSA-SR


@lru_cache(maxsize=64)
def window(size: int, overlap: int, kind: Window = "gaussian", axis: Literal["x", "y"] = "x") -> Tensor:
    """Return `size` unnormalised weights along one axis, float64.

    "gaussian": std chosen so that where two neighbours meet at the tile's border, the one that
    ends there has about 2 % of the weight; smooth whatever the overlap.
    "uniform": MultiDiffusion's plain average (Bar-Tal et al. 2023, eq. 5).
    "published": std of a tenth of the tile, and half a pixel off centre along y, as OMGSR and
    OSEDiff have it. "centred": the same in the middle of both axes, as PiSA-SR has it.
    """
    if kind == "uniform":
        return torch.ones(size, dtype=torch.float64)
    if kind == "gaussian":
        # Below a twelfth of the side the border weights would underflow.
        std = max(size / 12, max(0.0, (size - overlap) * overlap / 8) ** 0.5)
        return gaussian(size, std, (size - 1) / 2)
    if kind in ("published", "centred"):
        off = kind == "published" and axis == "y"
        return gaussian(size, PUBLISHED_STD * size, size / 2 if off else (size - 1) / 2)
    raise ValueError(f"window is {kind!r}; use one of: {', '.join(get_args(Window))}")


def gaussian(size: int, std: float, center: float) -> Tensor:
    """Return the normal density of `std` around `center` relative to the tile's side, float64."""
    x = torch.arange(size, dtype=torch.float64)
    density = torch.exp(-((x - center) ** 2) / (2 * std**2))
    return density / ((2 * torch.pi) ** 0.5 * std / size)


def normalised(length: int, offsets: tuple[int, ...], weights: Tensor) -> list[Tensor]:
    """Return `weights` for each of `offsets` over `length`, divided by the sum of all there, float64."""
    total = torch.zeros(length, dtype=torch.float64)
    for start in offsets:
        total[start : start + len(weights)] += weights
    return [weights / total[start : start + len(weights)] for start in offsets]
