"""OpenEXR files: one picture of grey or RGB, with or without alpha, out of and into them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .files import Unsuitable, check_size

MAGIC = b"\x76\x2f\x31\x01"
MAX_CHANNELS = 256
REC709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
RGB, GREY = ("R", "G", "B"), ("Y",)


def read_exr(path: Path, max_megapixels: float | None = None) -> tuple[np.ndarray, float | None, list[str]]:
    """Return `(planes, dpi or None, notes)` of the first part of an OpenEXR file.

    `planes` are `C H W`, float16 or float32 as the file has them, C = 1 to 4: grey, grey and alpha, RGB, RGBA; over
    the display window, 0 where there is no data. Raises Unsuitable, and whatever damage leads to.
    """
    import OpenEXR

    size = path.stat().st_size
    with OpenEXR.File(str(path), header_only=True) as file:
        header = dict(_checked(file.parts, size, max_megapixels))  # closing empties the file's own
        names, notes = _chosen(channel.name for channel in header.pop("channels"))
    with OpenEXR.File(str(path), separate_channels=True) as file:
        if not file.parts:
            raise ValueError("its pixels cannot be decoded")
        planes = [file.parts[0].channels[name].pixels for name in names]
        if any(plane.dtype.kind != "f" for plane in planes):
            raise Unsuitable("its channels are whole numbers, not light; save them as half or float")
        array = _windowed(np.stack(planes), header)  # half and float channels together become float
    if not np.isfinite(array).all():
        raise Unsuitable("it contains NaN or infinite values; repair it or export it again")
    return array, _dpi(header), [*notes, *_assumed(header)]


def _checked(parts: list, size: int, max_megapixels: float | None) -> dict[str, Any]:
    """Return the first part's header, once all of it can be decoded; OpenEXR decodes all parts."""
    import OpenEXR

    if not parts:
        raise ValueError("its header cannot be read")
    for number, part in enumerate(parts):
        header = part.header
        channels = header["channels"]
        if header.get("type", OpenEXR.scanlineimage) not in (OpenEXR.scanlineimage, OpenEXR.tiledimage):
            raise Unsuitable("it holds deep pixels; save it flattened")
        if len(channels) > MAX_CHANNELS:
            raise Unsuitable(f"it has {len(channels)} channels; save it as one grey, RGB or RGBA picture")
        if any((channel.xSampling, channel.ySampling) != (1, 1) for channel in channels):
            raise Unsuitable("its colour is stored at less than the full size (luminance and chroma); save it as RGB")
        for window in ("dataWindow", "displayWindow"):
            what = f"pixels of its {'data' if window == 'dataWindow' else 'display'} window"
            check_size(_extent(header[window]), 4 * len(channels) * len(parts), size, max_megapixels, what)
        if number == 0:
            first = header
    return first


def _extent(window: tuple) -> tuple[int, int]:
    (left, top), (right, bottom) = ((int(value) for value in corner) for corner in window)
    return bottom - top + 1, right - left + 1


def _chosen(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the channels that are the picture, in order, and notes; raises Unsuitable where none or several may be."""
    found = sorted(names)
    layers = {name.rpartition(".")[0] for name in found}
    fitting = []
    for layer in sorted(layers):
        start = f"{layer}." if layer else ""
        for kind in (RGB, GREY):
            if all(start + channel in found for channel in kind):
                fitting.append((start, kind))
                break
    plain = [one for one in fitting if one[0] == ""]
    chosen = plain or fitting
    if len(chosen) != 1:
        what = "several layers of colour" if chosen else "no channels R, G, B or Y"
        raise Unsuitable(f"it has {what} ({', '.join(found[:8])}); save one as R, G, B")
    start, kind = chosen[0]
    own = [start + channel for channel in (*kind, "A") if start + channel in found]
    left = [name for name in found if name not in own]
    notes = [f"its layer {start[:-1]} is used"] if start else []
    notes += [f"{len(left)} other channel{'s' * (len(left) > 1)} left out ({', '.join(left[:8])})"] if left else []
    return own, notes


def _windowed(array: np.ndarray, header: dict[str, Any]) -> np.ndarray:
    """Return `C H W` over the display window."""
    data, shown = header["dataWindow"], header["displayWindow"]
    height, width = _extent(shown)
    top, left = (int(data[0][axis]) - int(shown[0][axis]) for axis in (1, 0))
    if (top, left) == (0, 0) and array.shape[-2:] == (height, width):
        return array
    made = np.zeros((len(array), height, width), array.dtype)
    own, there = zip(
        *(_overlap(*axis) for axis in ((top, array.shape[-2], height), (left, array.shape[-1], width))), strict=True
    )
    made[:, there[0], there[1]] = array[:, own[0], own[1]]
    return made


def _overlap(start: int, length: int, shown: int) -> tuple[slice, slice]:
    first, last = max(0, start), max(0, start, min(shown, start + length))
    return slice(first - start, max(first, last) - start), slice(first, max(first, last))


def _dpi(header: dict[str, Any]) -> float | None:
    density = header.get("xDensity")
    return float(density) if isinstance(density, int | float) else None


def _assumed(header: dict[str, Any]) -> list[str]:
    notes = []
    primaries = header.get("chromaticities")
    if primaries is not None and not np.allclose(np.asarray(primaries, float), REC709, atol=2e-3):
        notes.append("its primaries are not sRGB's and are taken for them")
    if abs(float(header.get("pixelAspectRatio", 1)) - 1) > 1e-3:
        notes.append("its pixels are not square and are taken for square ones")
    if any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(header["dataWindow"], header["displayWindow"], strict=True)
    ):
        notes.append("its data window is cut, or filled with 0, to its display window")
    return notes


def write_exr(file: BinaryIO, planes: np.ndarray, dpi: float | None) -> None:
    """Write `C H W` (C = 1 to 4 as in `read_exr`) of float16 or float32 as one scan-line part, ZIP compressed."""
    import OpenEXR

    names = (*(RGB if len(planes) > 2 else GREY), "A")[: len(planes)]
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    header |= {"xDensity": float(dpi)} if dpi else {}
    channels = {name: np.ascontiguousarray(plane) for name, plane in zip(names, planes, strict=True)}
    with OpenEXR.File(header, channels) as made:
        made.write(file)
