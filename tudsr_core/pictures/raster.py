"""Decoded pixels before they become a picture, and what colour models other than RGB mean."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageCms

# XYZ under D50 to linear sRGB, Bradford-adapted (IEC 61966-2-1; Lindbloom).
XYZ_TO_SRGB = (
    (3.1338561, -1.6168667, -0.4906146),
    (-0.9787684, 1.9161415, 0.0334540),
    (0.0719453, -0.2289914, 1.4052427),
)
WHITE_D50 = (0.96422, 1.0, 0.82521)


@dataclass
class Raster:
    """Planes `C H W` float32 0..1 (grey, grey and alpha, RGB, or RGBA), their depth in the file, and notes."""

    planes: np.ndarray
    bits: int = 8
    notes: list[str] = field(default_factory=list)
    icc: bytes | None = None


def scaled(planes: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low..high` of `C H W` numbers to float32 0..1, cut off outside."""
    out = np.empty(planes.shape, np.float32)
    exact = planes.dtype.itemsize <= 2 and low == 0
    for plane, values in zip(out, planes, strict=True):
        if exact:
            np.divide(values, np.float32(high), out=plane, dtype=np.float32, casting="unsafe")
        else:
            plane[:] = (values.astype(np.float64) - low) / (high - low)
    return np.clip(out, 0, 1, out=out)


def unpremultiplied(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Divide premultiplied colour `C H W` by `alpha` `H W`; where that is 0, colour is 0."""
    return np.clip(np.divide(color, alpha, out=np.zeros_like(color), where=alpha > 0), 0, 1)


def cmyk_to_rgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """Convert a CMYK image to sRGB through its profile; without a usable one by Pillow's plain rule."""
    if not icc:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("its CMYK profile is unusable; colours are converted without it")
        return image.convert("RGB")


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """Convert `3 H W` of L* 0..100 and a*, b* (D50) to sRGB 0..1, cut off at its gamut (CIE 15)."""
    base = (lab[0] + 16) / 116
    xyz = []
    for ratio, white in zip((base + lab[1] / 500, base, base - lab[2] / 200), WHITE_D50, strict=True):
        xyz.append(white * np.where(ratio > 6 / 29, ratio**3, 3 * (6 / 29) ** 2 * (ratio - 4 / 29)))
    linear = np.clip([sum(k * plane for k, plane in zip(row, xyz, strict=True)) for row in XYZ_TO_SRGB], 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)
