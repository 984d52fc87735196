"""Decoded pixels before they become a picture, and what colour models other than RGB mean."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageCms


@dataclass
class Raster:
    """Planes `C H W` float32 0..1 (grey, grey and alpha, RGB, or RGBA), their depth in the file, and notes.

    With `is_light` they are scene-linear, float16 or float32 of any range, as `scene_light.py` has them.
    """

    planes: np.ndarray
    bits: int = 8
    notes: list[str] = field(default_factory=list)
    icc: bytes | None = None
    is_light: bool = False


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
