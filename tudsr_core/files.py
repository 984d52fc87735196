"""Picture files: reading and writing 8 and 16 bit, and everything that travels with the pixels.

Owns formats, bit depth, colour modes, EXIF, ICC, DPI and atomic writing. Knows no network and
no ComfyUI; the only place that touches picture files.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

log = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
MAX_SIDE = {"JPEG": 65535, "WEBP": 16383}
ORIENTATION, PIXEL_WIDTH, PIXEL_HEIGHT = 0x0112, 0xA002, 0xA003


class PictureError(ValueError):
    """A file that cannot be read or written; the message names it and says what to do."""


class _Unsuitable(Exception):
    """A readable file whose pixels cannot be used; `read_picture` adds its name."""


@dataclass(frozen=True)
class Picture:
    """Pixels `1 C H W` float32 0..1 (C = 3 or 4) and what the file said about them.

    `bits` is 8 or 16 per channel; `is_grey` pictures have three equal channels here and one in
    the file. EXIF is stored with orientation 1, since the pixels are already upright.
    """

    pixels: Tensor
    bits: int = 8
    is_grey: bool = False
    exif: Image.Exif | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)`."""
        return tuple(self.pixels.shape[-2:])

    @property
    def has_alpha(self) -> bool:
        """Whether there is a fourth channel."""
        return self.pixels.shape[1] == 4


def read_picture(path: Path) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF file, turned upright by its EXIF orientation.

    Grey, palette, CMYK (through its ICC profile, if any), alpha, 16-bit and float TIFF are
    understood. Raises PictureError naming the file and the remedy.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path} is empty (0 bytes); copy or download it again")
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _read_tiff(path)
        with Image.open(path) as image:
            deep = head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16
            return _from_pillow(image, _decode_png16(path) if deep else None)
    except _Unsuitable as error:
        raise PictureError(f"{path}: {error}") from error
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture this program reads ({', '.join(sorted(set(FORMATS)))})") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path} is far too large to enlarge; crop or shrink it first") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, LookupError, struct.error, EOFError) as error:
        raise PictureError(f"{path} is damaged or incomplete ({error}); copy or download it again") from error


def _from_pillow(image: Image.Image, deep: np.ndarray | None = None) -> Picture:
    image.load()
    info, exif = image.info, image.getexif()
    icc = info.get("icc_profile")
    grey = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
    if deep is not None:
        grey = deep.ndim == 2 or deep.shape[-1] <= 2
    if getattr(image, "n_frames", 1) > 1:
        log.warning("this file holds %d pictures; only the first is used", image.n_frames)
    if deep is None:
        if image.mode == "CMYK":
            image, icc = _cmyk_to_rgb(image, icc), None
        has_alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in info
        if image.mode.startswith("I;16"):
            deep = np.asarray(image).astype(np.uint16)
        else:
            array = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    array = deep if deep is not None else array
    return _picture(array, grey, exif, icc, info.get("dpi"))


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if not icc:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        log.warning("the CMYK profile of this picture is unusable; colours are converted without it")
        return image.convert("RGB")


def _decode_png16(path: Path) -> np.ndarray:
    import imagecodecs

    return imagecodecs.png_decode(path.read_bytes())


def _read_tiff(path: Path) -> Picture:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        kinds = tifffile.PHOTOMETRIC
        if page.dtype != np.uint8 and page.photometric not in (kinds.PALETTE, kinds.SEPARATED):
            array = page.asarray()
            grey = array.ndim == 2 or array.shape[-1] <= 2
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                array = (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1) - array
            icc = page.tags[34675].value if 34675 in page.tags else None
            exif = Image.Exif()
            for tag in page.tags.values():
                if isinstance(tag.value, str) or tag.code == ORIENTATION:
                    exif[tag.code] = tag.value
            return _picture(array, grey, exif, icc, _tiff_dpi(page))
    with Image.open(path) as image:
        return _from_pillow(image)


def _tiff_dpi(page) -> tuple[float, float] | None:
    try:
        return page.get_resolution(unit="INCH") if 282 in page.tags else None
    except (ValueError, ZeroDivisionError):
        return None


