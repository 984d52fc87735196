"""Writing picture files of 8 and 16 bit and of floats, with their EXIF, ICC profile and DPI, under a temporary name."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from ..atomic_write import temporary_beside
from ..missing_packages import needs
from . import exr, png
from .files import FLOAT_BITS, FORMATS, NoRoomError, Picture, PictureError
from .metadata import exif_for, fields_of, fitted, text_bytes
from .scene_light import beyond, light_of

MAX_SIDE = {"JPEG": 65535, "WEBP": 16383}
HALF_MAX = 65504.0  # the largest half
ROUNDED_ROWS = 64  # at once: rounding takes eight bytes a number, which stay in the caches


def check_output(path: Path, size: tuple[int, int], has_alpha: bool, bits: int, overwrite: bool) -> None:
    """Raise PictureError if a picture of this kind could not be written to `path` afterwards."""
    path = Path(path)
    kind = format_of(path)
    check_free(path, overwrite)
    if not path.parent.is_dir():
        raise PictureError(f"folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK):
        raise PictureError(f"folder {path.parent} is not writable; choose another")
    if max(size) > MAX_SIDE.get(kind, 2**31):
        raise PictureError(f"{path}: {kind} holds at most {MAX_SIDE[kind]} pixels a side; use .png or .tif")
    if kind == "JPEG" and has_alpha:
        raise PictureError(f"{path}: JPEG cannot hold transparency; use .png, .webp or .tif")
    if bits == 16 and kind not in ("PNG", "TIFF", "OpenEXR"):
        raise PictureError(f"{path}: {kind} cannot hold 16 bit; use .png or .tif, or --bits 8")
    if bits == FLOAT_BITS and kind not in ("TIFF", "OpenEXR"):
        raise PictureError(f"{path}: {kind} cannot hold floats; use .tif or .exr, or --bits 16")


def check_free(path: Path, overwrite: bool) -> None:
    """Raise PictureError if `path` exists and is not to be replaced."""
    if path.exists() and not overwrite:
        raise PictureError(f"{path} already exists; use --force to replace it, or another name")


def format_of(path: Path) -> str:
    """Return the format that the suffix of `path` names; raises PictureError for others."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise PictureError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(FORMATS)}") from None


def holds_light(kind: str, bits: int) -> bool:
    """Whether a file of `kind` and `bits` holds scene-linear floats, of any range."""
    return kind == "OpenEXR" or (kind == "TIFF" and bits == FLOAT_BITS)


def bits_for(picture: Picture, path: Path, asked: int | None = None) -> int:
    """Return the bits of a result at `path`: those `asked` for, else as deep as the source and the format go."""
    if asked or format_of(path) != "OpenEXR":
        return asked or picture.bits
    half = picture.bits == 8 if picture.light is None else picture.light.dtype == torch.float16
    return 16 if half else FLOAT_BITS


def writable(picture: Picture, path: Path, size: tuple[int, int]) -> Picture:
    """Return `picture` with only the metadata that can be written to `path`; its notes say what was left out.

    Tried on a picture of a few pixels, as one of `size`, before anything is computed.
    """
    kind = format_of(path)
    channels = 1 if picture.is_grey and kind != "WEBP" else 3
    picture, notes = fitted(picture, kind, channels + picture.has_alpha)
    if picture.light is not None and not holds_light(kind, picture.bits):
        picture, more = _of_light(picture, kind)
        notes += more
    light = None if picture.light is None else picture.light[:, :, :1, :1]
    sample = replace(picture, pixels=picture.pixels[:, :, :1, :1], light=light)
    for name, what in (("exif", "EXIF"), ("icc", "colour profile"), ("dpi", "resolution")):
        alone = replace(sample, **dict.fromkeys({"exif", "icc", "dpi"} - {name}))
        try:
            _encode(io.BytesIO(), kind, alone, 95, size)
        except ImportError:  # said when the picture itself is to be written
            break
        except Exception:  # encoders raise anything on metadata they were not made for
            picture = replace(picture, **{name: None})
            notes.append(f"its {what} cannot be written to {kind} and is left out")
    return replace(picture, notes=tuple(dict.fromkeys([*picture.notes, *notes])))


def _of_light(picture: Picture, kind: str) -> tuple[Picture, list[str]]:
    """Return a picture that was made of light as one for files of `kind`, which hold sRGB, and what that costs."""
    notes = []
    if beyond(picture.light) is not None:
        notes.append(f"light above 1 and below 0 is cut off, because {kind} holds none; .exr keeps it")
    if picture.icc:
        notes.append("its colour profile is one of its light and left out; colours are sRGB")
    return replace(picture, light=None, icc=None), notes


def write_picture(
    path: Path,
    picture: Picture,
    *,
    overwrite: bool = False,
    quality: int = 95,
    before_rename: Callable[[Path], None] | None = None,
) -> None:
    """Write `picture` in the format of the suffix, with what the format holds of EXIF, ICC profile and DPI.

    Written to a temporary name in the same folder and renamed; an error or interrupt leaves
    neither a partial file nor a lost original. `before_rename` is called with the complete temporary
    file. Raises PictureError, NoRoomError where the disk is full.
    """
    path = Path(path)
    check_output(path, picture.size, picture.has_alpha, picture.bits, overwrite)
    picture = writable(picture, path, picture.size)
    try:
        with temporary_beside(path) as temporary:
            with temporary.open("rb+") as file:
                _encode(file, format_of(path), picture, quality, picture.size)
            if before_rename:
                before_rename(temporary)
    except ImportError as error:
        raise PictureError(f"{path} {needs(error)}") from error
    except OSError as error:
        raise refusal(path, error) from error


