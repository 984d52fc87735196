"""Tiles: where they lie, how they are weighted, and how their results become one picture again.

`TilePlan` is geometry without tensors' content, `window` is a weight mask, `Canvas` is the
weighted sum. Nothing here knows a network; units are whatever the caller uses (latents, pixels).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Window = Literal["gaussian", "uniform", "published", "centred"]
Spacing = Literal["even", "stride"]

MAX_TILES = 2**18  # all are listed and drawn; 2**30 pixels are 16,129 tiles of 512 px that overlap by half
PUBLISHED_STD = 0.1  # of the tile's side: variance 0.01 in OMGSR, OSEDiff, PiSA-SR


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

    def borders(self, scale: int = 1) -> tuple[list[int], list[int]]:
        """Return the rows and columns, `scale` pixels per unit, where a tile begins or ends inside the picture."""
        sides = (self.tops, self.tile_height, self.height), (self.lefts, self.tile_width, self.width)
        return tuple(
            sorted({edge * scale for start in starts for edge in (start, start + side) if 0 < edge < length})
            for starts, side, length in sides
        )

    @cached_property
    def _rows_and_columns(self) -> dict[Window, tuple[Tensor, Tensor]]:
        return {}

    def weights(self, tile: Tile, kind: Window = "gaussian") -> Tensor:
        """Return `tile_height tile_width` weights, float64; over all tiles they sum to 1 everywhere.

        Windows are separable, so the normaliser is the product of two sums along the axes.
        """
        if kind not in self._rows_and_columns:
            rows = _normalised(self.height, self.tops, window(self.tile_height, self.overlap, kind, axis="y"))
            columns = _normalised(self.width, self.lefts, window(self.tile_width, self.overlap, kind, axis="x"))
            self._rows_and_columns[kind] = rows, columns
        rows, columns = self._rows_and_columns[kind]
        return torch.outer(rows[tile.index // len(self.lefts)], columns[tile.index % len(self.lefts)])


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


@lru_cache(maxsize=64)
def window(size: int, overlap: int, kind: Window = "gaussian", axis: Literal["x", "y"] = "x") -> Tensor:
    """Return `size` unnormalised weights along one axis, float64.

    "gaussian": std chosen so that where two neighbours meet at the tile's border, the one that
    ends there has about 2 % of the weight; smooth whatever the overlap.
    "uniform": MultiDiffusion's plain average (Bar-Tal et al. 2023, eq. 5).
    "published": std of a tenth of the tile, and half a pixel off centre along y, as OMGSR and
    OSEDiff have it. "centred": the same in the middle of both axes, as PiSA-SR has it.
    """
    if kind == "uniform":
        return torch.ones(size, dtype=torch.float64)
    if kind == "gaussian":
        # Below a twelfth of the side the border weights would underflow.
        std = max(size / 12, max(0.0, (size - overlap) * overlap / 8) ** 0.5)
        return gaussian(size, std, (size - 1) / 2)
    if kind in ("published", "centred"):
        off = kind == "published" and axis == "y"
        return gaussian(size, PUBLISHED_STD * size, size / 2 if off else (size - 1) / 2)
    raise ValueError(f"window is {kind!r}; use one of: {', '.join(get_args(Window))}")


def gaussian(size: int, std: float, center: float) -> Tensor:
    """Return the normal density of `std` around `center` relative to the tile's side, float64."""
    x = torch.arange(size, dtype=torch.float64)
    density = torch.exp(-((x - center) ** 2) / (2 * std**2))
    return density / ((2 * torch.pi) ** 0.5 * std / size)


def _normalised(length: int, offsets: tuple[int, ...], weights: Tensor) -> list[Tensor]:
    total = torch.zeros(length, dtype=torch.float64)
    for start in offsets:
        total[start : start + len(weights)] += weights
    return [weights / total[start : start + len(weights)] for start in offsets]


class Canvas:
    """The picture being put together: a float32 plane to which weighted tiles are added.

    With `after`, a canvas of another plan that was given up, its tiles stay as they are and this
    plan fills only what they left: if D(p) is the weight already given at p, each of its tiles
    counts w(p) (1 - D(p)), so the weights still sum to 1 and change as smoothly as before.
    """

    def __init__(self, plan: TilePlan, kind: Window = "gaussian", after: Canvas | None = None) -> None:
        self.plan = plan
        self.kind = kind
        self.plane: Tensor | None = after.plane if after else None
        self._share = after._missing() if after else None
        self._added: set[int] = set()

    def pending(self) -> list[Tile]:
        """Return the tiles that are still needed, in reading order."""
        return [
            tile
            for tile in self.plan
            if tile.index not in self._added and (self._share is None or bool(tile.cut(self._share).any()))
        ]

    def add(self, tile: Tile, value: Tensor) -> None:
        """Add one tile's `B C tile_height tile_width`; raises ValueError if the shape is another."""
        if tuple(value.shape[-2:]) != (tile.height, tile.width):
            raise ValueError(f"tile {tile.index} is {tuple(value.shape[-2:])}, planned {tile.height, tile.width}")
        if self.plane is None:
            size = (*value.shape[:-2], self.plan.height, self.plan.width)
            self.plane = torch.zeros(size, dtype=torch.float32, device=value.device)
        weights = self._weights(tile).to(value.device, torch.float32)
        tile.cut(self.plane).add_(value.float() * weights)
        self._added.add(tile.index)

    def result(self) -> Tensor:
        """Return the blended plane `B C H W`, float32; every pending tile must have been added."""
        if self.plane is None:
            raise ValueError("no tile was added to this canvas")
        return self.plane

    def _weights(self, tile: Tile) -> Tensor:
        weights = self.plan.weights(tile, self.kind)
        return weights if self._share is None else weights * tile.cut(self._share)

    def _missing(self) -> Tensor:
        """Weight not yet given, `H W` float64: a sum over the pending tiles, so exactly 0 where none lies."""
        missing = torch.zeros(self.plan.height, self.plan.width, dtype=torch.float64)
        for tile in self.pending():
            tile.cut(missing).add_(self._weights(tile))
        return missing
