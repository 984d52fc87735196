"""Reading picture files: PNG, JPEG, WebP, TIFF and OpenEXR, also GIF and BMP, and what travels along.

Files are not trusted: their headers are checked before anything is decoded, and whatever a decoder
raises becomes one line that names the file.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..missing_packages import needs
from . import exr, png
from .files import FORMATS, Picture, PictureError, Unsuitable, check_file_bytes, check_size
from .metadata import ORIENTATION, not_carried, read_exif, usable_dpi, usable_icc
from .raster import Raster, cmyk_to_rgb, scaled
from .scene_light import displayed
from .tiff import MAGIC as TIFF_MAGIC
from .tiff import read_tiff

# A progressive JPEG's scans each go over the whole picture, about a second for 700 million pixels; cameras and programs
# make about 10, which any size may have.
FREE_SCANS, MAX_SCANS, MAX_SCANNED_PIXELS = 20, 200, 4e9
IPTC_BLOCK = 0x0404  # of what Photoshop puts into a JPEG
GREY_MODES = ("1", "L", "LA", "La")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
MODES = (*GREY_MODES, *ALPHA_MODES, "P", "RGB", "RGBX", "CMYK", "YCbCr")


def read_picture(path: Path, max_megapixels: float | None = None, floats_are_light: bool = False) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or OpenEXR file (or GIF, BMP), turned upright by its EXIF orientation.

    Grey, palette, CMYK (through its ICC profile, if any), alpha, and TIFF of other depths are
    understood; what was assumed is in the picture's `notes`. OpenEXR holds scene-linear light, which is in the
    picture's `light` as it was stored, and in its pixels as sRGB; so do float TIFFs with `floats_are_light`, which are
    taken for sRGB's own numbers otherwise. `max_megapixels` replaces the limits of
    `check_size`. Raises PictureError naming the file and the remedy.
    """
    path = Path(path)
    try:
        file_bytes = path.stat().st_size
        head = b""
        if file_bytes:  # a named pipe has none, and would be waited for
            with path.open("rb") as file:
                head = file.read(32)
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise PictureError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not head:
        raise PictureError(f"{path} is empty (0 bytes); copy or download it again")
    try:
        with _quiet_pillow():
            return _read(path, head, file_bytes, max_megapixels, floats_are_light)
    except Unsuitable as error:
        raise PictureError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is damaged or incomplete (no such header); copy or download it again") from error
    except MemoryError as error:
        raise PictureError(f"{path} does not fit into memory; shrink or crop it first") from error
    except ImportError as error:
        raise PictureError(f"{path} {needs(error)}") from error
    except Exception as error:  # decoders raise anything on damaged files: TypeError, ZeroDivisionError, ...
        reason = str(error) or type(error).__name__
        raise PictureError(f"{path} is damaged or incomplete ({reason:.200}); copy or download it again") from error


def read_size(path: Path) -> tuple[int, int]:
    """Return `(height, width)` as a file's header has it, which nobody has checked; (0, 0) where there is none."""
    try:
        with _quiet_pillow(), Image.open(path) as image:
            return image.size[::-1]
    except Exception:  # `read_picture` says what is wrong
        return 0, 0


