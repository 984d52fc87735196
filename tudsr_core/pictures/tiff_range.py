"""Which numbers of a TIFF file are black and white: as it declares, or as its pixels make likely, which is noted."""

from __future__ import annotations

import math

import numpy as np

from .files import Unsuitable

NEARLY = 1.001  # what rounding may make of 1
DEPTHS = (8, 10, 12, 14, 16)


def range_of(page, planes: np.ndarray, notes: list[str], first: int = 0) -> tuple[float, float]:
    """Return which numbers are black and white in the channels from `first` on, and note what had to be assumed."""
    declared = declared_range(page, first, len(planes))
    if planes.dtype.kind in "bu":  # numpy's kind "b" is bool
        white = 2**page.bitspersample - 1
        if declared and _is_depth(declared[1]) and planes.max() <= declared[1] < white:
            notes.append(f"its white is {declared[1]:g}, as the file declares")
            return 0, declared[1]
        return 0, white
    if planes.dtype.kind == "i":
        if not declared:
            raise Unsuitable(f"its pixels are {planes.dtype}, whose range is not declared; save it as 8 or 16 bit")
        notes.append(f"its signed numbers are read from {declared[0]:g} to {declared[1]:g}, as the file declares")
        return declared
    if not np.isfinite(planes).all():
        raise Unsuitable("it contains NaN or infinite values; repair it or export it again")
    if declared:
        if declared != (0, 1):
            notes.append(f"its float numbers are read from {declared[0]:g} to {declared[1]:g}, as the file declares")
        return declared
    white = _float_white(planes, notes)
    bottom = float(planes.min())
    if bottom < (1 - NEARLY) * white:
        notes.append(f"its float numbers begin at {bottom:g} and declare no range; those below 0 are cut off")
    return 0, white


def _float_white(planes: np.ndarray, notes: list[str]) -> float:
    """Return white of float numbers that declare no range: 1, or a whole number's where they look like its steps."""
    top = float(planes.max())
    if top <= NEARLY:
        return 1
    said = f"its float numbers reach {top:g} and declare no range"
    white = 1
    if np.median(planes) > 1:
        white = next((2**bits - 1 for bits in DEPTHS if top <= 2**bits - 0.5), None)
        if white is None:
            raise Unsuitable(f"{said}; export them as 0..1")
        # Bright light reaches any number, mostly of fractions: read as a dark picture of some depth, it would be black.
        if top <= white / 2 and (planes != np.rint(planes)).any():
            white = 1
    notes.append(f"{said}; " + (f"{white} is taken for white" if white > 1 else "those above 1 are cut off"))
    return white


def declared_range(page, first: int = 0, count: int = 1) -> tuple[float, float] | None:
    """Return SMinSampleValue and SMaxSampleValue, or MinSampleValue and MaxSampleValue, if they make sense.

    Where a file says one for each channel, those of `count` channels from `first` on.
    """
    for low_tag, high_tag in ((340, 341), (280, 281)):
        if high_tag not in page.tags:
            continue
        try:
            low, high = (np.atleast_1d(page.tags.valueof(tag, 0)) for tag in (low_tag, high_tag))
            own = slice(first, first + count)
            low = float(np.min(low[own] if len(low) == page.samplesperpixel else low))
            high = float(np.max(high[own] if len(high) == page.samplesperpixel else high))
        except (TypeError, ValueError):
            continue
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    return None


def _is_depth(white: float) -> bool:
    return any(white == 2**bits - 1 for bits in range(8, 32))