def encode_picture(path: Path, picture: Picture, quality: int = 95) -> bytes:
    """Return the file that `write_picture` would write to `path`, which `check_output` has been asked about."""
    file = io.BytesIO()
    _encode(file, format_of(path), writable(picture, path, picture.size), quality, picture.size)
    return file.getvalue()


def refusal(path: Path, error: OSError) -> PictureError:
    """Return what to say of a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return NoRoomError(
            f"{path} was not written: there is no room left on the disk of {path.parent}; free some space and run again"
        )
    return PictureError(f"{path} was not written: {error.strerror or error}")


def to_array(picture: Picture) -> np.ndarray:
    """Return a picture's pixels as a file has them: `H W` or `H W C` of uint8 or uint16, rounded to nearest."""
    pixels, top = picture.pixels[0], 2**picture.bits - 1
    channels = len(pixels) - 2 if picture.is_grey else len(pixels)
    array = np.empty((*pixels.shape[1:], channels), np.uint16 if picture.bits == 16 else np.uint8)
    for first in range(0, len(array), ROUNDED_ROWS):
        rows = pixels[:, first : first + ROUNDED_ROWS]
        if picture.is_grey:
            rows = torch.cat([rows[:3].mean(0, keepdim=True), rows[3:]])
        planes = rows.clamp(0, 1).double().mul_(top).round_().numpy().astype(array.dtype)
        array[first : first + ROUNDED_ROWS] = np.moveaxis(planes, 0, -1)
    return array[..., 0] if channels == 1 else array


def light_array(picture: Picture) -> np.ndarray:
    """Return a picture as scene-linear planes `C H W`: float32, or float16 of up to 16 bits in OpenEXR.

    As they were read, to the bit, if nothing has changed.
    """
    light = light_of(picture.pixels, picture.light)[0]
    if picture.is_grey:
        same = bool((light[:3] == light[:1]).all())
        light = torch.cat([light[:1] if same else light[:3].mean(0, keepdim=True), light[3:]])
    return (light if picture.bits == FLOAT_BITS else light.clamp(-HALF_MAX, HALF_MAX).half()).numpy()


def _encode(file: BinaryIO, kind: str, picture: Picture, quality: int, size: tuple[int, int]) -> None:
    if kind == "OpenEXR":
        return exr.write_exr(file, light_array(picture), picture.dpi and picture.dpi[0])
    if holds_light(kind, picture.bits):
        planes = light_array(picture)
        array = planes[0] if len(planes) == 1 else np.ascontiguousarray(np.moveaxis(planes, 0, -1))
        return _encode_tiff(file, array, picture)
    array = to_array(picture)
    if kind == "TIFF":
        return _encode_tiff(file, array, picture)
    found = exif_for(picture, kind, size)
    exif = None if found is None else found.tobytes()  # an Exif whose fields are all in directories below is false
    if kind == "PNG" and picture.bits == 16 and array.ndim == 3:
        file.write(png.encode16(array, exif, picture.icc, picture.dpi))
        return None
    extras = {"icc_profile": picture.icc, "dpi": picture.dpi, "exif": exif}
    extras = {name: value for name, value in extras.items() if value}
    if kind == "PNG":
        extras["compress_level"] = 4
    elif kind == "JPEG":
        extras |= {"quality": quality, "subsampling": "4:4:4"}
    elif kind == "WEBP":
        extras.pop("dpi", None)
        extras |= {"quality": quality, "method": 4, "exact": True}
    image = Image.fromarray(array)
    if kind == "WEBP" and image.mode in ("L", "LA"):
        image = image.convert("RGBA" if image.mode == "LA" else "RGB")
    image.save(file, kind, **extras)


def _encode_tiff(file: BinaryIO, array: np.ndarray, picture: Picture) -> None:
    import tifffile

    tifffile.imwrite(file, array, compression="zlib", predictor=True, **tiff_options(array, picture))


def tiff_options(array: np.ndarray, picture: Picture) -> dict[str, Any]:
    """Return tifffile's parameters for pixels of the kind of `array`, and for what travels along."""
    # tifffile has parameters of its own for two of the tags, and wants ASCII or bytes
    texts = {tag: text_bytes(text) for tag, text in fields_of(picture.exif)[None].items() if isinstance(text, str)}
    named = {name: texts.pop(tag, None) for tag, name in ((270, "description"), (305, "software"))}
    channels = array.shape[-1] if array.ndim == 3 else 1
    return dict(
        photometric="rgb" if channels >= 3 else "minisblack",
        extrasamples=["assocalpha" if array.dtype.kind == "f" else "unassalpha"] if channels in (2, 4) else None,
        planarconfig="contig" if array.ndim == 3 else None,
        iccprofile=picture.icc,
        resolution=picture.dpi,
        resolutionunit="INCH" if picture.dpi else None,
        extratags=[(tag, "s", 0, text, True) for tag, text in texts.items()],
        metadata=None,
        **{name: text for name, text in named.items() if text},
    )
