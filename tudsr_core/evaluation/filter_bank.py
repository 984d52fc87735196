"""A closed-form rival: a bank of least-squares filters chosen by local structure (RAISR).

Romano, Isidoro, Milanfar 2016: pixels of the bicubic enlargement are put into classes by the
angle, strength and coherence of the local gradient, and each class has one linear filter, fitted
in closed form. A network that does not beat it has not earned its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..assets import asset_path
from ..pictures import luma, resize

ANGLES, STRENGTHS, COHERENCES = 16, 3, 3
CLASSES = ANGLES * STRENGTHS * COHERENCES
SIDE = 9
STRENGTH_EDGES = torch.tensor([0.0001, 0.001])
COHERENCE_EDGES = torch.tensor([0.25, 0.5])


def bank_path() -> Path:
    """Return the bank shipped with the package: `x4` and `x8`, each `CLASSES x SIDE^2`."""
    return asset_path("filter_bank.safetensors")


def enlarge(small: Tensor, size: tuple[int, int], bank: Tensor | None = None) -> Tensor:
    """Enlarge `B 3 h w` to `size`: filters on the luma, bicubic for the rest. Returns `B 3 H W`, 0..1."""
    start = resize(small, size)
    if bank is None:
        factor = size[0] / small.shape[-2]
        bank = load_file(bank_path())["x4" if factor < 5.7 else "x8"].float()
    gray = luma(start)
    filtered = (_patches(gray) * bank[classify(gray)].transpose(1, 2)).sum(1)
    # Adding the luma difference to R, G and B moves the studio-range luma by 219/255 of it.
    change = (filtered.view_as(gray) - gray) * (255 / 219)
    return (start + change).clamp(0, 1)


def classify(gray: Tensor) -> Tensor:
    """Return the class `B H*W` of every pixel of `B 1 H W`, from its 9 x 9 structure tensor."""
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    xx, xy, yy = (_smooth(product) for product in (dx * dx, dx * dy, dy * dy))
    root = ((xx - yy).square() + 4 * xy.square()).clamp_min(0).sqrt()
    large, little = (xx + yy + root) / 2, ((xx + yy - root) / 2).clamp_min(0)
    angle = torch.atan2(2 * xy, xx - yy) / 2 % math.pi
    angle = (angle / math.pi * ANGLES).long().clamp(0, ANGLES - 1)
    strength = torch.bucketize(large, STRENGTH_EDGES)
    ratio = (large.sqrt() - little.sqrt()) / (large.sqrt() + little.sqrt() + 1e-6)
    coherence = torch.bucketize(ratio, COHERENCE_EDGES)
    return ((angle * STRENGTHS + strength) * COHERENCES + coherence).flatten(1)


def _smooth(x: Tensor) -> Tensor:
    half = SIDE // 2
    row = torch.exp(-(torch.arange(-half, half + 1, dtype=x.dtype) ** 2) / (2 * 2.0**2))
    row = row / row.sum()
    padded = F.pad(x, (half,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))


def _patches(gray: Tensor) -> Tensor:
    half = SIDE // 2
    return F.unfold(F.pad(gray, (half,) * 4, mode="replicate"), SIDE)


def fit_bank(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-3) -> Tensor:
    """Return the bank `CLASSES x SIDE^2` that minimises squared luma error over `(small, sharp)` pairs.

    Solves (A'A + ridge n I) w = A'b per class, pulled towards the identity filter so that rare
    classes do nothing.
    """
    gram = torch.zeros(CLASSES, SIDE**2, SIDE**2, dtype=torch.float64)
    cross = torch.zeros(CLASSES, SIDE**2, dtype=torch.float64)
    count = torch.zeros(CLASSES, dtype=torch.float64)
    identity = torch.zeros(SIDE**2, dtype=torch.float64)
    identity[SIDE**2 // 2] = 1
    for small, sharp in pairs:
        start = luma(resize(small, tuple(sharp.shape[-2:])))
        patches = _patches(start)[0].T.double()
        error = (luma(sharp) - start).flatten().double()
        classes = classify(start)[0]
        for index in classes.unique().tolist():
            chosen = classes == index
            block = patches[chosen]
            gram[index] += block.T @ block
            cross[index] += block.T @ error[chosen]
            count[index] += chosen.sum()
    eye = torch.eye(SIDE**2, dtype=torch.float64)
    solved = torch.linalg.solve(gram + eye * (ridge * count + 1e-6).view(-1, 1, 1), cross)
    return (solved + identity).float()
