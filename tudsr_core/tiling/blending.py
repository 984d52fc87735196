"""The weighted sum of tiles: results of single tiles become one picture again.

MultiDiffusion's agreement (Bar-Tal et al. 2023, eq. 5) for any window; nothing here knows a network.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .plan import Tile, TilePlan
from .windows import Window, normalised, window


@lru_cache(maxsize=64)
def _masks(plan: TilePlan, kind: Window) -> tuple[list[Tensor], list[Tensor]]:
    rows = normalised(plan.height, plan.tops, window(plan.tile_height, plan.overlap, kind, axis="y"))
    return rows, normalised(plan.width, plan.lefts, window(plan.tile_width, plan.overlap, kind, axis="x"))


def tile_weights(plan: TilePlan, tile: Tile, kind: Window = "gaussian") -> Tensor:
    """Return `tile_height tile_width` weights, float64; over all tiles of `plan` they sum to 1 everywhere.

    Windows are separable, so the normaliser is the product of two sums along the axes.
    """
    rows, columns = _masks(plan, kind)
    return torch.outer(rows[tile.index // len(plan.lefts)], columns[tile.index % len(plan.lefts)])


class TileBlender:
    """The picture being put together: a float32 plane to which weighted tiles are added.

    With `after`, a canvas of another plan that was given up, its tiles stay as they are and this
    plan fills only what they left: if D(p) is the weight already given at p, each of its tiles
    counts w(p) (1 - D(p)), so the weights still sum to 1 and change as smoothly as before.
    """

    def __init__(self, plan: TilePlan, kind: Window = "gaussian", after: TileBlender | None = None) -> None:
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
        weights = tile_weights(self.plan, tile, self.kind)
        return weights if self._share is None else weights * tile.cut(self._share)

    def _missing(self) -> Tensor:
        """Weight not yet given, `H W` float64: a sum over the pending tiles, so exactly 0 where none lies."""
        missing = torch.zeros(self.plan.height, self.plan.width, dtype=torch.float64)
        for tile in self.pending():
            tile.cut(missing).add_(self._weights(tile))
        return missing
