"""sRGB's curve (IEC 61966-2-1), and CIELAB of sRGB colours under D50 (CIE 15; Bradford-adapted, Lindbloom)."""

from __future__ import annotations

import torch
from torch import Tensor

# XYZ under D50 to linear sRGB.
FROM_XYZ = (
    (3.1338561, -1.6168667, -0.4906146),
    (-0.9787684, 1.9161415, 0.0334540),
    (0.0719453, -0.2289914, 1.4052427),
)
BREAK = 6 / 29  # where CIELAB's cube root becomes a line


def to_linear(values: Tensor) -> Tensor:
    """Return linear light for sRGB values of any shape; the curve is mirrored below 0 and goes on above 1."""
    size = values.abs()
    curve = torch.where(size <= 0.04045, size / 12.92, ((size + 0.055) / 1.055) ** 2.4)
    return torch.copysign(curve, values)


def from_linear(values: Tensor) -> Tensor:
    """Return sRGB values for linear light; the inverse of `to_linear` everywhere."""
    size = values.abs()
    curve = torch.where(size <= 0.0031308, size * 12.92, 1.055 * size ** (1 / 2.4) - 0.055)
    return torch.copysign(curve, values)


def to_lab(pixels: Tensor) -> Tensor:
    """Return L* 0..100, a*, b* of sRGB pixels `... 3 H W` in 0..1; grey has a* = b* = 0 but for rounding."""
    to_xyz = torch.linalg.inv(torch.tensor(FROM_XYZ, dtype=torch.float64)).to(pixels)
    # Over white, which is what (1, 1, 1) gives: so that the roundings of a matrix colour no grey.
    ratio = torch.einsum("ij,...jhw->...ihw", to_xyz / to_xyz.sum(1, keepdim=True), to_linear(pixels.clamp(0, 1)))
    x, y, z = torch.where(ratio > BREAK**3, ratio.clamp_min(0) ** (1 / 3), ratio / (3 * BREAK**2) + 4 / 29).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def from_lab(lab: Tensor) -> Tensor:
    """Return sRGB pixels `... 3 H W` in 0..1 of L*, a*, b*, cut off at its gamut."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200], -3)
    ratio = torch.where(root > BREAK, root**3, 3 * BREAK**2 * (root - 4 / 29))
    from_xyz = torch.tensor(FROM_XYZ, dtype=torch.float64)
    white = torch.linalg.inv(from_xyz).sum(1)
    linear = torch.einsum("ij,...jhw->...ihw", (from_xyz * white).to(lab), ratio)
    return from_linear(linear.clamp(0, 1))
