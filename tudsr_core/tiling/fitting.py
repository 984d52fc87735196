"""The tiles of one stage: which size fits, where they lie, how many are computed at once.

Pure arithmetic on pixels and on the facts of a network; `tiles.py` has the geometry itself.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Spacing, TilePlan, plan_tiles

if TYPE_CHECKING:
    from .windows import Window

log = logging.getLogger(__name__)

AUTO_TILES_PX = (512, 576, 640)  # what Stable Diffusion 2.1-base was trained at, and a little above
OVERLAP_STEP = 8  # pixels
MOST_TILES = 16  # at once: more are not faster

Size = tuple[int, int]


@dataclass(frozen=True)
class PublishedTiling:
    """How a method's own script cuts the latent: square tiles at every `tile - overlap`, the last one flush.

    `tile_px` and `overlap_px` are in pixels of the enlarged picture. A picture of no more area than one
    tile is not cut, whatever its shape.
    """

    tile_px: int
    overlap_px: int
    window: Window


@dataclass(frozen=True)
class NetworkFacts:
    """What planning must know about a model: geometry, and memory measured once per pixel.

    `latent_scale`: pixels per latent. `multiple`: sides must be multiples of it, in pixels.
    `weight_bytes`: all weights in memory. `tile_bytes_per_pixel`: peak activations of one tile, per
    pixel of tile. `picture_bytes_per_pixel`: the same for an autoencoder that cannot be tiled and
    sees the whole picture; 0 if it can. `plane_bytes_per_pixel`: activations of a tiled autoencoder
    that wait in host memory (or on the device, when they fit), per pixel of picture. `free_bytes`:
    free memory of the device, for choosing the tile batch; 0 where batching gains nothing (CPU).
    """

    latent_scale: int
    multiple: int
    weight_bytes: int
    tile_bytes_per_pixel: int
    picture_bytes_per_pixel: int = 0
    plane_bytes_per_pixel: int = 0
    free_bytes: int = 0


def tile_bytes(tiles: TilePlan, facts: NetworkFacts) -> int:
    """Return the activations of one tile."""
    return tiles.tile_height * tiles.tile_width * facts.latent_scale**2 * facts.tile_bytes_per_pixel


def batch_for(tiles: TilePlan, facts: NetworkFacts, wanted: int = 0) -> int:
    """Return how many tiles are computed at once: `wanted`, or with 0 as many as fit in free memory (unknown: 1)."""
    fitting = facts.free_bytes * 4 // 5 // max(1, tile_bytes(tiles, facts))
    return max(1, min(wanted or min(fitting, MOST_TILES), len(tiles)))


def check_tiles(tile_px: int, overlap_px: int, tile_batch: int, facts: NetworkFacts) -> None:
    """Raise ValueError when tile, overlap or tile batch cannot work with this model."""
    if tile_px and (tile_px < 2 * facts.multiple or tile_px % facts.multiple):
        raise ValueError(
            f"tile {tile_px} must be a multiple of {facts.multiple} and at least {2 * facts.multiple}; "
            "try 512, or 0 to let the picture's size decide"
        )
    smallest = tile_px or AUTO_TILES_PX[0]
    if overlap_px % facts.multiple or not 0 <= overlap_px < smallest:
        raise ValueError(
            f"overlap {overlap_px} must be a multiple of {facts.multiple}, "
            f"at least 0 and smaller than the tile ({smallest})"
        )
    if tile_batch < 0:
        raise ValueError(f"tile batch {tile_batch} must be at least 1, or 0 to let free memory decide")


def fit_overlap(tile_px: int, overlap_px: int) -> int:
    """Return `overlap_px`, or half the tile, said in a warning, where it is not smaller than the tile.

    So a smaller tile alone can be asked for: its overlap follows. `tile_px` 0 stands for 512. Nothing
    follows a tile that `check_tiles` will refuse.
    """
    tile_px = tile_px or AUTO_TILES_PX[0]
    if overlap_px < tile_px or tile_px < 2 * OVERLAP_STEP or tile_px % OVERLAP_STEP:
        return overlap_px
    fitting = tile_px // 2 // OVERLAP_STEP * OVERLAP_STEP
    log.warning("overlap %d is not smaller than the tile (%d); %d is used", overlap_px, tile_px, fitting)
    return fitting


def fit_tile(padded: Size, overlap_px: int, facts: NetworkFacts) -> Size:
    """Return height and width, in pixels, of the tile that takes least computing for a picture of `padded` pixels.

    Tiles a little larger than those the networks were trained at often come out cheaper: 1024 x 1024
    are nine tiles of 512 px that overlap by at least 128 px, or four of 576 px. At equal cost the
    smaller tile is taken.
    """

    def cost(tile: Size) -> float:
        area = tile[0] * tile[1]
        # Self-attention grows with the square of the area; at 512 x 512 it is a sixth of SD2.1's UNet.
        return len(_cut(padded, tile, overlap_px, facts)) * area * (1 + area / (5 * 512**2))

    sides = [AUTO_TILES_PX if length > AUTO_TILES_PX[0] else AUTO_TILES_PX[:1] for length in padded]
    return min(itertools.product(*sides), key=lambda tile: (cost(tile), tile))


def _cut(padded: Size, tile: Size, overlap_px: int, facts: NetworkFacts, spacing: Spacing = "even") -> TilePlan:
    (height, width), scale = padded, facts.latent_scale
    sides, unit = (tile[0] // scale, tile[1] // scale), facts.multiple // scale
    return plan_tiles(height // scale, width // scale, sides, overlap_px // scale, multiple=unit, spacing=spacing)


def tiles_for(padded: Size, tile_px: int, overlap_px: int, facts: NetworkFacts, spacing: Spacing = "even") -> TilePlan:
    """Return the tiles, in latents, of a picture of `padded` pixels; `tile_px` 0 leaves the side to `fit_tile`."""
    tile = (tile_px, tile_px) if tile_px else fit_tile(padded, overlap_px, facts)
    return _cut(padded, tile, overlap_px, facts, spacing)


def published_tiles(padded: Size, tiling: PublishedTiling, facts: NetworkFacts) -> TilePlan:
    """Return the tiles of a method's own script: none by area, else squares no larger than the shorter side."""
    height, width = (side // facts.latent_scale for side in padded)
    tile, overlap = tiling.tile_px // facts.latent_scale, tiling.overlap_px // facts.latent_scale
    if height * width <= tile**2:
        return plan_tiles(height, width, (height, width), 0)
    side = min(tile, height, width)
    # The scripts never end where the shorter side is not above the overlap; half the tile ends.
    return plan_tiles(height, width, side, overlap if overlap < side else side // 2, spacing="stride")
