"""TIFF files of any depth: what their numbers mean is decided from the header, or the file is refused.

The header is checked before a pixel is decoded: a TIFF may claim any number of tags, strips and
bytes, and point all of them at the same place.
"""

from __future__ import annotations

import logging
import math
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from .files import Unsuitable, check_size
from .raster import Raster, cmyk_to_rgb, scaled, unpremultiplied
from .srgb import from_lab
from .tiff_range import DEPTHS, NEARLY, declared_range, range_of

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_TAGS, MAX_SEGMENTS, MAX_CHANNELS = 1000, 200_000, 64
VALUE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # by TIFF's type number
NONE, PACKBITS, LZW, DEFLATES, LZMA, ZSTD = 1, 32773, 5, (8, 32946), 34925, 50000
DECODED_HERE = {NONE, PACKBITS, LZW, *DEFLATES, LZMA, ZSTD}
# libtiff, in Pillow, checks what is inside a JPEG or fax strip against the header.
DECODED_BY_PILLOW = {2, 3, 4, 6, 7}
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
COLORS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, CIELAB: 3, ICCLAB: 3}
COLORMAP, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 320, 332, 338, 339, 34675
PREMULTIPLIED, ALPHA = 1, 2
REDUCED = 1  # of NewSubfileType


def read_tiff(path: Path, max_megapixels: float | None = None, floats_are_light: bool = False) -> Raster | None:
    """Decode the first picture of a TIFF file; None if Pillow is to decode it (JPEG, fax and YCbCr).

    `floats_are_light`: float numbers that declare no range are scene-linear, of any range, and stay what they are.
    Raises Unsuitable with a reason, and whatever damage leads to (ValueError, or what tifffile raises).
    """
    size = path.stat().st_size
    with _first_page(path) as (page, notes):
        _check_page(page, size, max_megapixels)
        if page.compression in DECODED_BY_PILLOW or page.photometric == YCBCR:
            if page.bitspersample not in (1, 8):
                what, remedy = ("YCbCr", "as RGB") if page.compression == NONE else ("compressed", "without JPEG")
                raise Unsuitable(f"its {what} samples are {page.bitspersample}-bit; save it {remedy}")
            return None
        _check_segments(page, size)
        array = page.asarray(maxworkers=1, squeeze=False)[:, 0]
        planes = array[..., 0] if array.shape[0] > 1 else np.moveaxis(array[0], -1, 0)
        icc = page.tags.valueof(PROFILE)
        return (floats_are_light and _light(page, planes, icc, notes)) or _interpret(page, planes, icc, notes)


def checked_page(path: Path, max_megapixels: float | None = None):  # noqa: ANN201
    """Return tifffile's page of the first picture, for its strips to be decoded one by one.

    Raises what `read_tiff` does, and Unsuitable where Pillow would have to decode it.
    """
    size = path.stat().st_size
    with _first_page(path) as (page, _):
        _check_page(page, size, max_megapixels)
        _check_segments(page, size)
        # looked up while the file is open
        _ = page.dataoffsets, page.databytecounts, page.decode, page.tags.valueof(PROFILE)
        return page


@contextmanager
def _first_page(path: Path):
    """Yield tifffile's first page of a file whose directory is sound, and notes."""
    import tifffile

    with _quiet_tifffile(), path.open("rb") as file:
        more = _check_directory(file, path.stat().st_size)
        file.seek(0)
        flags = [f"is_{name}" for name in tifffile.TIFF.FILE_FLAGS]
        # Older versions work some out themselves, and do not let them be set.
        settable = [flag for flag in flags if not isinstance(getattr(tifffile.TiffFile, flag, None), property)]
        with tifffile.TiffFile(file, **dict.fromkeys(settable, False)) as tiff:
            yield tiff.pages[0], ["this file holds several pictures; only the first is used"] if more else []


