"""One pass of tiles over a latent: in batches, blended, and with smaller tiles from where memory ran out.

Knows tiles and a function that computes a batch of them; what is computed is the methods' business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .blending import TileBlender
from .plan import Tile, TilePlan, plan_tiles
from .windows import Window

log = logging.getLogger(__name__)

SMALLEST_TILE = 8  # latents

Attempt = Callable[[TileBlender], None]
"""Adds the pending tiles of a blender in reading order; may run out of memory on the way."""


@dataclass
class TiledRun:
    """The tiles in use and how many at once; both shrink when memory runs out, and stay so afterwards.

    `unit`: tile sides are multiples of it. `scale`: pixels per latent, for messages. `expect` is
    told how many tiles more than `tiles` had at first a pass will take.
    """

    tiles: TilePlan
    window: Window = "gaussian"
    batch: int = 1
    unit: int = 1
    scale: int = 8
    expect: Callable[[int], None] = lambda extra: None

    def __post_init__(self) -> None:
        self._planned = len(self.tiles)

    def blend(self, attempt: Attempt, is_out_of_memory: Callable[[BaseException], bool]) -> Tensor:
        """Return the blended result of `attempt`, which adds the blender's pending tiles in order.

        When `attempt` runs out of memory it is called again with a smaller batch, or else with a
        blender of smaller tiles that goes on where the last one stopped. Raises MemoryError when
        nothing smaller is left.
        """
        self.expect(len(self.tiles) - self._planned)
        blender = TileBlender(self.tiles, self.window)
        while not self._succeeds(attempt, blender, is_out_of_memory):
            blender = self._shrink(blender)
        return blender.result()

    def batches(self, blender: TileBlender) -> Iterator[list[Tile]]:
        """Yield the blender's pending tiles in reading order, at most `batch` at a time."""
        tiles = blender.pending()
        for start in range(0, len(tiles), self.batch):
            yield tiles[start : start + self.batch]

    @staticmethod
    def _succeeds(attempt: Attempt, blender: TileBlender, is_out_of_memory: Callable[[BaseException], bool]) -> bool:
        # The except block must end before anything is tried again: the traceback keeps the tensors
        # of the failed call alive.
        try:
            attempt(blender)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self, blender: TileBlender) -> TileBlender:
        if self.batch > 1:
            self.batch //= 2
            log.warning("out of memory: tile batch lowered to %d", self.batch)
            return blender
        old = self.tiles
        side = max(old.tile_height, old.tile_width) // 2 // self.unit * self.unit
        if side < SMALLEST_TILE * self.unit:
            size = 2 * side * self.scale
            raise MemoryError(
                f"out of memory even with tiles of {size} px; close other programs or use a smaller model"
            )
        log.warning("out of memory: tiles lowered to %d px", side * self.scale)
        overlap = min(old.overlap, side // 2 // self.unit * self.unit)
        self.tiles = plan_tiles(old.height, old.width, side, overlap, multiple=self.unit)
        rest = TileBlender(self.tiles, self.window, after=blender)
        self.expect(len(rest.pending()) - len(blender.pending()))
        return rest
