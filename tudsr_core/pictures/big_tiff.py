"""Pictures larger than memory: tiled BigTIFF, written while the rows come, with smaller versions on request."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..atomic_write import temporary_beside
from .files import Picture, PictureError
from .metadata import fitted
from .writing import check_output, refusal, tiff_options, to_array

TILE_PX = 512
SMALLEST_LEVEL_PX = 1024


def write_big_tiff(
    path: Path,
    facts: Picture,
    size: tuple[int, int],
    rows: Iterator[Tensor],
    *,
    overwrite: bool = False,
    pyramid: bool = False,
) -> None:
    """Write a picture of `size = (height, width)` whose rows `1 C h W` (float, 0..1) come in order, any number at once.

    Bits and what travels along are those of `facts`. Memory is that of TILE_PX rows and of what `rows` gives;
    with `pyramid`, half-size versions down to SMALLEST_LEVEL_PX follow, by way of a file on the same disk.
    Whole or absent, as `write_picture`. Raises PictureError.
    """
    import tifffile

    check_output(path, size, facts.has_alpha, facts.bits, overwrite)
    facts, _ = fitted(facts, "TIFF", 1 if facts.is_grey else 3 + facts.has_alpha)
    sample = to_array(facts)
    channels = sample.shape[2:]
    common = dict(tile=(TILE_PX, TILE_PX), dtype=sample.dtype, compression="zlib", predictor=True)
    try:
        with temporary_beside(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as half:
            smaller = _Halves(half, size, channels, sample.dtype) if pyramid else None
            bands = _bands(rows, facts, size, channels, smaller)
            with tifffile.TiffWriter(temporary, bigtiff=True) as tiff:
                options = tiff_options(sample, facts)
                levels = smaller.levels if smaller else 0
                tiff.write(_tiles(bands), shape=(*size, *channels), subifds=levels, **common, **options)
                kind = {name: options[name] for name in ("photometric", "extrasamples", "planarconfig", "metadata")}
                for _ in range(levels):
                    tiff.write(_tiles(smaller.bands()), shape=smaller.shape, subfiletype=1, **common, **kind)
                    smaller.next_level()
    except OSError as error:
        raise refusal(path, error) from error


def _bands(
    rows: Iterator[Tensor], facts: Picture, size: tuple[int, int], channels: tuple[int, ...], smaller: _Halves | None
) -> Iterator[np.ndarray]:
    """Yield the rows as numbers of the file, TILE_PX at once; the last ones may be fewer."""
    height, width = size
    band, filled, done = np.empty((TILE_PX, width, *channels), to_array(facts).dtype), 0, 0
    for part in rows:
        at = 0
        while at < part.shape[2]:
            count = min(TILE_PX - filled, part.shape[2] - at)
            band[filled : filled + count] = to_array(replace(facts, pixels=part[:, :, at : at + count]))
            filled, at, done = filled + count, at + count, done + count
            if filled == TILE_PX or done == height:
                if smaller:
                    smaller.add(band[:filled])
                yield band[:filled]
                filled = 0
    if done != height:
        raise PictureError(f"{done} rows came of a picture of {height}")


def _tiles(bands: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for band in bands:
        for left in range(0, band.shape[1], TILE_PX):
            yield np.ascontiguousarray(band[:, left : left + TILE_PX])


class _Halves:
    """The half-size version of what was written last, in a file of plain numbers.

    Every pixel is the mean of two by two; of an odd side, the last row or column is left out.
    """

    def __init__(self, file, size: tuple[int, int], channels: tuple[int, ...], dtype: np.dtype) -> None:  # noqa: ANN001
        self.levels = 0
        while max(size) >> self.levels > SMALLEST_LEVEL_PX and min(size) >> (self.levels + 1):
            self.levels += 1
        self.shape = (max(1, size[0] // 2), max(1, size[1] // 2), *channels)
        self._map = np.memmap(file, dtype, "w+", shape=self.shape)
        self._filled = 0

    def add(self, band: np.ndarray) -> None:
        """Take over the next rows of the version that is twice as large."""
        small = _halved(band, self._map.dtype)[:, : self.shape[1]]
        count = min(len(small), self.shape[0] - self._filled)
        self._map[self._filled : self._filled + count] = small[:count]
        self._filled += count

    def bands(self) -> Iterator[np.ndarray]:
        """Yield the rows of this version, TILE_PX at once."""
        for top in range(0, self.shape[0], TILE_PX):
            yield self._map[top : min(top + TILE_PX, self.shape[0]), : self.shape[1]]

    def next_level(self) -> None:
        """Go on to half of this version, in its place: what is read lies behind what is written."""
        height, width = self.shape[0] // 2, self.shape[1] // 2
        for top in range(0, height, TILE_PX // 2):
            band = self._map[2 * top : 2 * min(top + TILE_PX // 2, height), : 2 * width]
            self._map[top : top + len(band) // 2, :width] = _halved(band, self._map.dtype)
        self.shape = (height, width, *self.shape[2:])


def _halved(band: np.ndarray, dtype: np.dtype) -> np.ndarray:
    even = band[: len(band) // 2 * 2, : band.shape[1] // 2 * 2].astype(np.uint32)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) // 4).astype(dtype)