def _read(path: Path, head: bytes, file_bytes: int, max_megapixels: float | None, floats_are_light: bool) -> Picture:
    if head[:4] in TIFF_MAGIC:  # read in pieces: of a long file of many pictures, only the first
        return _read_tiff(path, max_megapixels, floats_are_light)
    if head[:4] == exr.MAGIC:
        planes, dpi, notes = exr.read_exr(path, max_megapixels)
        return _picture(Raster(planes, 16, notes, is_light=True), None, dpi and (dpi, dpi), [])
    check_file_bytes(file_bytes, max_megapixels)
    if head[:8] == png.MAGIC:
        return _read_png(path.read_bytes(), max_megapixels)
    kinds = {b"\xff\xd8\xff": "JPEG", b"GIF": "GIF", b"BM": "BMP"}
    kind = next((name for magic, name in kinds.items() if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "WEBP"
        check_size(_webp_size(head), 4, file_bytes, max_megapixels)
    if kind is None:
        names = ", ".join(sorted(set(FORMATS.values())))
        raise Unsuitable(f"this is not a picture that tudsr reads ({names}, GIF, BMP)")
    with Image.open(path, formats=[kind]) as image:
        if kind == "JPEG":
            _check_scans(path.read_bytes().count(b"\xff\xda"), image.size)
        raster = _decode(image, file_bytes, max_megapixels, image.info.get("icc_profile"))
        exif, exif_dpi, notes = read_exif(image.info.get("exif") or b"")
        notes += not_carried(_beside(image.info))
        return _picture(raster, exif, image.info.get("dpi") or exif_dpi, notes)


def _beside(info: dict) -> set[str]:
    """Return the kinds of texts that Pillow found in a JPEG, WebP or GIF file."""
    found = {name for key, name in (("xmp", "XMP"), ("comment", "comment")) if info.get(key)}
    blocks = info.get("photoshop")
    return found | ({"IPTC"} if isinstance(blocks, dict) and blocks.get(IPTC_BLOCK) else set())


def _check_scans(scans: int, size: tuple[int, int]) -> None:
    width, height = size
    limit = min(MAX_SCANS, max(FREE_SCANS, int(MAX_SCANNED_PIXELS / max(1, width * height))))
    if scans > limit:
        raise Unsuitable(
            f"it has {scans} scans, of which {width} x {height} pixels may have {limit}; save it again as a plain JPEG"
        )


def _read_tiff(path: Path, max_megapixels: float | None, floats_are_light: bool) -> Picture:
    raster = read_tiff(path, max_megapixels, floats_are_light)
    if raster is None:
        with Image.open(path, formats=["TIFF"]) as image:
            raster = _decode(image, path.stat().st_size, max_megapixels, image.info.get("icc_profile"))
    with path.open("rb") as file:
        exif, dpi, notes = read_exif(file)
    return _picture(raster, exif, dpi, notes)


def _read_png(data: bytes, max_megapixels: float | None) -> Picture:
    parts = png.split(data)
    with Image.open(io.BytesIO(parts.pixels), formats=["PNG"]) as image:
        if data[24] == 16:
            check_size(image.size[::-1], 8, len(data), max_megapixels)
            array = png.decode16(parts.pixels)
            planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
            raster = Raster(scaled(planes, 0, 65535), 16, icc=parts.icc)
        else:
            raster = _decode(image, len(data), max_megapixels, parts.icc)
    exif, dpi, notes = read_exif(parts.exif or b"")
    return _picture(raster, exif, parts.dpi or dpi, parts.notes + notes + not_carried(parts.beside))


def _decode(image: Image.Image, file_bytes: int, max_megapixels: float | None, icc: bytes | None) -> Raster:
    """Decode what Pillow opened, of 8 bits, after a look at its header."""
    if image.mode not in MODES:
        raise Unsuitable(f"its pixels are of the kind {image.mode}; save it with 8 or 16 bit as PNG or TIFF")
    if any(codec == "bmp_rle" for codec, *_ in image.tile):
        raise Unsuitable("it is a run-length coded BMP; save it as PNG")
    check_size(image.size[::-1], 4, file_bytes, max_megapixels)
    notes = []
    if image.format != "TIFF" and getattr(image, "is_animated", False):
        notes.append("this file holds several pictures; only the first is used")
    image.load()
    has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
    grey = image.mode in GREY_MODES
    if image.mode == "CMYK":
        image, icc = cmyk_to_rgb(image, icc, notes), None
    wanted = "RGBA" if has_alpha else "RGB"
    image = image if image.mode in (wanted, "L") else image.convert(wanted)
    bands = {"L": (0,)}.get(image.mode, ((0, 3) if has_alpha else (0,)) if grey else range(len(image.getbands())))
    planes = np.stack([np.asarray(image.getchannel(band)) for band in bands])
    return Raster(scaled(planes, 0, 255), 8, notes, icc)


def _picture(raster: Raster, exif: Image.Exif | None, dpi: object, notes: list[str]) -> Picture:
    icc, about_icc = usable_icc(raster.icc)
    dpi, about_dpi = usable_dpi(dpi)
    planes = _upright(raster.planes, exif.get(ORIENTATION, 1) if exif else 1)
    grey = len(planes) <= 2
    if grey:
        planes = planes[[0, 0, 0, *range(1, len(planes))]]
    if exif and ORIENTATION in exif:
        exif[ORIENTATION] = 1
    pixels = torch.from_numpy(np.ascontiguousarray(planes))[None]
    about = tuple(dict.fromkeys([*raster.notes, *notes, *about_icc, *about_dpi]))
    light = pixels if raster.is_light else None
    pixels = pixels if light is None else displayed(light)
    return Picture(pixels, raster.bits, grey, exif, icc, dpi, about, light)


def _upright(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation 1..8 of `C H W` planes."""
    if orientation in (2, 4, 5, 7):
        planes = planes[:, :, ::-1]
    turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.rot90(planes, turns, axes=(1, 2))


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return `(height, width)` from the first chunk: decoders reserve them before Pillow can tell."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[27:30], "little"), 1 + int.from_bytes(head[24:27], "little")
    if kind == b"VP8L":
        packed = int.from_bytes(head[21:25], "little")
        return 1 + (packed >> 14 & 0x3FFF), 1 + (packed & 0x3FFF)
    width, height = struct.unpack_from("<HH", head, 26)
    return height & 0x3FFF, width & 0x3FFF


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Let `check_size` be the only limit, and keep Pillow's warnings off the terminal."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
