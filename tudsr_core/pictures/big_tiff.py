"""Pictures larger than memory: tiled BigTIFF, written while the rows come, with smaller versions on request."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from torch import Tensor

from .files import Picture, PictureError
from .metadata import fitted
from .writing import tiff_options, to_array

TILE_PX = 512
SMALLEST_LEVEL_PX = 1024


class Bands(Protocol):
    """Bands of encoded tiles, TILE_PX rows each, from the top."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[bytes]]: ...


def write_big_tiff(
    file: BinaryIO,
    facts: Picture,
    size: tuple[int, int],
    rows: Callable[[int], Iterator[Tensor]],
    *,
    folder: Path,
    pyramid: bool = False,
    there: Bands = (),
    on_band: Callable[[list[bytes]], None] = lambda tiles: None,
) -> None:
    """Write a picture of `size = (height, width)`; `rows(first)` gives its rows `1 C h W` (float, 0..1) from one on.

    Bits and what travels along are those of `facts`. Memory is that of TILE_PX rows and of what `rows` gives; with
    `pyramid`, half-size versions down to SMALLEST_LEVEL_PX follow, by way of a file in `folder`. `there` are bands
    of tiles that an earlier call wrote for the same picture, which are not asked for again; `on_band` is called with
    every later one when it is in the file. The same picture gives the same bytes at the same places, whatever was
    there. Raises OSError, and PictureError where rows are missing.
    """
    import tifffile

    facts, _ = fitted(facts, "TIFF", 1 if facts.is_grey else 3 + facts.has_alpha)
    sample = to_array(facts)
    channels = sample.shape[2:]
    common = dict(tile=(TILE_PX, TILE_PX), dtype=sample.dtype, compression="zlib", predictor=True)
    with tempfile.TemporaryFile(dir=folder) as half, ThreadPoolExecutor() as pool:
        smaller = _Halves(half, size, channels, sample.dtype) if pyramid else None
        first = min(len(there) * TILE_PX, size[0])
        bands = _bands(rows(first), facts, (size[0] - first, size[1]), channels)
        with tifffile.TiffWriter(file, bigtiff=True) as tiff:
            options = tiff_options(sample, facts)
            levels = smaller.levels if smaller else 0
            tiles = _encoded(bands, there, on_band, smaller, _Codec(sample, size[1]), pool)
            tiff.write(tiles, shape=(*size, *channels), subifds=levels, **common, **options)
            kind = {name: options[name] for name in ("photometric", "extrasamples", "planarconfig", "metadata")}
            for _ in range(levels):
                tiff.write(_tiles(smaller.bands()), shape=smaller.shape, subfiletype=1, **common, **kind)
                smaller.next_level()


def _encoded(
    bands: Iterator[np.ndarray],
    there: Bands,
    on_band: Callable[[list[bytes]], None],
    smaller: _Halves | None,
    codec: _Codec,
    pool: Executor,
) -> Iterator[bytes]:
    """Yield the tiles as the file has them; whoever writes them asks for one when the one before is written."""
    for tiles in there:
        if smaller:
            smaller.add(codec.band(tiles))
        yield from tiles
    for band in bands:
        if smaller:
            smaller.add(band)
        tiles = list(pool.map(codec.encode, _tiles([band])))
        yield from tiles
        on_band(tiles)


class _Codec:
    """Tiles as numbers and as bytes in the file: differences of neighbours, compressed, as tifffile has them."""

    def __init__(self, sample: np.ndarray, width: int) -> None:
        self.shape, self.dtype, self.width = (TILE_PX, TILE_PX, *sample.shape[2:]), sample.dtype, width

    def encode(self, tile: np.ndarray) -> bytes:
        """Return the bytes of a tile, which may be smaller at the picture's borders."""
        import imagecodecs

        whole = np.zeros(self.shape, self.dtype)
        whole[: tile.shape[0], : tile.shape[1]] = tile
        return imagecodecs.deflate_encode(imagecodecs.delta_encode(whole, axis=1))

    def band(self, tiles: list[bytes]) -> np.ndarray:
        """Return the rows that a band of tiles is of."""
        import imagecodecs

        arrays = [np.frombuffer(imagecodecs.deflate_decode(tile), self.dtype).reshape(self.shape) for tile in tiles]
        return np.concatenate([imagecodecs.delta_decode(array, axis=1) for array in arrays], 1)[:, : self.width]


def _bands(
    rows: Iterator[Tensor], facts: Picture, size: tuple[int, int], channels: tuple[int, ...]
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
                yield band[:filled]
                filled = 0
    if done != height:
        raise PictureError(f"{done} rows came of a picture of {height}")


def _tiles(bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
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
