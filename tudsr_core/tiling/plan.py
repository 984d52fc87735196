"""Where tiles lie: geometry without tensors. Units are whatever the caller uses (latents, pixels)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Spacing = Literal["even", "stride"]

MAX_TILES = 2**18  # all are listed and drawn; 2**30 pixels are 16,129 tiles of 512 px that overlap by half


@dataclass(frozen=True)
class Tile:
    """One tile: its number in reading order and its box."""

    index: int
    top: int
    left: int
    height: int
    width: int

    def cut(self, plane: Tensor, scale: int = 1) -> Tensor:
        """Return this tile's part of `... H W`; `scale` > 1 addresses the same region in pixels."""
        return plane[
            ...,
            self.top * scale : (self.top + self.height) * scale,
            self.left * scale : (self.left + self.width) * scale,
        ]


@dataclass(frozen=True)
class TilePlan:
    """Overlapping tiles of one shape that cover `height x width` exactly."""

    height: int
    width: int
    tile_height: int
    tile_width: int
    overlap: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[Tile]:
        return (self.tile(index) for index in range(len(self)))

    def tile(self, index: int) -> Tile:
        """Return the tile of that number in reading order."""
        row, column = divmod(index, len(self.lefts))
        return Tile(index, self.tops[row], self.lefts[column], self.tile_height, self.tile_width)

    def region(self, tile: Tile, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return `top, bottom, left, right` of `tile` in a picture of `size` (height, width) that shows the same.

        The borders are scaled and rounded outward, so the region holds all of the tile and less
        than one pixel more on each side.
        """
        (height, width), end_y, end_x = size, tile.top + tile.height, tile.left + tile.width
        return (
            tile.top * height // self.height,
            -(-end_y * height // self.height),
            tile.left * width // self.width,
            -(-end_x * width // self.width),
        )

    def borders(self, size: tuple[int, int], unit: int) -> tuple[list[int], list[int]]:
        """Return the rows and columns, inside a picture of `size`, where tiles begin or end.

        `unit`: pixels of the picture to one of the plan's units.
        """
        ends = (min(length - 1, (own - 1) * unit) for length, own in zip(size, (self.height, self.width), strict=True))
        axes = zip((self.tops, self.lefts), (self.tile_height, self.tile_width), ends, strict=True)
        return tuple(
            sorted({edge * unit for start in starts for edge in (start, start + side) if 0 < edge * unit <= last})
            for starts, side, last in axes
        )

    def nearest(self, tile: Tile, plan: TilePlan) -> int:
        """Return the index of this plan's tile that shares most with `tile` of another `plan` of the same picture."""
        row = _most_shared(self.tops, self.tile_height, self.height, tile.top, tile.height, plan.height)
        column = _most_shared(self.lefts, self.tile_width, self.width, tile.left, tile.width, plan.width)
        return row * len(self.lefts) + column

    def batches(self, size: int) -> Iterator[list[Tile]]:
        """Yield the tiles in reading order, at most `size` at a time."""
        tiles = list(self)
        for start in range(0, len(tiles), size):
            yield tiles[start : start + size]


def plan_tiles(
    height: int,
    width: int,
    tile: int | tuple[int, int],
    overlap: int,
    *,
    multiple: int = 1,
    spacing: Spacing = "even",
) -> TilePlan:
    """Cover `height x width` with tiles of side `tile` (or height and width) that overlap by at least `overlap`.

    A picture smaller than the tile gets one tile of its own size; both sides of a tile are then
    as large as the picture allows. Offsets are multiples of `multiple`. `spacing="even"` spreads
    the tiles evenly (no thin last column); "stride" puts them at `i (tile - overlap)` with the
    last one flush, as OMGSR, OSEDiff and PiSA-SR do.

    Raises ValueError for sides below 1, an overlap that leaves no stride, or more than MAX_TILES tiles.
    """
    if min(height, width) < 1:
        raise ValueError(f"cannot tile {width} x {height}; both sides must be at least 1")
    wanted = (tile, tile) if isinstance(tile, int) else tile
    if min(wanted) < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1")
    if not 0 <= overlap < min(wanted):
        raise ValueError(f"overlap {overlap} must be at least 0 and smaller than the tile ({tile})")
    sides = min(wanted[0], height), min(wanted[1], width)
    tops, lefts = (
        _offsets(length, side, overlap, multiple, spacing) for length, side in zip((height, width), sides, strict=True)
    )
    plan = TilePlan(height, width, *sides, overlap, tops, lefts)
    if len(plan) > MAX_TILES:
        raise ValueError(
            f"that would be {len(plan):,} tiles, the limit is {MAX_TILES:,}; raise the tile or lower the overlap"
        )
    return plan


def _most_shared(offsets: tuple[int, ...], side: int, length: int, start: int, other: int, other_length: int) -> int:
    """Return which of `offsets` shares most with `start .. start + other`; ties go to the closer middle."""

    def rank(index: int) -> tuple[int, int, int]:
        # Both axes are brought to length * other_length, which keeps the comparison exact.
        a0, a1 = offsets[index] * other_length, (offsets[index] + side) * other_length
        b0, b1 = start * length, (start + other) * length
        return min(a1, b1) - max(a0, b0), -abs(a0 + a1 - b0 - b1), -index

    return max(range(len(offsets)), key=rank)


def _offsets(length: int, tile: int, overlap: int, multiple: int, spacing: Spacing) -> tuple[int, ...]:
    last = length - tile
    if last == 0:
        return (0,)
    stride = max(multiple, (tile - overlap) // multiple * multiple)
    count = -(-last // stride) + 1
    if spacing == "stride":
        return (*(i * stride for i in range(count - 1)), last)
    if spacing == "even":
        return tuple(i * last // (count - 1) // multiple * multiple for i in range(count - 1)) + (last,)
    raise ValueError(f"spacing is {spacing!r}; use 'even' or 'stride'")
