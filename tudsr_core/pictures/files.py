"""What reading and writing picture files share: the picture itself, its errors and limits, safe renaming.

Knows no format's inside (`reading`, `tiff`, `writing`), no network and no ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..untrusted import printable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS[".exr"] = "OpenEXR"
FLOAT_BITS = 32
MAX_MEGAPIXELS = 179
# Pixels may always take this many bytes; beyond that a file must hold at least a byte for so many of them.
# Photographs need one for 3 to 100; a file that needs less is flat, or made to fill the memory.
FREE_BYTES, BYTES_PER_FILE_BYTE = 256e6, 300


class PictureError(ValueError):
    """A file that cannot be read or written; the message names it and says what to do, in one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NoRoomError(PictureError):
    """A file that was not written because the disk is full: others will not be either."""


class Unsuitable(Exception):
    """A readable file whose pixels cannot be used; `read_picture` adds its name."""


@dataclass(frozen=True)
class Picture:
    """Pixels `1 C H W` float32 0..1 (C = 3 or 4) and what the file said about them.

    `bits` is 8 or 16 per channel, or 32 for floats (OpenEXR: 16 is half precision), where the format of a file leaves a
    choice; `is_grey` pictures have three equal channels here and one in the file. `light` is the scene-linear picture
    `1 C h w` (float16 or float32, see `scene_light.py`) that these pixels were made of, in the size it was read in.
    EXIF is stored with orientation 1, since the pixels are already upright. `notes` are
    sentences about what was assumed or left out on the way.
    """

    pixels: Tensor
    bits: int = 8
    is_grey: bool = False
    exif: Image.Exif | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    light: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)`."""
        return tuple(self.pixels.shape[-2:])

    @property
    def has_alpha(self) -> bool:
        """Whether there is a fourth channel."""
        return self.pixels.shape[1] == 4


def check_size(
    size: tuple[int, int],
    pixel_bytes: float,
    file_bytes: int,
    max_megapixels: float | None = None,
    what: str = "pixels",
) -> None:
    """Raise Unsuitable if a header of `size = (height, width)` asks for more than one picture is given.

    `pixel_bytes` is what one decoded pixel takes. `max_megapixels` replaces both limits: the one of
    the picture's area, and the one on how much a small file may unfold to. An empty size is damage: ValueError.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"its size is {width} x {height}")
    megapixels = height * width / 1e6
    limit = MAX_MEGAPIXELS if max_megapixels is None else max_megapixels
    named = f"its {width} x {height} {what} are {megapixels:,.1f} megapixels"
    if megapixels > limit:
        raise Unsuitable(f"{named}; tudsr reads up to {limit:g}: crop or shrink it, or raise --max-megapixels")
    claimed = height * width * max(4, pixel_bytes)  # grey becomes three channels of float too
    free = FREE_BYTES if max_megapixels is None else max(FREE_BYTES, limit * 16e6)
    if claimed > max(free, file_bytes * BYTES_PER_FILE_BYTE):
        raise Unsuitable(
            f"{named}, {claimed / 1e6:,.0f} MB from a file of {file_bytes / 1e6:.3f} MB; "
            f"if that is right, say --max-megapixels {int(megapixels) + 1}"
        )


def check_file_bytes(file_bytes: int, max_megapixels: float | None = None) -> None:
    """Raise Unsuitable if a file, which is read as a whole, is longer than the largest picture is unpacked."""
    limit = (MAX_MEGAPIXELS if max_megapixels is None else max(MAX_MEGAPIXELS, max_megapixels)) * 8e6  # 16-bit RGBA
    if file_bytes > limit:
        raise Unsuitable(
            f"this file of {file_bytes / 1e6:,.0f} MB is longer than any picture that tudsr reads ({limit / 1e6:,.0f} "
            "MB); save it again, or raise --max-megapixels"
        )


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of `folder` in name order, without hidden ones.

    Names that begin with a dot are left out: the unfinished files of a killed run, and what macOS
    leaves beside pictures (`._photo.jpg`). Links that lead nowhere are in: they are not to be missed in silence.
    """
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in FORMATS and not file.name.startswith(".") and (file.is_file() or not file.exists())
    )
