"""Rows of a picture without all the others: plain TIFF files are read strip by strip, others are decoded whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import MAX_MEGAPIXELS, Picture, PictureError
from .metadata import ORIENTATION, read_exif, usable_dpi, usable_icc
from .raster import scaled
from .reading import read_picture
from .scene_light import beyond
from .tiff import BLACK_IS_ZERO, MAGIC, PROFILE, RGB, checked_page


class RowReader:
    """A picture of which rows are asked for; `facts` is all that travels along, with a single pixel.

    `size` is `(height, width)`. Raises PictureError as `read_picture` does.
    """

    def __init__(self, path: Path, max_megapixels: float | None = None) -> None:
        self.path = Path(path)
        self._tiff = _PlainTiff.open(self.path, max_megapixels)
        if self._tiff:
            self.size, self.facts = self._tiff.size, self._tiff.facts
        else:
            self._whole = read_picture(self.path, max_megapixels)
            if self._whole.light is not None and beyond(self._whole.light) is not None:
                raise PictureError(
                    f"{self.path} holds light above 1 or below 0, which is not carried from block to block; enlarge it "
                    "whole, or save it as sRGB first"
                )
            self.size = self._whole.size
            self.facts = replace(self._whole, pixels=self._whole.pixels[:, :, :1, :1].clone(), light=None)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows `top` to `bottom`, `1 C H W`, float32, 0..1."""
        if not self._tiff:
            return self._whole.pixels[:, :, top:bottom]
        try:
            return self._tiff.rows(top, bottom)
        except Exception as error:  # decoders raise anything on damaged strips
            reason = str(error) or type(error).__name__
            raise PictureError(f"{self.path} is damaged ({reason:.200}); copy or download it again") from error


class _PlainTiff:
    """Grey, RGB or RGBA of 8 or 16 bit, upright, channels together: what large scans are."""

    def __init__(self, path: Path, page) -> None:  # noqa: ANN001
        self.path, self.page = path, page
        self.size = page.imagelength, page.imagewidth
        with path.open("rb") as file:
            exif, dpi, notes = read_exif(file)
        icc, about = usable_icc(page.tags.valueof(PROFILE))
        grey = page.samplesperpixel == 1
        pixel = torch.zeros(1, 4 if page.samplesperpixel == 4 else 3, 1, 1)
        self.facts = Picture(
            pixel, page.bitspersample, grey, exif, icc, usable_dpi(dpi)[0], tuple(dict.fromkeys([*notes, *about]))
        )

    @classmethod
    def open(cls, path: Path, max_megapixels: float | None) -> _PlainTiff | None:
        """Return the file where it is one of these, else None: `read_picture` says what is wrong, or reads it."""
        try:
            with path.open("rb") as file:
                if file.read(4) not in MAGIC:
                    return None
            limit = MAX_MEGAPIXELS if max_megapixels is None else max_megapixels
            page = checked_page(path, limit)
        except Exception:  # whatever it is, `read_picture` meets it again
            return None
        plain = (
            page.photometric in (BLACK_IS_ZERO, RGB)
            and page.samplesperpixel == {BLACK_IS_ZERO: 1, RGB: 3}[page.photometric] + len(page.extrasamples)
            and (page.extrasamples == () or (page.samplesperpixel == 4 and page.extrasamples[0] == 2))
            and page.bitspersample in (8, 16)
            and page.dtype.kind == "u"
            and page.planarconfig == 1
            and page.tags.valueof(ORIENTATION, 1) == 1
            and not any(tag in page.tags for tag in (280, 281, 340, 341))  # a white of its own
        )
        return cls(path, page) if plain else None

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows, decoding what holds them and nothing else."""
        page = self.page
        (height, width), deep = self.size, page.samplesperpixel
        tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        across = -(-width // wide)
        out = np.zeros((bottom - top, width, deep), page.dtype)
        with self.path.open("rb") as file:
            for row in range(top // tall, -(-min(bottom, height) // tall)):
                for column in range(across):
                    index = row * across + column
                    file.seek(page.dataoffsets[index])
                    data = file.read(page.databytecounts[index])
                    segment = page.decode(data, index)[0][0]
                    y, x = row * tall, column * wide
                    first, last = max(top, y), min(bottom, y + len(segment), height)
                    out[first - top : last - top, x : x + wide] = segment[first - y : last - y, : width - x]
        planes = scaled(np.moveaxis(out, -1, 0), 0, 2**page.bitspersample - 1)
        return torch.from_numpy(np.repeat(planes, 3, 0) if deep == 1 else planes)[None]