@contextmanager
def _quiet_tifffile():
    """Keep tifffile's own log lines off the terminal: what matters becomes an error or a note."""
    logger = logging.getLogger("tifffile")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_directory(file: BinaryIO, size: int) -> bool:
    """Refuse a first directory that claims more than the file holds; return whether another follows."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    address = "Q" if big else "I"
    offset = struct.unpack_from(order + address, head, 8 if big else 4)[0]
    counted, entry, inline = ("Q", "HHQ8s", 8) if big else ("H", "HHI4s", 4)
    if offset >= size:
        raise ValueError("its directory lies beyond its end")
    file.seek(offset)
    (tags,) = struct.unpack(order + counted, file.read(struct.calcsize(counted)))
    if not 0 < tags <= MAX_TAGS:
        raise ValueError(f"its directory claims {tags} tags")
    claimed = 0
    kinds = None
    for tag, kind, count, value in struct.iter_unpack(order + entry, file.read(tags * struct.calcsize(order + entry))):
        length = count * (VALUE_BYTES[kind] if kind < len(VALUE_BYTES) else 0)
        claimed += length if length > inline else 0
        if claimed > size:
            raise ValueError("its tags claim more bytes than it holds")
        if (tag, kind) == (SAMPLE_FORMAT, 3) and 1 < count <= MAX_CHANNELS:
            kinds = (count, value if length <= inline else struct.unpack(order + address, value)[0])
    following = file.read(inline)
    if kinds:
        _check_kinds(file, order, *kinds)
    return len(following) == inline and any(following)


def _check_kinds(file: BinaryIO, order: str, count: int, where: bytes | int) -> None:
    """Refuse channels of different kinds of numbers, which tifffile takes for damage."""
    if isinstance(where, int):
        file.seek(where)
        where = file.read(2 * count)
    if len(set(struct.unpack_from(f"{order}{count}H", where))) > 1:
        raise Unsuitable("its channels are of different kinds (whole numbers, floats); save it with one kind for all")


def _check_page(page, size: int, max_megapixels: float | None) -> None:
    bits = page.bitspersample
    if page.imagedepth != 1 or getattr(page, "tiledepth", 1) not in (0, 1):
        raise Unsuitable(f"it is a volume of {page.imagedepth} layers; save one layer as a picture")
    if page.subfiletype & REDUCED:
        raise Unsuitable("its first picture is a thumbnail of another (camera raw?); save that as a plain TIFF")
    if isinstance(bits, tuple):
        raise Unsuitable(f"its channels have {bits} bits; save it with the same depth in all")
    if page.samplesperpixel > MAX_CHANNELS:
        raise Unsuitable(f"it has {page.samplesperpixel} channels; save it as one grey, RGB or RGBA picture")
    pixel_bytes = page.samplesperpixel * max(1, math.ceil(bits / 8))
    check_size((page.imagelength, page.imagewidth), pixel_bytes, size, max_megapixels)
    if page.is_tiled:
        sides = ((page.imagelength, page.tilelength), (page.imagewidth, page.tilewidth))
        padded = tuple(math.ceil(side / tile) * tile for side, tile in sides)
        check_size(padded, pixel_bytes, size, max_megapixels, "pixels, with the rest of its tiles,")


def _check_segments(page, size: int) -> None:
    """Refuse what tifffile would decode without question: missing, shared, or too many strips and tiles."""
    if page.compression not in DECODED_HERE:
        raise Unsuitable(f"its compression ({page.compression}) is not read; save it as LZW or ZIP")
    if page.dtype is None or page.dtype.kind not in "buif":
        raise Unsuitable(f"its pixels are {page.bitspersample}-bit of an unusual kind; save it with 8 or 16 bit")
    wanted = math.prod(page.chunked)
    if wanted > MAX_SEGMENTS:
        raise Unsuitable(f"it is cut into {wanted:,} strips or tiles; save it with larger ones")
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) < wanted or len(counts) < wanted:
        raise ValueError(f"{wanted - min(len(offsets), len(counts))} of its {wanted} strips or tiles are missing")
    ends = [offset + count for offset, count in zip(offsets, counts, strict=False)]
    if min(offsets) < 8 or min(counts) < 1 or max(ends) > size:
        raise ValueError("some of its strips or tiles are empty or lie beyond its end")
    if page.compression == NONE and sum(counts) < page.nbytes * min(1, page.bitspersample / (8 * page.dtype.itemsize)):
        raise ValueError(f"{page.nbytes:,} bytes of pixels are {sum(counts):,} in the file")
    if sum(counts) > 2 * size:
        raise Unsuitable("its strips or tiles overlap in the file; save it again")


def _interpret(page, planes: np.ndarray, icc: bytes | None, notes: list[str]) -> Raster:
    photometric = _photometric(page)
    colors = 1 if photometric in (CIELAB, ICCLAB) and len(planes) < 3 else COLORS[photometric]
    if len(planes) < colors:
        raise ValueError(f"it has {len(planes)} channels where its colours need {colors}")
    alpha_at, kind = _alpha(page, photometric, len(planes) - colors, notes)
    color, bits, icc = _colors(page, photometric, planes[:colors], icc, notes)
    alpha = None if alpha_at is None else _transparency(page, planes, colors + alpha_at, notes)
    if kind == PREMULTIPLIED:
        color = unpremultiplied(color, alpha)
    return Raster(color if alpha is None else np.concatenate([color, alpha[None]]), bits, notes, icc)


def _light(page, planes: np.ndarray, icc: bytes | None, notes: list[str]) -> Raster | None:
    """Return float planes as they are, colours times alpha; None where they are no floats, or declare a range."""
    photometric = _photometric(page)
    if planes.dtype.kind != "f" or photometric not in (BLACK_IS_ZERO, RGB) or declared_range(page):
        return None
    if not np.isfinite(planes).all():
        raise Unsuitable("it contains NaN or infinite values; repair it or export it again")
    colors = COLORS[photometric]
    alpha_at, kind = _alpha(page, photometric, len(planes) - colors, notes)
    color = planes[:colors].astype(np.float32)
    if alpha_at is None:
        return Raster(color, 16, notes, icc, is_light=True)
    alpha = planes[colors + alpha_at][None].astype(np.float32)
    color = color if kind == PREMULTIPLIED else color * alpha
    return Raster(np.concatenate([color, alpha]), 16, notes, icc, is_light=True)


def _photometric(page) -> int:
    if 262 not in page.tags:
        return RGB if page.samplesperpixel >= 3 else BLACK_IS_ZERO
    if page.photometric not in COLORS:
        name = getattr(page.photometric, "name", page.photometric)
        raise Unsuitable(f"its colour model ({name}) is not read; save it as grey or RGB")
    return int(page.photometric)


def _alpha(page, photometric: int, extra: int, notes: list[str]) -> tuple[int | None, int]:
    """Return which of the `extra` channels is transparency, if any, and of which kind."""
    declared = page.tags.valueof(EXTRA_SAMPLES)
    kinds = () if declared is None else tuple(np.atleast_1d(declared).tolist())
    if declared is None and extra == 1 and photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        kinds = (ALPHA,)
    found = [(at, kind) for at, kind in enumerate(kinds[:extra]) if kind in (PREMULTIPLIED, ALPHA)]
    left = extra - bool(found)
    if left:
        notes.append(f"{left} extra channel{'s' * (left > 1)} beside colour and transparency left out")
    if found and found[0][1] == PREMULTIPLIED and photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        raise Unsuitable("its premultiplied transparency is not read in this colour model; save it as RGB")
    return found[0] if found else (None, ALPHA)


def _transparency(page, planes: np.ndarray, at: int, notes: list[str]) -> np.ndarray:
    """Return the plane `at` as alpha 0..1; programs scale it apart from the colours, so its own values decide."""
    plane = planes[at][None]
    low, high = range_of(page, plane, [], at)
    if plane.dtype.kind == "f" and not declared_range(page, at):
        top = float(plane.max())
        # Filters overshoot a little; much more than opaque is no highlight, as it is of colours, but a whole number.
        if top > 2:
            high = next((2**bits - 1 for bits in DEPTHS if top <= 2**bits - 0.5), None)
            if high is None:
                raise Unsuitable(f"its float transparency reaches {top:g} and declares no range; export it as 0..1")
        if top > NEARLY or float(planes[:at].max()) > NEARLY:
            notes.append(f"its float transparency reaches {top:g} and declares no range; {high} is taken for opaque")
    return scaled(plane, low, high)[0]


def _colors(page, photometric: int, planes: np.ndarray, icc: bytes | None, notes: list[str]):
    """Return colour planes `1 or 3 H W`, their depth, and the profile that still holds for them."""
    bits = 8 if page.bitspersample <= 8 else 16
    if photometric == PALETTE:
        return *_from_palette(page, planes[0]), icc
    if photometric in (CIELAB, ICCLAB):
        notes.append("its CIELab colours are converted to sRGB")
        return from_lab(torch.from_numpy(_lab(planes, photometric, page.bitspersample))).numpy(), bits, None
    values = scaled(planes, *range_of(page, planes, notes))
    if photometric == CMYK:
        if page.tags.valueof(INK_SET, 1) != 1:
            raise Unsuitable("its inks are not CMYK; save it as RGB")
        if bits > 8:
            notes.append("CMYK is converted to RGB at 8 bit")
        inks = Image.fromarray(np.moveaxis((values * 255).round().astype(np.uint8), 0, -1).copy(), "CMYK")
        rgb = np.asarray(cmyk_to_rgb(inks, icc, notes))
        return scaled(np.moveaxis(rgb, -1, 0), 0, 255), 8, None
    if photometric == WHITE_IS_ZERO:
        np.subtract(1, values, out=values)
    return values, bits, icc


def _from_palette(page, index: np.ndarray) -> tuple[np.ndarray, int]:
    colormap = page.tags.valueof(COLORMAP)
    table = np.asarray(() if colormap is None else colormap).reshape(-1)
    if index.dtype.kind not in "bu" or page.bitspersample > 16 or table.size != 3 * 2**page.bitspersample:
        raise Unsuitable("its palette does not fit its depth; save it as RGB")
    table = table.reshape(3, -1)
    index = index.astype(np.uint16)
    if table.max() < 256:  # written by programs that take 8 bit for the whole range
        return scaled(table[:, index], 0, 255), 8
    if not (table & 255).any():
        return scaled(table[:, index] >> 8, 0, 255), 8
    return scaled(table[:, index], 0, 65535), 8 if not (table % 257).any() else 16


def _lab(planes: np.ndarray, photometric: int, bits: int) -> np.ndarray:
    """Return L* 0..100, a*, b* of unsigned or signed 8- or 16-bit planes (TIFF 6.0, section 23; TTN1)."""
    if planes.dtype.kind not in "ui" or bits not in (8, 16):
        kind = "float" if planes.dtype.kind == "f" else f"{bits}-bit"
        raise Unsuitable(f"its CIELab samples are {kind}; save it with 8 or 16 bit, or as RGB")
    unsigned = planes.view(f"u{planes.dtype.itemsize}")
    lightness = unsigned[:1].astype(np.float32) * (100 / (2**bits - 1))
    if len(planes) == 1:
        return np.concatenate([lightness, np.zeros_like(lightness), np.zeros_like(lightness)])
    chroma = unsigned[1:].astype(np.int32)
    middle = 2 ** (bits - 1)
    chroma = chroma - middle if photometric == ICCLAB else np.where(chroma >= middle, chroma - 2**bits, chroma)
    return np.concatenate([lightness, chroma.astype(np.float32) / 2 ** (bits - 8)])