def _picture(array: np.ndarray, grey: bool, exif: Image.Exif, icc: bytes | None, dpi) -> Picture:
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise _Unsuitable("it contains NaN or infinite values; repair it or export it again")
        bits, values = 16, array.astype(np.float32)
    elif array.dtype in (np.uint8, np.uint16):
        bits = array.dtype.itemsize * 8
        values = array.astype(np.float32) / np.iinfo(array.dtype).max
    else:
        raise _Unsuitable(f"its pixels are {array.dtype}; save it with 8 or 16 bit per channel")
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[-1] > 4:
        raise _Unsuitable(f"its pixels have shape {array.shape}; save it as one grey, RGB or RGBA picture")
    values = _upright(values, exif.get(ORIENTATION, 1))
    if values.shape[-1] <= 2:
        values = np.concatenate([values[..., :1]] * 3 + [values[..., 1:]], -1)
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    dpi = tuple(float(value) for value in dpi) if dpi else None
    return Picture(pixels.clamp(0, 1), bits, grey, exif if len(exif) else None, icc, dpi)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation 1..8 of an `H W C` array."""
    if orientation in (2, 4, 5, 7):
        values = values[:, ::-1]
    turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.rot90(values, turns)


def check_output(path: Path, size: tuple[int, int], has_alpha: bool, bits: int, overwrite: bool) -> None:
    """Raise PictureError if a picture of this kind could not be written to `path` afterwards."""
    path = Path(path)
    kind = _format(path)
    if path.exists() and not overwrite:
        raise PictureError(f"{path} already exists; use --force to replace it, or another name")
    if not path.parent.is_dir():
        raise PictureError(f"folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK):
        raise PictureError(f"folder {path.parent} is not writable; choose another")
    if max(size) > MAX_SIDE.get(kind, 2**31):
        raise PictureError(f"{path}: {kind} holds at most {MAX_SIDE[kind]} pixels a side; use .png or .tif")
    if kind == "JPEG" and has_alpha:
        raise PictureError(f"{path}: JPEG cannot hold transparency; use .png, .webp or .tif")
    if bits == 16 and kind not in ("PNG", "TIFF"):
        raise PictureError(f"{path}: {kind} cannot hold 16 bit; use .png or .tif, or --bits 8")


def _format(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise PictureError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(FORMATS)}") from None


def write_picture(path: Path, picture: Picture, *, overwrite: bool = False, quality: int = 95) -> None:
    """Write `picture` in the format of the suffix, with its EXIF, ICC profile and DPI.

    Written to a temporary name in the same folder and renamed; an error or interrupt leaves
    neither a partial file nor a lost original. Raises PictureError.
    """
    path = Path(path)
    check_output(path, picture.size, picture.has_alpha, picture.bits, overwrite)
    array = _to_array(picture)
    try:
        with temporary_beside(path) as temporary:
            _encode(temporary, _format(path), array, picture, quality)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            reason = f"there is no room left on the disk of {path.parent}; free some space and run again"
        else:
            reason = str(error.strerror or error)
        raise PictureError(f"{path} was not written: {reason}") from error


def _to_array(picture: Picture) -> np.ndarray:
    """Return `H W` or `H W C` of uint8 or uint16, rounded to nearest."""
    pixels = picture.pixels[0]
    if picture.is_grey:
        color = pixels[:3].mean(0, keepdim=True)
        pixels = torch.cat([color, pixels[3:]])
    top = 2**picture.bits - 1
    scaled = (pixels.clamp(0, 1).double() * top).round().permute(1, 2, 0).numpy()
    array = np.ascontiguousarray(scaled, np.uint16 if picture.bits == 16 else np.uint8)
    return array[..., 0] if array.shape[-1] == 1 else array


def _exif_for(picture: Picture) -> Image.Exif | None:
    if picture.exif is None:
        return None
    exif = Image.Exif()
    exif.load(picture.exif.tobytes())
    details = exif.get_ifd(0x8769)
    height, width = picture.size
    for tag, value in ((PIXEL_WIDTH, width), (PIXEL_HEIGHT, height)):
        if tag in details:
            details[tag] = value
    return exif


def _encode(temporary: Path, kind: str, array: np.ndarray, picture: Picture, quality: int) -> None:
    if kind == "TIFF":
        return _encode_tiff(temporary, array, picture)
    extras = {"icc_profile": picture.icc, "dpi": picture.dpi, "exif": _exif_for(picture)}
    extras = {name: value for name, value in extras.items() if value}
    if kind == "PNG" and picture.bits == 16 and array.ndim == 3:
        return _encode_png16(temporary, array, extras)
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
    image.save(temporary, kind, **extras)


def _encode_png16(temporary: Path, array: np.ndarray, extras: dict) -> None:
    """Write 16-bit colour, which Pillow cannot; its metadata chunks go in after IHDR."""
    import imagecodecs

    data = imagecodecs.png_encode(array, level=4)
    chunks = b""
    if icc := extras.get("icc_profile"):
        chunks += _png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if dpi := extras.get("dpi"):
        chunks += _png_chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1))
    if exif := extras.get("exif"):
        chunks += _png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    after_header = 8 + 25
    temporary.write_bytes(data[:after_header] + chunks + data[after_header:])


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _encode_tiff(temporary: Path, array: np.ndarray, picture: Picture) -> None:
    import tifffile

    strings = [
        (tag, "s", 0, value, True)
        for tag, value in (picture.exif or {}).items()
        if isinstance(value, str) and tag not in (305, 270, 306)
    ]
    known = {270: "description", 305: "software", 306: "datetime"}
    named = {name: picture.exif[tag] for tag, name in known.items() if picture.exif and tag in picture.exif}
    channels = array.shape[-1] if array.ndim == 3 else 1
    tifffile.imwrite(
        temporary,
        array,
        photometric="rgb" if channels >= 3 else "minisblack",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        planarconfig="contig" if array.ndim == 3 else None,
        compression="zlib",
        predictor=True,
        iccprofile=picture.icc,
        resolution=picture.dpi,
        resolutionunit="INCH" if picture.dpi else None,
        extratags=strings,
        metadata=None,
        **named,
    )


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it onto `path` if the block succeeds.

    On any exception, interrupts included, the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers create private files; keep what the user's umask says
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
